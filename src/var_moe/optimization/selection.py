"""Which evaluation wins, which are worth another look, and whether the search is done."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from var_moe.optimization.results import Evaluation
from var_moe.optimization.search_space import point_key

Z_95 = 1.645  # one-sided
CONVERGENCE_WINDOW = 10
CONVERGENCE_GAIN = 0.005


def best_evaluation(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The feasible evaluation with the highest score, the earliest of equals; None without any."""
    eligible = [e for e in evaluations if e.eligible]
    return max(eligible, key=_score, default=None)


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
    """How fast it should be: by its executed pairs, else as measured, else the score."""
    if evaluation.experts_per_token is not None:
        # Not by the speedup that they predict: where an expert costs less than timing it can tell,
        # that would put more of them first.
        return -evaluation.experts_per_token
    for value in (evaluation.predicted_speedup, evaluation.speedup, evaluation.score):
        if value is not None and math.isfinite(value):
            return value
    return -math.inf


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
