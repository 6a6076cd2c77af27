"""Which evaluation wins, which are worth another look, and whether the search is done."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from var_moe.optimization.results import Evaluation
from var_moe.optimization.search_space import point_key

Z_95 = 1.645  # one-sided
CONVERGENCE_WINDOW = 10
CONVERGENCE_GAIN = 0.005


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What decides whether one measured candidate wins over another.

    Args:
        keeps_bound: whether it may win at all. In a search the degradation itself must be within
            the bound; measured again, on text that was not searched on, its 95% upper bound.
        experts_per_token: executed pairs / (layers x tokens); None where it is not known.
        degradation_upper: 95% upper bound of the degradation; None where it is not known.
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


def highest_score(evaluations: Sequence[Evaluation]) -> float:
    """The highest score of all complete evaluations, feasible or not; NaN without any."""
    return max((_score(e) for e in evaluations if not e.failed), default=math.nan)


def nearest_miss(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The evaluation with the smallest degradation; None where none has any."""
    known = [e for e in evaluations if not e.failed and e.degradation is not None]
    return min(known, key=lambda e: e.degradation or 0.0, default=None)


def has_converged(
    evaluations: Sequence[Evaluation],
    *,
    window: int = CONVERGENCE_WINDOW,
    gain: float = CONVERGENCE_GAIN,
) -> bool:
    """Whether the last `window` evaluations brought no feasible gain above `gain`, relative.

    False with no evaluation before the window, and where none before it was feasible: a
    search that has found nothing has not converged.
    """
    before = best_evaluation(evaluations[:-window])
    last = best_evaluation(evaluations)
    if before is None or last is None:
        return False
    return _score(last) - _score(before) <= gain * abs(_score(before))


def promise(evaluation: Evaluation) -> float:
    """How fast it should be, whether or not it keeps the bound: see `Standing.promise`."""
    return standing_of(evaluation).promise


def distinct_evaluations(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """The most promising first; those that decided alike count once.

    Alike: equal perplexity, experts per token and tiers, as when only a time to live differs
    that never expired.
    """
    kept: dict[Hashable, Evaluation] = {}
    for evaluation in sorted(evaluations, key=promise, reverse=True):
        kept.setdefault(_behaviour(evaluation), evaluation)
    by_point: dict[Hashable, Evaluation] = {}
    for evaluation in kept.values():
        by_point.setdefault(point_key(evaluation.params), evaluation)
    return list(by_point.values())


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


def _score(evaluation: Evaluation) -> float:
    return math.nan if evaluation.score is None else evaluation.score
