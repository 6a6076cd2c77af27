"""The one place where a command's result becomes JSON on stdout, beside tables for people."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


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
