"""What is printed: any name as it is, in any encoding, to a reader that may be gone."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

WIDTH = 118
"""Of tables that no terminal shows."""


def console(stream: TextIO | None = None, *, width: int | None = None) -> Console:
    """The one kind of console: brackets and colons in a name are no markup.

    Args:
        stream: where to write; stdout by default.
        width: by default a terminal's own, and one width elsewhere.
    """
    from rich.console import Console

    if width is None and not (sys.stdout if stream is None else stream).isatty():
        width = WIDTH
    return Console(file=stream, width=width, markup=False, emoji=False, highlight=False)


def show(*parts: RenderableType, stream: TextIO | None = None, width: int | None = None) -> None:
    """Print lines as they are, and tables.

    Args:
        parts: lines, and what rich renders.
        stream: where to write; stdout by default.
        width: see `console`.
    """
    for part in parts:
        if isinstance(part, str):
            print(part, file=stream)
        else:
            console(stream, width=width).print(part)


def show_next(*words: object) -> None:
    """Say which command comes next, as a shell takes it."""
    print(f"Next: {shlex.join(['var-moe', *map(str, words)])}")


class SteadyStream:
    """A text stream that never ends the work that prints to it.

    A character that the encoding lacks is written as its code. After the first failure (a closed
    pipe, a full disk) what is printed is dropped, and `error` holds the reason.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: OSError | None = None
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or drop it."""
        self._do(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, or drop what is left."""
        self._do(self._stream.flush)

    def _do(self, step: Any) -> None:
        try:
            step()
        except OSError as error:
            self.error = error
            # What lies in the buffer would fail again, with noise, when Python ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def steady_streams() -> Iterator[tuple[SteadyStream, SteadyStream]]:
    """Within it, stdout and stderr are steady; yields both. What is closed leads nowhere."""
    with open(os.devnull, "r+", encoding="utf-8") as nowhere:  # noqa: PTH123
        sys.stdin = sys.stdin or nowhere
        out, err = (SteadyStream(one or nowhere) for one in (sys.stdout, sys.stderr))
        with redirect_stdout(out), redirect_stderr(err):
            try:
                yield out, err
            finally:
                out.flush()
                err.flush()


def figures_table(title: str, *headings: str) -> Any:
    """An empty table: the first column to the left, figures to the right."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    return table


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
