"""``--text_column``, for every command that takes ``--dataset``: a part of the data set's name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

from cyclopts import Parameter

_HELP = (
    "the column of --dataset that holds the text, where that is not clear; the same as "
    "name::column as the dataset."
)


def with_text_column(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with a parameter ``text_column`` after its ``dataset``; others as they are.

    The command itself sees it in the data set's name (`data.text.with_column`), so that
    all that it reads and writes agrees on it.
    """
    signature = inspect.signature(command)
    if "dataset" not in signature.parameters:
        return command

    @functools.wraps(command)
    def run(*words: Any, text_column: str | None = None, **options: Any) -> Any:
        if text_column is not None:
            from var_moe.data.text import with_column
            from var_moe.errors import UsageError

            if not options.get("dataset"):
                raise UsageError(f"--text_column {text_column} needs the --dataset that has it")
            options["dataset"] = with_column(options["dataset"], text_column)
        return command(*words, **options)

    added = inspect.Parameter(
        "text_column",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[str | None, Parameter(help=_HELP)],
    )
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        parameters += [parameter, added] if parameter.name == "dataset" else [parameter]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {**command.__annotations__, "text_column": added.annotation}
    return run
