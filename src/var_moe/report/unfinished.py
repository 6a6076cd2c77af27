"""Results of a command that ended before all was measured: what is there, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from var_moe.growing import INCOMPLETE
from var_moe.report.blocks import Notes, Section, section
from var_moe.report.folder import FILES, Results
from var_moe.report.wording import change


def unfinished_section(results: Results) -> Section | None:
    """A line for each file that is not whole; what it holds of rows stands in its own section."""
    if not results.unfinished:
        return None
    lines = [_line(FILES[name], found) for name, found in results.unfinished.items()]
    return section(
        "unfinished",
        "Unfinished",
        [Notes(lines=lines)],
        intro="A command ended before all was measured; the same command measures it again.",
    )


def foreign_section(results: Results) -> Section | None:
    """A line for each file that an earlier search in the folder left."""
    lines = [f"{FILES[name]}: of another profile than the search's." for name in results.foreign]
    if not lines:
        return None
    return section("foreign", "Left out", [Notes(lines=lines)], intro="What is of other results.")


def _line(file: str, found: Mapping[str, Any]) -> str:
    known = ""
    if found.get("degradation") is not None:
        known = (
            f"; perplexity {change(found)} at {found['experts_per_token']:.3f} experts per token"
        )
    return f"{file}: without {found[INCOMPLETE]}{known}."
