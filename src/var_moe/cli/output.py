"""What a command gives: progress on stderr, tables, its result as JSON, what it saved."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from rich.table import Table

_EVERY_SECONDS = 10.0


@dataclass(frozen=True)
class Answer:
    """What a command returns: the machine-readable result that it saved or showed.

    Args:
        result: plain data, as in its result file.
        code: exit code.
    """

    result: Mapping[str, Any]
    code: int = 0


def run(command: Callable[[], Any], *, as_json: bool) -> int:
    """Run a command; returns its exit code.

    Args:
        command: returns an `Answer`, or an exit code where there is no result (None: 0).
        as_json: print the result alone on stdout, and all else on stderr. A failure that leaves
            a result (its attribute ``result``) prints it before the error goes on.
    """
    with _aside(as_json) as stdout:
        try:
            done = command()
        except BaseException as error:
            result = getattr(error, "result", None)
            if as_json and result is not None:
                _write(result, stdout)
            raise
    if not isinstance(done, Answer):
        return done if isinstance(done, int) else 0
    if as_json:
        _write(done.result, stdout)
    return done.code


@contextlib.contextmanager
def _aside(wanted: bool) -> Iterator[Any]:
    """Send what is printed to stderr; yields the real stdout."""
    stdout = sys.stdout
    if not wanted:
        yield stdout
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield stdout


def _write(result: Mapping[str, Any], stream: Any) -> None:
    from var_moe.storage import jsonable

    print(json.dumps(jsonable(result), indent=2, allow_nan=False), file=stream, flush=True)


def finish(result: Mapping[str, Any], *files: Path, report: Path | None = None) -> Answer:
    """End a command: print its notes, name the files, make the report of a folder."""
    for note in result.get("notes", ()):
        print(f"Note: {note}")
    if files:
        print(f"Saved: {', '.join(map(str, files))}")
    if report is not None:
        make_report(report)
    return Answer(result)


def make_report(folder: Path) -> None:
    """The report of a command that ends; a report that fails does not take the results with it."""
    from var_moe.errors import VarMoeError
    from var_moe.report.page import write_report

    try:
        path = write_report(folder)
    except (VarMoeError, OSError) as error:
        print(f"Note: no report was made ({error})", file=sys.stderr)
        return
    print(f"Report: {path}")


def table(
    title: str | None, columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]]
) -> Table:
    """Rows as a table: the first column to the left, the others to the right.

    Args:
        title: above the table.
        columns: a format string for each heading, such as ``"{speedup:.3f}x"``; headings that
            differ in trailing spaces alone look alike.
        rows: what the format strings name. A cell stays empty where a value is None.
    """
    from rich.table import Table

    made = Table(title=title, title_justify="left")
    for number, heading in enumerate(columns):
        made.add_column(heading.rstrip(), justify="right" if number else "left", overflow="fold")
    for row in rows:
        made.add_row(*(_cell(template, row) for template in columns.values()))
    return made


def _cell(template: str, row: Mapping[str, Any]) -> str:
    try:
        return template.format_map(row)
    except TypeError:  # None has no decimals and no ends
        return ""


TIERS = "{fast_pct:.1f} / {cached_pct:.1f} / {learned_pct:.1f}"
CHANGE = "{degradation:+.2%} ({degradation_upper_95:+.2%})"
SPEEDUP = "{speedup:.3f} [{speedup_95[0]:.3f}, {speedup_95[1]:.3f}]"
"""Cells of several tables: shares of the tiers, change of the perplexity, speedup."""


class StageProgress:
    """Called with a stage's name, steps done and steps in all; a new name is a new stage.

    A bar on a terminal, elsewhere a line every ten seconds at most; nothing where `quiet`.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._stage = ""
        self._started = self._said = 0.0
        self._done = 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._quiet:
            return
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
        """Write a line of its own."""
        if self._quiet:
            return
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
