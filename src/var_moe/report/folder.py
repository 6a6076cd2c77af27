"""What a results folder holds: each result file that is there, read and checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from var_moe.errors import UsageError
from var_moe.growing import INCOMPLETE
from var_moe.storage import SCHEMA_VERSION, read_json

if TYPE_CHECKING:
    import pandas as pd

FILES = {
    "search": "optimization_results.json",
    "metadata": "optimization_metadata.json",
    "front": "pareto.json",
    "cost": "cost_model.json",
    "validation": "validation_results.json",
    "certificate": "certificate.json",
    "stability": "stability.json",
    "comparison": "comparison.json",
    "evaluation": "evaluation.json",
    "guard": "guard_check.json",
    "analysis": "systems_analysis.json",
    "components": "profile_report.json",
    "routing": "routing_analysis.json",
}
"""The files that a report reads, by the name of the part."""

STATS_FILE = "routing_stats.parquet"
PROFILE_FILE = "profile.json"
_NEED = {"search": "metadata", "front": "metadata", "components": "analysis"}
_UNVERSIONED = ("cost",)
_OF_ROWS = ("evaluation", "comparison")  # the rows that are there can be shown


@dataclass(frozen=True, kw_only=True)
class Results:
    """A results folder's parts.

    Args:
        folder: where they lie.
        parts: by the names of `FILES`, those that are there.
        unfinished: those that are not whole, in the same way.
        foreign: those that are not of the folder's search: an earlier one's, left out.
        stats: rows of ``routing_stats.parquet`` of the profile that the results were made with,
            where it can be found.
    """

    folder: Path
    parts: dict[str, Any] = field(default_factory=dict)
    unfinished: dict[str, Any] = field(default_factory=dict)
    foreign: dict[str, Any] = field(default_factory=dict)
    stats: pd.DataFrame | None = None
    asked: set[str] = field(default_factory=set)
    """Parts that were asked for; emptied by whoever wants to know."""

    def get(self, name: str) -> Any:
        """A part, or None."""
        self.asked.add(name)
        return self.parts.get(name)

    @property
    def winner(self) -> dict[str, Any] | None:
        """What was measured of the configuration that the search chose, if it chose one."""
        if "search" not in self.parts:
            return None
        best = self.parts["search"]["best_params"]
        rows: list[dict[str, Any]] = self.parts["metadata"].get("remeasured", [])
        return next((row for row in rows if row["config"] == best), None)


def read_results(folder: Path) -> Results:
    """Read what is there.

    Raises:
        UsageError: no folder, nothing to report in it, or a file that is broken or of another
            version; names it.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; expected one that a command left results in")
    parts, unfinished = {}, {}
    for name, file in FILES.items():
        path = folder / file
        if not path.is_file():
            continue
        part = _checked(path, name)
        if INCOMPLETE in part:
            unfinished[name] = part
        if INCOMPLETE not in part or name in _OF_ROWS:
            parts[name] = part
    if "analysis" in unfinished:
        parts.pop("components", None)  # of which the analysis is the frame
    for name, needed in _NEED.items():
        if name in parts and needed not in parts:
            raise UsageError(f"{folder}: {FILES[name]} is there, {FILES[needed]} is missing")
    foreign = {name: parts.pop(name) for name in _foreign(parts)}
    stats = _stats(folder, parts)
    if not parts.keys() - {"cost"} and not unfinished and stats is None:
        known = ", ".join(file for name, file in FILES.items() if name != "cost")
        raise UsageError(f"{folder}: nothing to report; expected one of {known}, {STATS_FILE}")
    return Results(folder=folder, parts=parts, unfinished=unfinished, foreign=foreign, stats=stats)


def _foreign(parts: dict[str, Any]) -> list[str]:
    """Names of what an earlier search in the folder was about, by its profile."""
    profile = (parts.get("metadata", {}).get("identity") or {}).get("profile_hash")
    held_out, hashes = parts.get("validation", {}), parts.get("certificate", {}).get("hashes") or {}
    used = {"certificate": hashes.get("profile"), "validation": held_out.get("profile_hash")}
    known = {name: value for name, value in used.items() if profile and value}
    return [name for name, value in known.items() if value != profile]


def _checked(path: Path, name: str) -> Any:
    value = read_json(path, what="result file")
    if not isinstance(value, dict):
        raise UsageError(f"{path}: expected an object at the top")
    version = value.get("schema_version")
    if name not in _UNVERSIONED and version != SCHEMA_VERSION:
        raise UsageError(
            f"{path}: schema_version {version}, expected {SCHEMA_VERSION}; "
            "make it again with this version of var_moe"
        )
    return value


def _stats(folder: Path, parts: dict[str, Any]) -> pd.DataFrame | None:
    """The profile's rows: the folder itself, one beside the results, or the one they name."""
    profile = parts.get("metadata", {}).get("profile") or {}
    if not profile and "routing" in parts:
        routing = parts["routing"]
        profile = {"path": routing.get("profile_path"), "hash": routing["profile_hash"]}
    named = profile.get("path")
    places = [folder, folder / "profile", *([Path(named)] if named else [])]
    for place in places:
        if not (place / STATS_FILE).is_file() or not (place / PROFILE_FILE).is_file():
            continue
        head = read_json(place / PROFILE_FILE, what="profile head")
        if not isinstance(head, dict):
            raise UsageError(f"{place / PROFILE_FILE}: expected an object at the top")
        if profile.get("hash") in (None, head.get("hash")):
            return _table(place / STATS_FILE)
    return None


def _table(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        return pd.read_parquet(path)
    except (ValueError, OSError) as error:
        line = str(error).partition("\n")[0]
        raise UsageError(f"{path}: not a table of a profile ({line}); profile again") from None
