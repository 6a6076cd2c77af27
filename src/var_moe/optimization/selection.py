"""Which evaluation wins, which are worth another look, and whether the search is done."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from var_moe.optimization.results import Evaluation, OptimizationResult
from var_moe.optimization.search_space import point_key

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


def top_candidates(result: OptimizationResult, n: int = 5) -> list[Evaluation]:
    """What deserves a larger measurement, by speedup descending (else by score).

    Up to `n` distinct feasible evaluations, and up to `n` that miss the bound by no more
    than two standard errors of their degradation: on more text they may well be feasible.
    An infeasible evaluation counts with its predicted speedup where none was measured.
    Evaluations that decided alike (equal perplexity, experts per token and tiers, as when
    only a time to live differs that never expired) count once.
    """
    complete = [e for e in result.evaluations if not e.failed and e.score is not None]
    feasible = _distinct_by_pace([e for e in complete if e.eligible])[:n]
    near = _distinct_by_pace([e for e in complete if _is_near(e, result.max_degradation)])[:n]
    return sorted([*feasible, *near], key=pace, reverse=True)


def pace(evaluation: Evaluation) -> float:
    """What orders candidates: the measured speedup, else the predicted one, else the score."""
    for value in (evaluation.speedup, evaluation.predicted_speedup, evaluation.score):
        if value is not None and math.isfinite(value):
            return value
    return -math.inf


def _is_near(evaluation: Evaluation, bound: float | None) -> bool:
    if evaluation.feasible is not False or bound is None:
        return False
    if evaluation.degradation is None or evaluation.degradation_se is None:
        return False
    return evaluation.degradation <= bound + 2 * evaluation.degradation_se


def _distinct_by_pace(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    kept: dict[Hashable, Evaluation] = {}
    for evaluation in sorted(evaluations, key=pace, reverse=True):
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
