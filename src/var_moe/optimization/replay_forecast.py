"""Forecasts from a trace, a profile and a cost model: of VAR configurations, or of a policy."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from var_moe.config import VARConfig
from var_moe.errors import UsageError
from var_moe.evaluation.cost import CostModel, fit_cost_model
from var_moe.evaluation.evaluator import Progress
from var_moe.optimization.forecast import Forecast, TraceForecaster
from var_moe.optimization.forecast_grid import ForecastGrid, forecast_grid, grid_values
from var_moe.optimization.policy_objective import PolicyObjective, StandIn
from var_moe.optimization.search_space import SEARCH_SPACE, Params, SearchSpace
from var_moe.storage import atomic_write_json, read_json
from var_moe.tracing.record import record_trace
from var_moe.tracing.replay import Replay, TraceReplay
from var_moe.tracing.trace import RoutingTrace

TRACE_FOLDER, COST_FILE = "trace", "cost_model.json"


class ReplayForecaster:
    """Forecasts VAR's six thresholds by replaying a trace.

    Args:
        replay: the trace of the text that full evaluations score, with damages.
        cost: cost model of the machine and model.
        mode: VAR's mode.
    """

    def __init__(self, replay: TraceReplay, cost: CostModel, *, mode: str = "verified") -> None:
        if not replay.trace.damage:
            raise UsageError("a search by replay needs a trace with damages; record it with them")
        self.replay, self.cost, self.mode = replay, cost, mode

    @property
    def trace(self) -> RoutingTrace:
        """What is replayed."""
        return self.replay.trace

    def config(self, point: Params) -> VARConfig:
        """The configuration that a point stands for."""
        return VARConfig.from_dict({"mode": self.mode, **point})

    def forecast(self, points: Sequence[Params]) -> list[Forecast]:
        """In the order of ``points``."""
        found = self.replay.evaluate_many([self.config(point) for point in points])
        return [self.of(one) for one in found]

    def grid(
        self, space: SearchSpace = SEARCH_SPACE, n_points: int = 5, progress: Progress | None = None
    ) -> ForecastGrid:
        """All combinations of evenly spaced values, as columns."""
        values = grid_values(space, n_points)
        return forecast_grid(self.replay, values, cost=self.cost, mode=self.mode, progress=progress)

    def of(self, replay: Replay) -> Forecast:
        """The forecast of one replayed configuration."""
        report, residual = replay.report, replay.config.uses_residuals
        return Forecast(
            degradation=replay.degradation,
            speedup=self.cost.speedup(report, decided=True, residual=residual),
            experts_per_token=report.experts_per_token,
            fast_pct=report.fast_pct,
            cached_pct=report.cached_pct,
            learned_pct=report.learned_pct,
        )


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
    """Trace the objective's text, fit the cost model, and put both in ``folder``.

    Each compensation has a trace of its own: the best in ``trace``, others beside it.

    Args:
        objective: its evaluator's text is traced; VAR's, or another policy's.
        dataset, data_hash: of that text, for the trace's head.
        folder: results folder; an interrupted trace goes on there.
        resume: take the cost model that an interrupted search left, so that its choices go on as
            they were.
        progress: called with a stage's name, tokens done and in all.
    """
    evaluator = objective.evaluator
    stand_ins = objective.compensations
    *_, best = stand_ins

    def recorded(name: str, stand_in: StandIn) -> RoutingTrace:
        what = "tracing the router" + (f" ({name})" if len(stand_ins) > 1 else "")
        return record_trace(
            evaluator.loaded,
            evaluator.documents,
            dataset=dataset,
            data_hash=data_hash,
            folder=None if folder is None else trace_folder(folder, "" if name == best else name),
            # What VAR can be replayed on is taken once.
            profile=objective.profile if name == best else None,
            stored=name == best,
            compensation=stand_in.compensation,
            predictor=stand_in.predictor,
            tokens_per_batch=evaluator.tokens_per_batch,
            progress=(lambda done, total: progress(what, done, total)) if progress else None,
        )

    if folder is not None:
        for old in folder.glob(f"{TRACE_FOLDER}_*"):  # an earlier search's, of other compensations
            if old not in [trace_folder(folder, name) for name in stand_ins if name != best]:
                shutil.rmtree(old)
    traces = {name: recorded(name, stand_in) for name, stand_in in stand_ins.items()}
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
    return objective.forecaster(traces, cost)


__all__ = ["COST_FILE", "TRACE_FOLDER", "ReplayForecaster", "make_forecaster", "trace_folder"]
