"""Which candidate wins, which are worth another look, and the front of all that may win.

The front is speedup against degradation, from the safest configuration to the fastest. Most of its
points are forecasts, corrected by the full evaluations; some are verified: measured on text that
was not searched on. ``pareto.json`` keeps them, to answer another bound without a new search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from var_moe.config import check_bound
from var_moe.errors import UsageError
from var_moe.optimization.candidate import Candidate
from var_moe.optimization.forecast import Floats, Forecast, non_dominated
from var_moe.optimization.results import INFEASIBLE_PENALTY, Evaluation, documented_score
from var_moe.optimization.search_space import Params, point_key
from var_moe.storage import (
    SCHEMA_VERSION,
    atomic_write_json,
    entries_of,
    jsonable,
    provenance,
    read_json,
)

if TYPE_CHECKING:
    from var_moe.evaluation.evaluator import Quality, Speed

Z_95 = 1.645  # one-sided
CONVERGENCE_WINDOW, CONVERGENCE_GAIN = 10, 0.005

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What decides whether one measured candidate wins over another; None is not known.

    Args:
        keeps_bound: whether it may win at all. In a search the degradation itself must be within
            the bound; measured again, on text that was not searched on, its 95% upper bound.
        experts_per_token: executed.
        degradation_upper: 95% upper bound of the degradation.
        score: the documented score, or that of a bare callable.
    """

    keeps_bound: bool
    experts_per_token: float | None = None
    degradation_upper: float | None = None
    score: float | None = None

    @property
    def promise(self) -> float:
        """How fast it should be, higher is faster: by its executed pairs, else the score.

        Not by the measured speedup: on a disturbed machine a few timed blocks would choose the
        luckiest. Executed pairs are known exactly, and are what saves time.
        """
        if self.experts_per_token is not None:
            return -self.experts_per_token
        if self.score is not None and math.isfinite(self.score):
            return self.score
        return -math.inf

    @property
    def safety(self) -> float:
        """Higher is safer: minus the upper bound of the degradation."""
        return 0.0 if self.degradation_upper is None else -self.degradation_upper


@dataclass(frozen=True, kw_only=True)
class Remeasured:
    """A configuration measured again, on more text and with more blocks."""

    name: str
    config: Candidate
    quality: Quality
    speed: Speed | None  # None where the bound is broken: it can't win
    max_degradation: float

    @property
    def passed(self) -> bool:
        """Whether the upper bound of the degradation is below the limit."""
        return self.quality.judged.upper < self.max_degradation

    @property
    def score(self) -> float:
        """The documented score, with the upper bound as the degradation."""
        upper = self.quality.judged.upper
        if not self.passed or self.speed is None:
            return INFEASIBLE_PENALTY * (1 + upper)
        return documented_score(
            degradation=upper,
            max_degradation=self.max_degradation,
            speedup=self.speed.speedup.median,
            learned_pct=self.quality.report.learned_pct,
        )

    @property
    def standing(self) -> Standing:
        """What decides whether it wins."""
        return Standing(
            keeps_bound=self.passed and self.speed is not None,
            experts_per_token=self.quality.report.experts_per_token,
            degradation_upper=self.quality.judged.upper,
            score=self.score,
        )

    def to_dict(self) -> dict[str, Any]:
        """For result files."""
        return {
            "name": self.name,
            "config": self.config.to_dict(),
            "passed": self.passed,
            **self.quality.to_dict(),
            **(self.speed.to_dict() if self.speed else {"speedup": None}),
        }


def winner(rows: Iterable[T], standing: Callable[[T], Standing]) -> T | None:
    """The one that wins; None where none keeps the bound.

    The one rule of the package, for a search's own best, the last measurement, a front's answer
    to another bound, and a certificate: of those that keep the bound, the one that runs the
    fewest experts per token; where these are not known, the one with the highest score. Of
    equals the one with the smallest upper bound of the degradation, then the first.
    """
    ranked = [(row, standing(row)) for row in rows]
    kept = [(row, one) for row, one in ranked if one.keeps_bound]
    best = max(kept, key=lambda pair: (pair[1].promise, pair[1].safety), default=None)
    return None if best is None else best[0]


def standing_of(evaluation: Evaluation) -> Standing:
    """How an evaluation of a search stands; it may win where it is `eligible`."""
    upper = evaluation.degradation
    if upper is not None:
        upper += Z_95 * (evaluation.degradation_se or 0.0)
    return Standing(
        keeps_bound=evaluation.eligible,
        experts_per_token=evaluation.experts_per_token,
        degradation_upper=upper,
        score=evaluation.score,
    )


def best_evaluation(evaluations: Iterable[Evaluation]) -> Evaluation | None:
    """The evaluation that wins by the rule of `winner`."""
    return winner(evaluations, standing_of)


def nearest_miss(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The evaluation with the smallest degradation; None where none has any."""
    known = [e for e in evaluations if not e.failed and e.degradation is not None]
    return min(known, key=lambda e: e.degradation or 0.0, default=None)


def has_converged(evaluations: Sequence[Evaluation]) -> bool:
    """Whether the last 10 evaluations brought no feasible gain above 0.5%.

    False where none before them was feasible: a search that has found nothing has not converged.
    """
    before = best_evaluation(evaluations[:-CONVERGENCE_WINDOW])
    last = best_evaluation(evaluations)
    if before is None or before.score is None or last is None or last.score is None:
        return False
    return last.score - before.score <= CONVERGENCE_GAIN * abs(before.score)


def promise(evaluation: Evaluation) -> float:
    """How fast it should be, whether or not it keeps the bound: see `Standing.promise`."""
    return standing_of(evaluation).promise


def distinct_evaluations(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """The most promising first; those that decided alike count once.

    Alike: equal perplexity, experts per token and tiers, as when only a time to live differs
    that never expired.
    """
    kept: list[Evaluation] = []
    seen: set[Hashable] = set()
    for evaluation in sorted(evaluations, key=promise, reverse=True):
        alike = {point_key(evaluation.params), _behaviour(evaluation)}
        if not alike & seen:
            kept.append(evaluation)
            seen |= alike
    return kept


def _behaviour(evaluation: Evaluation) -> Hashable:
    """What the model did with a point: to the last digit equal only for equal decisions."""
    outcome = (
        evaluation.perplexity,
        evaluation.experts_per_token,
        evaluation.fast_pct,
        evaluation.cached_pct,
        evaluation.learned_pct,
    )
    return point_key(evaluation.params) if None in outcome else outcome


PARETO_FILE = "pareto.json"
POINTS = 40
"""Of the front, about, at the most."""
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
) -> list[FrontPoint]:
    """The non-dominated points, the safest first, thinned to about `POINTS` of them.

    Args:
        points, forecasts: candidates.
        mean, deviation: (M,) of the logarithm of their degradation, corrected.
    """
    score = np.array([one.score for one in forecasts])
    front = non_dominated(mean, score)
    keep = np.unique(np.linspace(0, len(front) - 1, min(POINTS, len(front))).round().astype(int))
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
    """Write ``pareto.json``: the forecast points of a ``front``, and the ``measured`` ones.

    ``candidate`` is what a forecast point stands for; the safest come first.
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
                "speedup_95": one.speed and [one.speed.speedup.low, one.speed.speedup.high],
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
