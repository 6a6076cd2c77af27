"""What a bound is held against: all text, or the worst of several data sets."""

from __future__ import annotations

from var_moe.data.text import names_of
from var_moe.errors import UsageError


def check_robust(robust: bool, dataset: str) -> None:
    """Refuse to judge the worst of one data set.

    Raises:
        UsageError: ``robust`` with one data set.
    """
    if robust and len(names_of(dataset)) < 2:
        raise UsageError(
            f"--robust judges the worst of several data sets, and {dataset!r} is one; give "
            "--dataset a,b"
        )
