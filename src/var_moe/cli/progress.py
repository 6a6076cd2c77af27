"""Progress with the time left, on stderr: a bar on a terminal, sparse lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_EVERY_SECONDS = 10.0


class StageProgress:
    """Called with a stage's name, steps done and steps in all; a new name is a new stage."""

    def __init__(self) -> None:
        self._stage = ""
        self._started = self._said = 0.0
        self._done = 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if stage != self._stage or done < self._done:
            self._open(stage, now)
        self._done = done
        if sys.stderr.isatty():
            self._draw(stage, done, total)
        elif now - self._said >= _EVERY_SECONDS:
            self._said = now
            left = (now - self._started) * (total - done) / max(done, 1)
            self.say(f"{stage}: {done:,}/{total:,}, about {left:.0f} s left")
        if done >= total:
            self.close()

    def _open(self, stage: str, now: float) -> None:
        self.close()
        self._stage, self._started, self._said, self._done = stage, now, now, 0
        if not sys.stderr.isatty():
            self.say(f"{stage} ...")

    def _draw(self, stage: str, done: int, total: int) -> None:
        if self._bar is None:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            from var_moe.terminal import console

            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
                TimeRemainingColumn(),
                console=console(sys.stderr),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(stage, total=total)
        assert self._task is not None
        self._bar.update(self._task, completed=done, total=total)

    def say(self, line: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.console.print(line)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the running stage's bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None
        self._stage, self._done = "", 0

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
