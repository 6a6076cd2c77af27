"""Searches that differ in their seed alone, read from their results folders."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from var_moe.errors import UsageError
from var_moe.optimization.candidate import Candidate, PolicySettings, load_candidate
from var_moe.optimization.saving import CONFIG_FILE, METADATA_FILE, RESULTS_FILE
from var_moe.storage import SCHEMA_VERSION, entries_of, read_json

ALIKE = (
    *("model", "revision", "dtype", "dataset", "data_hash", "robust", "max_degradation"),
    *("policy", "mode", "compensation", "method", "n_calls", "search_documents", "space"),
)
"""What must be the same in all runs: else a difference is not the seed's."""


@dataclass(frozen=True, kw_only=True)
class SeedRun:
    """A finished search.

    Args:
        folder: its results.
        seed: of the search.
        best_score: of the winner, as measured on text that was not searched on.
        winner: None where nothing kept the bound.
        measured: the winner's figures on that text; empty without a winner.
        metadata: what the search recorded.
    """

    folder: Path
    seed: int
    best_score: float
    winner: Candidate | None
    measured: Mapping[str, Any]
    metadata: Mapping[str, Any]

    @property
    def config(self) -> Path:
        """The file of the winner."""
        return self.folder / CONFIG_FILE

    @property
    def compensation(self) -> str | None:
        """What stands in for dropped experts in the winner."""
        return self.winner.compensation if isinstance(self.winner, PolicySettings) else None

    @property
    def known_documents(self) -> int | None:
        """How many documents the winner was measured on."""
        return self.measured.get("documents")

    def known(self, name: str) -> Any:
        """A setting, or a part of the identity; None where there is none."""
        return {**self.metadata["settings"], **self.metadata["identity"]}.get(name)


def read_run(folder: Path) -> SeedRun:
    """One results folder of `tune`.

    Raises:
        UsageError: there is no such folder, its search is not finished, or a file is damaged.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; expected the results of `var-moe tune`")
    if not (folder / METADATA_FILE).is_file():
        raise UsageError(
            f"{folder}: no {METADATA_FILE}; expected the results of a finished `var-moe tune` "
            "(an interrupted one goes on with --resume)"
        )
    metadata = read_json(folder / METADATA_FILE, what="metadata of a search")
    results = read_json(folder / RESULTS_FILE, what="results of a search")
    for name, value in ((METADATA_FILE, metadata), (RESULTS_FILE, results)):
        if not isinstance(value, dict) or value.get("schema_version") != SCHEMA_VERSION:
            raise UsageError(
                f"{folder / name}: not of schema {SCHEMA_VERSION}; run the search again"
            )
    needed = {"settings", "identity", "remeasured", "seed"} - set(metadata)
    if needed or "best_score" not in results:
        missing = sorted(needed)[0] if needed else "best_score"
        raise UsageError(f"{folder}: no {missing!r}; expected the results of `var-moe tune`")
    winner: Candidate | None = None
    row: Mapping[str, Any] = {}
    with entries_of(folder):
        if (folder / CONFIG_FILE).is_file():
            winner = load_candidate(folder / CONFIG_FILE)
            row = _row_of(winner, metadata["remeasured"], folder)
        run = SeedRun(
            folder=folder,
            seed=int(metadata["seed"]),
            best_score=math.nan if results["best_score"] is None else float(results["best_score"]),
            winner=winner,
            measured=row,
            metadata=metadata,
        )
        run.known("policy")  # settings and identity are what they should be
    return run


def _row_of(winner: Candidate, rows: Any, folder: Path) -> Mapping[str, Any]:
    for row in rows:
        if row["config"] == winner.to_dict() and row["passed"]:
            return dict(row)
    raise UsageError(f"{folder / CONFIG_FILE}: not what {METADATA_FILE} beside it was written for")


def read_runs(folders: Sequence[Path]) -> list[SeedRun]:
    """Several, which must differ in their seed alone; in the order of their seeds.

    Raises:
        UsageError: fewer than two, one that is of another model, data set, bound, policy or
            search, or two of one seed; names both folders.
    """
    if len(folders) < 2:
        raise UsageError(
            f"{len(folders)} run: a spread over seeds needs at least 2 results folders"
        )
    runs = [read_run(Path(folder)) for folder in folders]
    first = runs[0]
    for other in runs[1:]:
        for name in ALIKE:
            if other.known(name) != first.known(name):
                raise UsageError(
                    f"{other.folder}: {name} = {_short(other.known(name))}, and {first.folder} "
                    f"has {_short(first.known(name))}; expected runs that differ in the seed alone"
                )
    ordered = sorted(runs, key=lambda run: run.seed)
    for one, next_one in pairwise(ordered):
        if one.seed == next_one.seed:
            raise UsageError(
                f"{one.folder} and {next_one.folder} are both of seed {one.seed}; expected "
                "different seeds"
            )
    return ordered


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
