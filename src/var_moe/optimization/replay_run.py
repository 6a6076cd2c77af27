"""`tune` by replay: the trace, the search, and what it leaves besides the best configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from var_moe.evaluation.compare import Evaluator, Progress
from var_moe.optimization.front import FrontPoint, feasible_front, save_front, to_verify
from var_moe.optimization.journal import JOURNAL_NAME
from var_moe.optimization.objective import VARObjective
from var_moe.optimization.remeasure import Measured, measure
from var_moe.optimization.replay_forecast import ReplayForecaster, make_forecaster
from var_moe.optimization.replay_search import Forecasts, ReplayPlan, replay_search
from var_moe.optimization.results import OptimizationResult
from var_moe.optimization.search_space import Params, SearchSpace, grid_points


@dataclass(frozen=True, kw_only=True)
class ReplaySearch:
    """A finished search by replay."""

    result: OptimizationResult
    front: list[FrontPoint]
    forecaster: ReplayForecaster
    forecast_count: int


def search_by_replay(
    objective: VARObjective,
    space: SearchSpace,
    *,
    n_calls: int,
    n_points: int | None,
    data: Mapping[str, str],
    folder: Path,
    progress: Progress | None,
    options: Mapping[str, Any],
) -> ReplaySearch:
    """Trace the search's text, then search; evaluations end early where they are futile.

    Args:
        objective: its evaluator's text is traced and scored.
        space: search space.
        n_calls: full evaluations.
        n_points: values per dimension of a grid to choose from; None searches freely.
        data: ``dataset`` and ``data_hash``, for the trace's head.
        folder: results folder.
        progress: called with a stage's name, steps done and in all.
        options: further arguments of `replay_search`.
    """
    forecaster = make_forecaster(
        objective,
        folder=folder,
        resume=bool(options.get("resume")),
        progress=progress,
        **data,
    )
    objective.stop_early = True
    forecasts = Forecasts(forecaster)
    points: list[Params] | None = None if n_points is None else list(grid_points(space, n_points))
    result = replay_search(
        objective,
        forecasts,
        space,
        n_calls,
        journal=folder / JOURNAL_NAME,
        points=points,
        **options,
    )
    plan = ReplayPlan(
        space,
        forecasts,
        bound=objective.max_degradation,
        seed=result.seed or 0,
        points=points,
    )
    tried = [one.params for one in result.evaluations if not one.failed]
    candidates = [*plan.pool, *tried]
    front = feasible_front(
        candidates, forecasts.of(candidates), plan.correction(result.evaluations)
    )
    return ReplaySearch(
        result=result, front=front, forecaster=forecaster, forecast_count=len(forecasts)
    )


def verify_front(
    search: ReplaySearch,
    evaluator: Evaluator,
    objective: VARObjective,
    measured: Sequence[Measured],
    *,
    blocks: int,
) -> list[Measured]:
    """Measure points of the front that lie far from what is measured already."""
    known = [one.config for one in measured]
    found = []
    for point in to_verify(search.front, objective.max_degradation):
        config = objective.config(point.params)
        if config not in known:
            name = f"front ({100 * point.degradation:.2f}%)"
            found.append(
                measure(evaluator, objective, config, name=name, blocks=blocks, always_time=True)
            )
    return found


def replay_metadata(search: ReplaySearch) -> dict[str, Any]:
    """What the metadata say of a search by replay."""
    cost, trace = search.forecaster.cost, search.forecaster.replay.trace
    return {
        "forecasts": search.forecast_count,
        "traced_tokens": trace.tokens,
        "cost_model_error_relative": cost.error,
    }


__all__ = [
    "ReplaySearch",
    "replay_metadata",
    "save_front",
    "search_by_replay",
    "verify_front",
]
