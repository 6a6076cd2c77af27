"""What a search can optimise, and one evaluation of it that never ends the search.

Any callable that takes a dict of parameters and returns a score will do. A rich objective
also has ``evaluate(params) -> Evaluation`` and ``max_degradation``, and is used through
them: the search then sees the constraint and the speedup behind the score.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, Protocol, TypeAlias, runtime_checkable

from var_moe.errors import UsageError
from var_moe.optimization.results import FAILED, Evaluation

_LOG = logging.getLogger(__name__)
_ERROR_LENGTH = 500

LEARNED_TARGET_PCT = 15.0
INFEASIBLE_PENALTY = -100.0

BareObjective: TypeAlias = Callable[[dict[str, Any]], float]


@runtime_checkable
class RichObjective(Protocol):
    """An objective that knows its constraint; `create_objective_function` returns one."""

    max_degradation: float

    def __call__(self, params: dict[str, Any], /) -> float:
        """The documented score."""
        ...

    def evaluate(self, params: dict[str, Any], /) -> Evaluation:
        """Everything measured; degradation is required, speedup where it is feasible, and
        predicted_speedup where it is not."""
        ...


Objective: TypeAlias = BareObjective | RichObjective


def documented_score(
    *, degradation: float, max_degradation: float, speedup: float | None, learned_pct: float
) -> float:
    """The documented score of a configuration.

    ``-100 * (1 + degradation)`` over the bound, else ``speedup + max(0, (15 - learned_pct) /
    100)``; `speedup` is not looked at over the bound.
    """
    if not degradation <= max_degradation:
        return INFEASIBLE_PENALTY * (1 + degradation)
    if speedup is None:
        raise ValueError("documented_score: a feasible configuration needs its speedup")
    return speedup + max(0.0, (LEARNED_TARGET_PCT - learned_pct) / 100)


def bound_of(objective: Objective) -> float | None:
    """The rich objective's bound on the degradation; None for a bare callable."""
    if not callable(objective):
        raise UsageError(f"objective_fn = {objective!r}: expected a callable of a dict")
    if not isinstance(objective, RichObjective):
        return None
    bound = float(objective.max_degradation)
    if not math.isfinite(bound) or bound < 0:
        raise UsageError(f"objective_fn.max_degradation = {bound}: expected a number of at least 0")
    return bound


def check_bound(value: float) -> float:
    """A degradation bound that can be met.

    Raises:
        UsageError: it is negative, not finite, or no number.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
        raise UsageError(
            f"max_degradation = {value!r}: expected a number of at least 0 (0.01 allows 1%)"
        )
    return float(value)


def check_robust(robust: bool, dataset: str) -> None:
    """Refuse to judge the worst of one data set.

    Raises:
        UsageError: ``robust`` with one data set.
    """
    from var_moe.data.text import names_of

    if robust and len(names_of(dataset)) < 2:
        raise UsageError(
            f"--robust judges the worst of several data sets, and {dataset!r} is one; give "
            "--dataset a,b"
        )


def run_evaluation(objective: Objective, params: Mapping[str, Any]) -> Evaluation:
    """Evaluate one point, its wall time included.

    An exception or a result that is not finite gives a failed Evaluation with the reason.
    What is no `Exception` (KeyboardInterrupt, SystemExit) passes through.
    """
    started = time.perf_counter()
    try:
        evaluation = _evaluate(objective, dict(params))
    except Exception as error:
        _LOG.debug("evaluation of %s failed", dict(params), exc_info=True)
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:_ERROR_LENGTH]
        evaluation = Evaluation(params=dict(params), state=FAILED, error=reason)
    # The point is the one asked for, even if the objective changed its dict.
    return evaluation.replace(params=dict(params), seconds=time.perf_counter() - started)


def _evaluate(objective: Objective, params: dict[str, Any]) -> Evaluation:
    if isinstance(objective, RichObjective):
        return _checked(objective.evaluate(params), bound_of(objective) or 0.0)
    score = objective(params)
    if score is None:
        raise TypeError("the objective returned None; expected a number")
    if not math.isfinite(float(score)):
        raise ValueError(f"score = {float(score)}, which is not finite")
    return Evaluation(params=params, score=float(score))


def _checked(evaluation: Evaluation, bound: float) -> Evaluation:
    """A rich objective's evaluation, failed where what the search needs is not finite."""
    if evaluation.failed:
        return evaluation.replace(score=None, error=evaluation.error or "no reason given")
    for name in ("score", "degradation"):
        value = getattr(evaluation, name)
        if value is None or not math.isfinite(value):
            return evaluation.replace(
                score=None, state=FAILED, error=f"{name} = {value}, which is not finite"
            )
    feasible = evaluation.degradation is not None and evaluation.degradation <= bound
    if feasible and not _is_finite(evaluation.speedup):
        return evaluation.replace(
            score=None, state=FAILED, error=f"speedup = {evaluation.speedup} of a feasible point"
        )
    return evaluation.replace(feasible=feasible)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
