"""What a running search tells the person who waits for it, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from var_moe.optimization.results import Evaluation

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SLOW_AFTER = 3
SLOW_SECONDS = 600.0


class SearchProgress:
    """One line per evaluation, and above a terminal's last line a bar with the time left.

    Args:
        total: evaluations planned.
        finished: evaluations taken over from an earlier run.
        verbose: False says nothing at all.
        count_flag: the option that lowers the number of evaluations, for the hint.
        stream: where to write; stderr by default.
    """

    def __init__(
        self,
        *,
        total: int,
        finished: Sequence[Evaluation],
        verbose: bool = True,
        count_flag: str = "--n_calls",
        stream: TextIO | None = None,
    ) -> None:
        self._total = total
        self._verbose = verbose
        self._count_flag = count_flag
        self._stream = sys.stderr if stream is None else stream
        self._durations: list[float] = []
        self._best: float | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        for evaluation in finished:
            self._note_best(evaluation)
        self._finished = len(finished)

    def __enter__(self) -> SearchProgress:
        if self._verbose and self._stream.isatty():
            self._start_bar()
        if self._verbose and self._finished:
            self._say(f"resuming: {self._finished} of {self._total} evaluations are done")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, evaluation: Evaluation, number: int) -> None:
        """Tell about evaluation `number`, counted from 1."""
        self._durations.append(evaluation.seconds + evaluation.suggestion_seconds)
        self._note_best(evaluation)
        left = self.seconds_left(number)
        if not self._verbose:
            return
        self._say(f"{self._line(evaluation, number)} | ETA {duration(left)}")
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=number, eta=duration(left))
        if len(self._durations) == SLOW_AFTER and left > SLOW_SECONDS:
            self._say(self._hint(number, left))

    def seconds_left(self, number: int) -> float:
        """Estimated seconds from evaluation `number` on, by this run's mean."""
        mean = sum(self._durations) / len(self._durations) if self._durations else 0.0
        return mean * max(0, self._total - number)

    def _note_best(self, evaluation: Evaluation) -> None:
        if evaluation.eligible and evaluation.score is not None:
            old = self._best
            self._best = evaluation.score if old is None else max(old, evaluation.score)

    def _line(self, evaluation: Evaluation, number: int) -> str:
        best = "best -" if self._best is None else f"best {self._best:.4g}"
        count = f"[{number:>{len(str(self._total))}}/{self._total}]"
        return f"{count} {_outcome(evaluation)} | {best} | {duration(evaluation.seconds)}"

    def _hint(self, number: int, left: float) -> str:
        each = sum(self._durations) / len(self._durations)
        return (
            f"Slow optimization: about {duration(left)} left for {self._total - number} "
            f"evaluations of {duration(each)} each; {self._count_flag} lowers their number, "
            f"--max-samples the text of each"
        )

    def _start_bar(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        from var_moe.terminal import console

        self._bar = Progress(
            TextColumn("optimizing"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("ETA {task.fields[eta]}"),
            console=console(self._stream),
        )
        self._task = self._bar.add_task(
            "optimizing", total=self._total, completed=self._finished, eta="-"
        )
        self._bar.start()

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, soft_wrap=True)
        else:
            print(line, file=self._stream, flush=True)


def duration(seconds: float) -> str:
    """A time for people: ``0.4 s``, ``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(whole / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _outcome(evaluation: Evaluation) -> str:
    if evaluation.failed:
        return f"failed: {evaluation.error}"
    if evaluation.degradation is None:
        return f"score {evaluation.score:.6g}"
    parts = [f"degradation {100 * evaluation.degradation:+.2f}%"]
    if evaluation.feasible is False:
        parts.append("over the bound")
    if evaluation.speedup is not None:
        parts.append(f"speedup {evaluation.speedup:.3f}x")
    elif evaluation.predicted_speedup is not None:
        parts.append(f"predicted speedup {evaluation.predicted_speedup:.3f}x")
    if evaluation.experts_per_token is not None:
        parts.append(f"{evaluation.experts_per_token:.2f} experts per token")
    return ", ".join(parts)
