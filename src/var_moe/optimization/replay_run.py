"""`tune` by replay: the trace, the search, and what it leaves besides the best configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from var_moe.evaluation.evaluator import Evaluator, Progress
from var_moe.optimization.forecast import (
    Forecast,
    ForecastGrid,
    TraceForecaster,
    make_forecaster,
)
from var_moe.optimization.front import FrontPoint, feasible_front, to_verify
from var_moe.optimization.measure_again import Measured, measure
from var_moe.optimization.methods import replay_search
from var_moe.optimization.objective import PolicyObjective
from var_moe.optimization.replay_sampler import Forecasts, ReplaySampler, pool_points
from var_moe.optimization.results import OptimizationResult
from var_moe.optimization.search_space import Params, SearchSpace, dimensions, is_config_space


@dataclass(frozen=True, kw_only=True)
class ReplaySearch:
    """A finished search by replay."""

    result: OptimizationResult
    front: list[FrontPoint]
    forecaster: TraceForecaster
    sampler: ReplaySampler
    forecast_count: int


def search_by_replay(
    objective: PolicyObjective,
    space: SearchSpace,
    *,
    n_calls: int | None,
    n_points: int | None,
    data: Mapping[str, str],
    folder: Path,
    progress: Progress | None,
    options: Mapping[str, Any],
    shared: Path | None = None,
) -> ReplaySearch:
    """Trace the search's text, then search; evaluations end early where they are futile.

    Args:
        objective: its evaluator's text is traced and scored.
        space: search space.
        n_calls: full evaluations; None leaves it to a search that is resumed.
        n_points: values per dimension of a grid to choose from; None searches freely.
        data: ``dataset`` and ``data_hash``, for the trace's head.
        folder: results folder.
        progress: called with a stage's name, steps done and in all.
        options: further arguments of `replay_search`.
        shared: folder of the trace and the cost model, where searches share them; by default the
            results folder. A cost model that lies there is taken as it is.
    """
    forecaster = make_forecaster(
        objective,
        folder=shared or folder,
        resume=bool(options.get("resume")) or shared is not None,
        progress=progress,
        **data,
    )
    forecasts = Forecasts(forecaster)
    points: list[Params] | None = None
    if n_points is not None:
        points = _learn_grid(forecasts, forecaster.grid(space, n_points, progress), space)
    if points is None and not is_config_space(space):
        # Before the search, whose own display could not stand beside that of the forecasts.
        pool = pool_points(space, seed=0)
        forecasts.learn(pool, forecaster.forecast(pool, progress))
    result = replay_search(
        objective,
        forecasts,
        space,
        n_calls,
        points=points,
        **options,
    )
    sampler = ReplaySampler(
        space,
        forecasts,
        bound=objective.max_degradation,
        seed=result.seed or 0,
        points=points,
    )
    tried = [one.params for one in result.evaluations if not one.failed]
    candidates = [*sampler.pool, *tried]
    front = feasible_front(
        candidates, forecasts.of(candidates), *sampler.predict(candidates, result.evaluations)
    )
    return ReplaySearch(
        result=result,
        front=front,
        forecaster=forecaster,
        sampler=sampler,
        forecast_count=len(forecasts),
    )


def _learn_grid(forecasts: Forecasts, grid: ForecastGrid, space: SearchSpace) -> list[Params]:
    """All points of a grid, which are forecast already."""
    names = [d.name for d in dimensions(space)]
    whole = [grid.point(number) for number in range(grid.size)]
    points = [{name: point[name] for name in names} for point in whole]
    forecasts.learn(points, [_forecast(grid, number) for number in range(grid.size)])
    return points


def _forecast(grid: ForecastGrid, number: int) -> Forecast:
    row = grid.row(number)
    return Forecast(**{field.name: row[field.name] for field in fields(Forecast)})


def verify_front(
    search: ReplaySearch,
    evaluator: Evaluator,
    objective: PolicyObjective,
    measured: Sequence[Measured],
    *,
    blocks: int,
    done: list[Measured],
) -> None:
    """Measure points of the front that lie far from what is measured already, into ``done``."""
    known = [one.config for one in measured]
    for point in to_verify(search.front, objective.max_degradation):
        config = objective.candidate(point.params)
        if config not in known:
            name = f"front ({100 * point.degradation:.2f}%)"
            done.append(
                measure(evaluator, objective, config, name=name, blocks=blocks, always_time=True)
            )


def replay_metadata(search: ReplaySearch) -> dict[str, Any]:
    """What the metadata say of a search by replay."""
    cost, trace = search.forecaster.cost, search.forecaster.trace
    return {
        "forecasts": search.forecast_count,
        "traced_tokens": trace.tokens,
        "cost_model_error_relative": cost.error,
    }


__all__ = [
    "ReplaySearch",
    "replay_metadata",
    "search_by_replay",
    "verify_front",
]
