"""Which configurations a certificate is asked about: a results folder's front, thinned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from var_moe.errors import UsageError
from var_moe.optimization.candidate import Candidate, load_candidate
from var_moe.optimization.front import PARETO_FILE
from var_moe.optimization.saving import CONFIG_FILE, NEAREST_MISS_FILE
from var_moe.storage import SCHEMA_VERSION, read_json

UNMODIFIED = "native"
SAFER = (0.85, 0.7, 0.5, 0.3)
"""Strengths, relative to a configuration that has no front, of the safer ones beside it."""


@dataclass(frozen=True, kw_only=True)
class Named:
    """A candidate and where it comes from."""

    name: str
    config: Candidate

    @property
    def unmodified(self) -> bool:
        """Whether it is the model as it is: nothing to route, nothing to time."""
        return self.config.policy == UNMODIFIED

    def to_dict(self) -> dict[str, Any]:
        """For result files."""
        return {"name": self.name, "config": self.config.to_dict()}


def find_candidates(
    folder: Path, *, max_degradation: float, at_most: int, top_k: int
) -> list[Named]:
    """The tuner's choice and safer configurations of its front, at most so many.

    Of the points that the search believes to keep the bound, those whose degradations are
    spread most evenly. Without a front, milder settings stand beside the tuner's choice.

    Raises:
        UsageError: the folder holds no configuration, or a file of it is damaged.
    """
    best, front = folder / CONFIG_FILE, folder / PARETO_FILE
    chosen = [Named(name="best", config=load_candidate(best))] if best.is_file() else []
    if front.is_file():
        rows = _front_rows(front)
        chosen += _spread(rows, max_degradation, at_most - len(chosen), source=front)
    elif chosen:
        chosen += _milder(chosen[0].config, top_k)
    elif (folder / NEAREST_MISS_FILE).is_file():
        chosen = [Named(name="nearest miss", config=load_candidate(folder / NEAREST_MISS_FILE))]
        chosen += _milder(chosen[0].config, top_k)
    if not chosen:
        raise UsageError(
            f"{folder}: neither {PARETO_FILE} nor {CONFIG_FILE}; expected the results folder of "
            "`var-moe tune`"
        )
    return _distinct([Named(name=one.name, config=one.config.per_document()) for one in chosen])[
        :at_most
    ]


def _front_rows(path: Path) -> list[Mapping[str, Any]]:
    saved = read_json(path, what="front of a search")
    if not isinstance(saved, dict) or saved.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(f"{path}: not a front of schema {SCHEMA_VERSION}; run the search again")
    rows = saved.get("points")
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and {"config", "degradation"} <= set(row) for row in rows
    ):
        raise UsageError(f"{path}: expected 'points' with 'config' and 'degradation'")
    return rows


def _spread(
    rows: Sequence[Mapping[str, Any]], bound: float, at_most: int, *, source: Path
) -> list[Named]:
    """Points below the bound at evenly spaced degradations; the safest where none is below."""
    ordered = sorted(rows, key=lambda row: float(row["degradation"]))
    below = [row for row in ordered if row["degradation"] < bound] or ordered[:1]
    values = np.array([float(row["degradation"]) for row in below])
    kept: list[int] = []
    if len(below):
        targets = np.linspace(values[0], values[-1], max(1, at_most))
        kept = sorted({int(np.abs(values - target).argmin()) for target in targets})
    return [
        Named(
            name=str(below[at].get("name") or f"front {at + 1}"),
            config=Candidate.from_dict(below[at]["config"], source=str(source)),
        )
        for at in kept[: max(0, at_most)]
    ]


def _milder(config: Candidate, top_k: int) -> list[Named]:
    """The same configuration turned down, where its policy can be."""
    turned = {
        strength: config.spec.load().milder(config.settings, strength, top_k) for strength in SAFER
    }
    return [
        Named(name=f"safer {strength:g}", config=replace(config, settings=settings))
        for strength, settings in turned.items()
        if settings is not None
    ]


def _distinct(candidates: Sequence[Named]) -> list[Named]:
    found: dict[str, Named] = {}
    for one in candidates:
        found.setdefault(json.dumps(one.config.to_dict(), sort_keys=True), one)
    return list(found.values())
