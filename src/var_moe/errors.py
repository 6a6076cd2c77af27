"""The two kinds of error that a user meets, each with its exit code.

Every message is one line: it names the file, field or value, says what was expected,
and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

LONGEST_LINE = 300


class VarMoeError(Exception):
    """A failure while working: the input was understood, the work did not succeed."""

    exit_code: ClassVar[int] = 1
    result: Mapping[str, Any] | None = None
    """What is known all the same, for machines: a refused certificate, a nearest miss."""


class UsageError(VarMoeError, ValueError):
    """Bad input: a missing file, an unknown field, a value out of its range."""

    exit_code: ClassVar[int] = 2


def one_line(error: BaseException) -> str:
    """An error's text as one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_LINE else text[: LONGEST_LINE - 4] + " ..."
