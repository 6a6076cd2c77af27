"""`tune` by replay: traces of the search's text, forecasts from them, the search and its front."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from var_moe.errors import UsageError
from var_moe.evaluation.cost import CostModel, fit_cost_model
from var_moe.evaluation.evaluator import Progress
from var_moe.optimization.forecast import Floats, Forecast, ForecastGrid
from var_moe.optimization.methods import SearchOptions, replay_search
from var_moe.optimization.objective import PolicyObjective
from var_moe.optimization.preparation import PreparedSearch
from var_moe.optimization.replay_sampler import Forecasts, ReplaySampler, pool_points, shares_work
from var_moe.optimization.results import OptimizationResult
from var_moe.optimization.search_space import (
    COMPENSATION,
    Params,
    SearchSpace,
    check_grid,
    dimensions,
    stand_in_of,
)
from var_moe.optimization.selection import FrontPoint, feasible_front
from var_moe.optimization.settings import TuneSettings, not_replayable
from var_moe.storage import atomic_write_json, read_json
from var_moe.tracing.policies import Replayer, replayer_of
from var_moe.tracing.record import record_trace
from var_moe.tracing.trace import RoutingTrace

TRACE_FOLDER, COST_FILE = "trace", "cost_model.json"


class TraceForecaster:
    """Forecasts points of a policy's search space by replaying traces.

    Args:
        traces: of the text that full evaluations score, with damages: by the name of the
            compensation that they were recorded with, the one of points that name none last.
        cost: cost model of the machine and model.
        policy: name in the registry.
        calibrations: by the same names, what the policy may ask for, as
            `RoutingProfile.calibration` gives it.
        fixed: settings that no point changes, such as VAR's mode.
        decided: whether the cost model was fitted with the policy's own decisions, which then
            count, as does what stands in for dropped experts.

    Raises:
        UsageError: no such policy, or a trace has no damages.
    """

    def __init__(
        self,
        traces: Mapping[str, RoutingTrace],
        cost: CostModel,
        *,
        policy: str,
        calibrations: Mapping[str, Mapping[str, Any]],
        fixed: Mapping[str, Any] | None = None,
        decided: bool = False,
    ) -> None:
        if not all(trace.damage for trace in traces.values()):
            raise UsageError("a search by replay needs a trace with damages; record it with them")
        self.cost, self._policy = cost, policy
        self._fixed, self._decided = dict(fixed or {}), decided
        self._replayers: dict[str, Replayer] = {
            name: replayer_of(trace, policy, calibrations[name]) for name, trace in traces.items()
        }
        *_, (self._default, self.trace) = traces.items()

    def forecast(
        self, points: Sequence[Params], progress: Progress | None = None
    ) -> list[Forecast]:
        """In the order of ``points``; ``progress`` is called with a stage, points done, in all.

        Raises:
            UsageError: a replay can't tell what the policy's decisions cost.
        """
        forecasts: dict[int, Forecast] = {}
        names = [stand_in_of(point) or self._default for point in points]
        for name in dict.fromkeys(names):
            own = [number for number, other in enumerate(names) if other == name]
            settings = [self._settings(points[number]) for number in own]
            shown = progress and _shifted(progress, len(forecasts), len(points))
            for number, one in zip(own, self._replayers[name].replay(settings, shown), strict=True):
                if one.degradation is None:
                    raise UsageError(not_replayable(self._policy))
                residual = self._decided and one.adds_residual
                speedup = self.cost.speedup(one.report, decided=self._decided, residual=residual)
                figures = {name: getattr(one.report, name) for name in _REPORTED}
                forecasts[number] = Forecast(
                    degradation=one.degradation, speedup=speedup, **figures
                )
        return [forecasts[number] for number in range(len(points))]

    def grid(
        self, space: SearchSpace, n_points: int = 5, progress: Progress | None = None
    ) -> ForecastGrid:
        """All combinations of evenly spaced values, one axis per setting."""
        count = check_grid(space, n_points)
        values = {d.name: tuple(d.grid(count)) for d in dimensions(space)}

        def speedups(pairs: NDArray[np.int64], residual: bool) -> Floats:
            return self.cost.speedups(
                pairs,
                tokens=self.trace.tokens,
                decided=self._decided,
                residual=self._decided and residual,
            )

        replayer = self._replayers[self._default]
        columns = replayer.grid(values, self._fixed, speedups=speedups, progress=progress)
        if "degradation" not in columns:
            raise UsageError(not_replayable(self._policy))
        return ForecastGrid(values=values, columns=columns)

    def _settings(self, point: Params) -> dict[str, Any]:
        own = {name: value for name, value in point.items() if name != COMPENSATION}
        return {**self._fixed, **own}


_REPORTED = ("experts_per_token", "fast_pct", "cached_pct", "learned_pct")


def _shifted(progress: Progress, done: int, total: int) -> Progress:
    return lambda stage, more, _of: progress(stage, done + more, total)


def trace_folder(folder: Path, compensation: str = "") -> Path:
    """Where a results folder holds a trace: that of its best compensation, or of another one."""
    return folder / (f"{TRACE_FOLDER}_{compensation}" if compensation else TRACE_FOLDER)


def make_forecaster(
    objective: PolicyObjective,
    *,
    dataset: str,
    data_hash: str,
    folder: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> TraceForecaster:
    """Trace the text of the objective's evaluator, fit the cost model, and put both in ``folder``.

    Each compensation has a trace of its own: the best in ``trace``, others beside it. An
    interrupted trace goes on there; with ``resume`` the cost model that lies there is taken, so
    that the choices of an interrupted search go on as they were.
    """
    evaluator = objective.evaluator
    calibrations = {name or "none": objective.calibration(name) for name in objective.compensations}
    *_, best = calibrations
    looks = "damage" in objective.default.needs

    def recorded(name: str, calibration: Mapping[str, Any]) -> RoutingTrace:
        what = "tracing the router" + (f" ({name})" if len(calibrations) > 1 else "")
        return record_trace(
            evaluator.loaded,
            evaluator.documents,
            dataset=dataset,
            data_hash=data_hash,
            folder=None if folder is None else trace_folder(folder, "" if name == best else name),
            # What VAR can be replayed on is recorded once.
            profile=objective.profile if name == best else None,
            stored=name == best,
            compensation=calibration.get("compensation"),
            predictor=calibration["damage"] if looks else None,
            tokens_per_batch=evaluator.tokens_per_batch,
            progress=(lambda done, total: progress(what, done, total)) if progress else None,
        )

    if folder is not None:
        for old in folder.glob(f"{TRACE_FOLDER}_*"):  # an earlier search's, of other compensations
            if old not in [trace_folder(folder, name) for name in calibrations if name != best]:
                shutil.rmtree(old)
    traces = {name: recorded(name, calibration) for name, calibration in calibrations.items()}
    saved = None if folder is None else folder / COST_FILE
    if resume and saved is not None and saved.is_file():
        cost = CostModel.from_dict(read_json(saved, what="cost model"), source=str(saved))
    else:
        var_all, var_leading = evaluator.cost_policies or (None, None)
        if progress:
            progress("timing forwards for the cost model", 0, 1)
        cost = fit_cost_model(evaluator, var_all=var_all, var_leading=var_leading)
        if progress:
            progress("timing forwards for the cost model", 1, 1)
    if saved is not None:
        atomic_write_json(saved, cost.to_dict())
    return TraceForecaster(
        traces,
        cost,
        policy=objective.default.policy,
        calibrations=calibrations,
        fixed=objective.fixed,
        decided=evaluator.cost_policies is not None,
    )


@dataclass(frozen=True, kw_only=True)
class ReplaySearch:
    """A finished search by replay, with what its metadata say of it."""

    result: OptimizationResult
    front: list[FrontPoint]
    sampler: ReplaySampler
    metadata: dict[str, Any]


def search_by_replay(
    ready: PreparedSearch,
    settings: TuneSettings,
    n_calls: int | None,
    options: SearchOptions,
    *,
    progress: Progress | None,
    verbose: bool,
) -> ReplaySearch:
    """Trace the search's text, then search.

    Where searches share a folder, the trace and the cost model lie there, and a cost model that
    does is taken as it is. With None for ``n_calls``, a resumed search has as many as before.
    """
    objective, space = ready.objective, ready.space
    forecaster = make_forecaster(
        objective,
        dataset=settings.dataset,
        data_hash=ready.validation.data_hash,
        folder=settings.preparations,
        resume=settings.resume or settings.shared is not None,
        progress=progress,
    )
    forecasts = Forecasts(forecaster)
    points: list[Params] | None = None
    if settings.method == "grid":
        points = _learn_grid(forecasts, forecaster.grid(space, settings.points, progress))
    elif not shares_work(space):
        # Before the search, whose own display could not stand beside that of the forecasts.
        pool = pool_points(space, seed=0)
        forecasts.learn(pool, forecaster.forecast(pool, progress))
    result = replay_search(objective, forecasts, space, n_calls, verbose, points=points, **options)
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
    metadata = {
        "forecasts": len(forecasts),
        "traced_tokens": forecaster.trace.tokens,
        "cost_model_error_relative": forecaster.cost.error,
    }
    return ReplaySearch(result=result, front=front, sampler=sampler, metadata=metadata)


def _learn_grid(forecasts: Forecasts, grid: ForecastGrid) -> list[Params]:
    """All points of a grid, which are forecast already."""
    points = [grid.point(number) for number in range(grid.size)]
    names = [field.name for field in fields(Forecast)]
    columns = [grid.columns[name].ravel().tolist() for name in names]
    made = [Forecast(**dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)]
    forecasts.learn(points, made)
    return points
