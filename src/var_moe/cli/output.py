"""What a command gives: progress on stderr, tables, its result as JSON, what it saved."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from var_moe.errors import VarMoeError
from var_moe.storage import jsonable

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table as RichTable

    from var_moe.report.blocks import Section
    from var_moe.report.folder import Results

_EVERY_SECONDS = 10.0


@dataclass(frozen=True)
class CommandResult:
    """What a command returns: its result, as in its result file, and its exit code."""

    result: Mapping[str, Any]
    code: int = 0


def run(command: Callable[[], Any], *, as_json: bool) -> int:
    """Run a command; returns its exit code.

    Args:
        command: returns an `CommandResult`, or an exit code where there is no result (None: 0).
        as_json: print the result alone on stdout, and all else on stderr. A failure that leaves
            a result (its attribute ``result``) prints it before the error goes on.
    """
    stdout, result = sys.stdout, None
    try:
        with contextlib.redirect_stdout(sys.stderr if as_json else stdout):
            done = command()
        result = getattr(done, "result", None)
    except BaseException as error:
        result = getattr(error, "result", None)
        raise
    finally:
        if as_json and result is not None:
            text = json.dumps(jsonable(result), indent=2, allow_nan=False)
            print(text, file=stdout, flush=True)
    return done.code if isinstance(done, CommandResult) else done or 0


def finish(result: Mapping[str, Any], *files: Path, report: Path | None = None) -> CommandResult:
    """End a command: print its notes, name the files, make the report of a folder."""
    for note in result.get("notes", ()):
        print(f"Note: {note}")
    if files:
        print(f"Saved: {', '.join(map(str, files))}")
    if report is not None:
        make_report(report)
    return CommandResult(result)


def make_report(folder: Path) -> None:
    """The report of a command that ends; a report that fails does not take the results with it."""
    from var_moe.report.page import write_report

    try:
        print(f"Report: {write_report(folder)}")
    except (VarMoeError, OSError) as error:
        print(f"Note: no report was made ({error})", file=sys.stderr)


def show_section(make: Callable[[Results], Section], **parts: Any) -> None:
    """Print what a section of the report says: its sentence, its tables and facts.

    Args:
        make: makes the section; one without figures, which need plotly.
        parts: of the results, by the names of `report.folder.FILES`.
    """
    from var_moe.report.blocks import Facts, Table
    from var_moe.report.folder import Results
    from var_moe.terminal import show

    section = make(Results(folder=Path(), parts=parts))
    show(*filter(None, [section.intro]))
    for block in section.blocks:
        if isinstance(block, Facts):
            show(_rich(block.title, ("", ""), block.rows.items()))
        elif isinstance(block, Table):
            show(_rich(block.title, block.headings, block.rows, words=block.words))


def table(title: str, columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> RichTable:
    """Rows as a table: the first column to the left, the others to the right.

    Args:
        title: above the table.
        columns: a format string for each heading, such as ``"{speedup:.3f}x"``; headings that
            differ in trailing spaces alone look alike.
        rows: what the format strings name. A cell stays empty where a value is None.
    """
    cells = ([_cell(template, row) for template in columns.values()] for row in rows)
    return _rich(title, [heading.rstrip() for heading in columns], cells)


def _rich(
    title: str, headings: Sequence[str], rows: Iterable[Iterable[str]], *, words: int = 1
) -> RichTable:
    from rich.table import Table

    made = Table(title=title or None, title_justify="left", show_header=any(headings))
    for number, heading in enumerate(headings):
        made.add_column(heading, justify="left" if number < words else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
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

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._quiet:
            return
        now = time.perf_counter()
        if stage != self._stage or done < self._done:
            self.close()
            self._stage, self._started, self._said = stage, now, now
            if sys.stderr.isatty():
                self._bar = _bar(stage)
            else:
                self.say(f"{stage} ...")
        self._done = done
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total)
        elif now - self._said >= _EVERY_SECONDS:
            self._said = now
            left = (now - self._started) * (total - done) / max(done, 1)
            self.say(f"{stage}: {done:,}/{total:,}, about {left:.0f} s left")
        if done >= total:
            self.close()

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
            self._bar = None
        self._stage, self._done = "", 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bar(stage: str) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from var_moe.terminal import console

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console(sys.stderr),
        transient=True,
    )
    bar.add_task(stage)
    bar.start()
    return bar
