"""A comparison once more, on other text: settings found on one part, judged on another.

Turning policies on the text that judges them is harmless for the number of experts, but a table on
held-out text has to show that nothing else was turned there either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from var_moe.errors import UsageError
from var_moe.evaluation.compare import Evaluator, Progress
from var_moe.evaluation.sweep import Point, scored_point
from var_moe.storage import read_json

COMPARISON_FILE = "comparison.json"
_NEEDED = ("policy", "dial", "compensation", "target_experts_per_token", "settings")


def earlier_comparison(folder: Path) -> dict[str, Any]:
    """What `compare` saved in a folder.

    Raises:
        UsageError: there is none, or its rows lack what measuring again needs.
    """
    path = folder / COMPARISON_FILE
    if not path.is_file():
        raise UsageError(
            f"{folder}: no {COMPARISON_FILE} there; expected the --output of `var-moe compare`"
        )
    found: dict[str, Any] = read_json(path)
    rows = found.get("rows")
    if not rows or any(name not in row for row in rows for name in _NEEDED):
        raise UsageError(
            f"{path}: its rows lack one of {', '.join(_NEEDED)}; make it again with "
            "`var-moe compare`"
        )
    return found


def measure_again(
    evaluator: Evaluator,
    rows: Sequence[Mapping[str, Any]],
    calibration: Callable[[str | None], Mapping[str, Any]],
    *,
    progress: Progress | None = None,
) -> Iterator[Point]:
    """Score the rows of an earlier comparison, each with its own settings.

    Args:
        evaluator: the text that is judged on.
        rows: of ``comparison.json``.
        calibration: what policies may ask for, by the name of a compensation.
        progress: called with what is done, points done and in all.

    Yields:
        Points, in the order of the rows.
    """
    for done, row in enumerate(rows):
        if progress:
            progress(str(row.get("name", row["policy"])), done, len(rows))
        yield scored_point(
            evaluator,
            calibration(row["compensation"]),
            policy=row["policy"],
            dial=row["dial"],
            target=row["target_experts_per_token"],
            compensation=row["compensation"],
            settings=row["settings"],
        )
    if progress:
        progress("policies", len(rows), len(rows))
