"""What a results folder holds: each result file that is there, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from var_moe.errors import UsageError
from var_moe.growing import INCOMPLETE
from var_moe.report.theme import change
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

STATS_FILE, PROFILE_FILE = "routing_stats.parquet", "profile.json"
_NEVER_ALONE = {"front", "cost", "components"}
_OF_ROWS = ("evaluation", "comparison")  # the rows that are there can be shown


@dataclass(frozen=True, kw_only=True)
class Results:
    """A results folder's parts.

    Args:
        folder: where they lie.
        parts: by the names of `FILES`, those that are there.
        left_out: a line for each file that is not whole, or of an earlier search in the folder.
        stats: rows of ``routing_stats.parquet`` of the profile that the results were made with,
            where it can be found.
    """

    folder: Path
    parts: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    stats: pd.DataFrame | None = None

    def __getitem__(self, name: str) -> Any:
        """A part.

        Raises:
            UsageError: it is not there; names the file.
        """
        if name not in self.parts:
            raise UsageError(f"{self.folder}: {FILES[name]} is missing")
        return self.parts[name]

    def get(self, name: str) -> Any:
        """A part, or None."""
        return self.parts.get(name)

    @property
    def winner(self) -> dict[str, Any] | None:
        """What was measured of the configuration that the search chose, if it chose one."""
        if "search" not in self.parts:
            return None
        rows: list[dict[str, Any]] = self["metadata"].get("remeasured", [])
        return next((row for row in rows if row["config"] == self["search"]["best_params"]), None)


def read_results(folder: Path) -> Results:
    """Read what is there.

    Raises:
        UsageError: no folder, nothing to report in it, or a file that is broken or of another
            version; names it.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; expected one that a command left results in")
    parts, left_out = {}, []
    for name, file in FILES.items():
        if not (folder / file).is_file():
            continue
        part = _checked(folder / file, versioned=name != "cost")
        if INCOMPLETE in part:
            left_out.append(_unfinished(file, part))
        if INCOMPLETE not in part or name in _OF_ROWS:
            parts[name] = part
    for name in _foreign(parts):
        del parts[name]
        left_out.append(f"{FILES[name]}: of another profile than the search's.")
    stats = _stats(folder, parts)
    if not parts.keys() - _NEVER_ALONE and not left_out and stats is None:
        known = ", ".join(file for name, file in FILES.items() if name not in _NEVER_ALONE)
        raise UsageError(f"{folder}: nothing to report; expected one of {known}, {STATS_FILE}")
    return Results(folder=folder, parts=parts, left_out=left_out, stats=stats)


def _checked(path: Path, *, versioned: bool = True) -> Any:
    value = read_json(path, what="result file")
    if not isinstance(value, dict):
        raise UsageError(f"{path}: expected an object at the top")
    version = value.get("schema_version")
    if versioned and version != SCHEMA_VERSION:
        raise UsageError(
            f"{path}: schema_version {version}, expected {SCHEMA_VERSION}; "
            "make it again with this version of var_moe"
        )
    return value


def _unfinished(file: str, part: Mapping[str, Any]) -> str:
    line = f"{file}: without {part[INCOMPLETE]}"
    if part.get("degradation") is not None:
        line += f"; perplexity {change(part)} at {part['experts_per_token']:.3f} experts per token"
    return f"{line}. The same command measures it again."


def _foreign(parts: Mapping[str, Any]) -> list[str]:
    """Names of what an earlier search in the folder was about, by its profile."""
    profile = (parts.get("metadata", {}).get("identity") or {}).get("profile_hash")
    hashes = parts.get("certificate", {}).get("hashes") or {}
    used = {
        "certificate": hashes.get("profile"),
        "validation": parts.get("validation", {}).get("profile_hash"),
    }
    return [name for name, value in used.items() if profile and value not in (None, profile)]


def _stats(folder: Path, parts: Mapping[str, Any]) -> pd.DataFrame | None:
    """The profile's rows: the folder itself, one beside the results, or the one they name."""
    profile = parts.get("metadata", {}).get("profile") or {}
    if not profile and "routing" in parts:
        routing = parts["routing"]
        profile = {"path": routing.get("profile_path"), "hash": routing["profile_hash"]}
    places = [folder, folder / "profile"]
    if profile.get("path"):
        places.append(Path(profile["path"]))
    for place in places:
        if (place / STATS_FILE).is_file() and (place / PROFILE_FILE).is_file():
            head = _checked(place / PROFILE_FILE, versioned=False)
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
