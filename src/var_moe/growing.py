"""A result file that grows: written after each part, so that a failure takes nothing along."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from var_moe.storage import atomic_write_json

INCOMPLETE = "incomplete"
"""Entry of a result file that names what is still missing; a whole one has no such entry."""


class GrowingResult:
    """Within it, `save` writes what is known so far; an error that ends it says what is kept.

    The error gets two attributes, for whoever shows it: ``kept``, a line, and ``result``, what
    was saved last.

    Args:
        path: the result file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.saved: dict[str, Any] | None = None

    def save(self, result: dict[str, Any], *, missing: str | None = None) -> dict[str, Any]:
        """Write it, whole or not at all.

        Args:
            result: plain data.
            missing: what has yet to come, in a few words; None where nothing has.

        Returns:
            What the file holds.
        """
        version = {"schema_version": result.get("schema_version")}
        self.saved = result if missing is None else {**version, INCOMPLETE: missing, **result}
        atomic_write_json(self.path, self.saved)
        return self.saved

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is None or self.saved is None or INCOMPLETE not in self.saved:
            return
        line = f"{self.path} keeps what was measured, without {self.saved[INCOMPLETE]}"
        for name, value in (("kept", line), ("result", self.saved)):
            setattr(error, name, value)


def kept_by(error: BaseException) -> str:
    """What is kept in spite of an error, as the end of its line; empty where nothing is."""
    line = getattr(error, "kept", None)
    return f"; {line}" if line else ""
