"""The feasible front: speedup against degradation, from the safest configuration to the fastest.

Most of its points are forecasts, corrected by the full evaluations; some are verified, which means
measured on text that was not searched on. ``pareto.json`` keeps them, so that another bound can be
answered without a new search.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from var_moe.errors import UsageError
from var_moe.optimization.candidate import Candidate
from var_moe.optimization.forecast import Floats, Forecast, non_dominated
from var_moe.optimization.measure_again import Remeasured
from var_moe.optimization.objective_protocol import check_bound
from var_moe.optimization.results import jsonable
from var_moe.optimization.search_space import Params
from var_moe.optimization.selection import Z_95, Standing, winner
from var_moe.storage import SCHEMA_VERSION, atomic_write_json, entries_of, provenance, read_json

PARETO_FILE = "pareto.json"
POINTS = 40
VERIFIED_AT = (0.3, 0.6, 2.0, 4.0)
"""Multiples of the bound at which the front is verified besides the search's own candidates."""


@dataclass(frozen=True, kw_only=True)
class FrontPoint:
    """A configuration that no other is forecast to beat in both speedup and degradation."""

    params: Params
    forecast: Forecast
    degradation: float  # corrected
    upper: float  # one-sided 95% upper bound of the correction


def feasible_front(
    points: Sequence[Params],
    forecasts: Sequence[Forecast],
    mean: Floats,
    deviation: Floats,
    *,
    at_most: int = POINTS,
) -> list[FrontPoint]:
    """The non-dominated points, the safest first, thinned to about ``at_most`` of them.

    Args:
        points, forecasts: candidates.
        mean, deviation: (M,) of the logarithm of their degradation, corrected.
        at_most: points.
    """
    score = np.array([one.score for one in forecasts])
    front = non_dominated(mean, score)
    keep = np.unique(np.linspace(0, len(front) - 1, min(at_most, len(front))).round().astype(int))
    return [
        FrontPoint(
            params=dict(points[front[i]]),
            forecast=forecasts[front[i]],
            degradation=float(np.exp(mean[front[i]])),
            upper=float(np.exp(mean[front[i]] + Z_95 * deviation[front[i]])),
        )
        for i in keep.tolist()
    ]


def to_verify(front: Sequence[FrontPoint], bound: float) -> list[FrontPoint]:
    """The fastest points that should keep certain multiples of the bound."""
    chosen: dict[int, FrontPoint] = {}
    for multiple in VERIFIED_AT:
        safe = [number for number, point in enumerate(front) if point.upper <= multiple * bound]
        if safe:
            chosen[max(safe)] = front[max(safe)]
    return list(chosen.values())


def save_front(
    folder: Path,
    front: Sequence[FrontPoint],
    measured: Sequence[Remeasured],
    *,
    candidate: Callable[[Params], Candidate],
    max_degradation: float,
    identity: Mapping[str, Any],
) -> None:
    """Write ``pareto.json``: verified and forecast points, the safest first.

    Args:
        folder: results folder.
        front: forecast points.
        measured: verified ones.
        candidate: what a forecast point stands for.
        max_degradation: bound of the search.
        identity: what was searched on.
    """
    rows: list[dict[str, Any]] = [
        {
            "verified": False,
            "config": candidate(point.params).to_dict(),
            "degradation": point.degradation,
            "degradation_forecast_upper_95": point.upper,
            "speedup": point.forecast.speedup,
            **point.forecast.to_dict(),
        }
        for point in front
    ]
    for one in measured:
        change, report = one.quality.judged, one.quality.report
        rows.append(
            {
                "verified": True,
                "name": one.name,
                "config": one.config.to_dict(),
                "degradation": change.value,
                "degradation_standard_error": change.standard_error,
                "degradation_upper_95": change.upper,
                "speedup": one.speed.speedup.median if one.speed else None,
                "speedup_95": [one.speed.speedup.low, one.speed.speedup.high]
                if one.speed
                else None,
                "experts_per_token": report.experts_per_token,
                "fast_pct": report.fast_pct,
                "cached_pct": report.cached_pct,
                "learned_pct": report.learned_pct,
            }
        )
    rows.sort(key=lambda row: row["degradation"])
    atomic_write_json(
        folder / PARETO_FILE,
        jsonable(
            {
                "schema_version": SCHEMA_VERSION,
                "max_degradation": max_degradation,
                "identity": dict(identity),
                "points": rows,
                "provenance": provenance(),
            }
        ),
    )


def answer_from(
    folder: Path, max_degradation: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The best verified point of a finished search for another bound.

    Returns:
        The point that wins by the rule of `selection.winner`, and all points of the front.

    Raises:
        UsageError: the folder has no front, or no verified point keeps the bound; says which
            bound can be kept.
    """
    check_bound(max_degradation)
    path = Path(folder) / PARETO_FILE
    saved = read_json(path, what="front of a search by replay (`var-moe tune --method replay`)")
    if not isinstance(saved, dict) or saved.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(f"{path}: not a front of schema {SCHEMA_VERSION}; run the search again")
    with entries_of(path):
        points: list[dict[str, Any]] = saved.get("points") or []
        verified = [point for point in points if point.get("verified")]
        best = winner(
            verified,
            lambda point: Standing(
                keeps_bound=point["degradation_upper_95"] < max_degradation,
                experts_per_token=point["experts_per_token"],
                degradation_upper=point["degradation_upper_95"],
            ),
        )
        if best is None:
            least = min((point["degradation_upper_95"] for point in verified), default=None)
            can = "" if least is None else f"; the safest one keeps {100 * least:.2f}%"
            raise UsageError(
                f"{path}: no verified configuration keeps {100 * max_degradation:g}%{can}; "
                "search again with this --max_degradation"
            )
        Candidate.from_dict(best["config"], source=str(path))
    return best, points
