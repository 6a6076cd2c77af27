"""Forecasts of any policy of the registry that cuts tokens to their first experts.

The policy's own code decides on the trace, and the recorded damages of those cuts add up to the
predicted degradation (`tracing.policies.evaluate_policy`). The cost model counts executed pairs and
expert calls. It counts no work of the policy's own: what it is fitted to drops pairs in the same
way, and deciding is cheap (0.5 to 1 ms of the demo's forward of 2,048 tokens, which takes 330 ms)
and much the same at any setting, so that it would not change which setting is best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from var_moe.errors import UsageError
from var_moe.evaluation.cost import CostModel
from var_moe.evaluation.evaluator import Progress
from var_moe.optimization.forecast import Forecast
from var_moe.optimization.forecast_grid import ForecastGrid
from var_moe.optimization.search_space import (
    COMPENSATION,
    Params,
    SearchSpace,
    check_count,
    dimensions,
    grid_points,
)
from var_moe.routing.registry import policy_spec
from var_moe.tracing.policies import evaluate_policy
from var_moe.tracing.trace import RoutingTrace

STAGE = "replaying the policy"


class PolicyForecaster:
    """Forecasts the settings of a policy by replaying a trace.

    Args:
        traces: of the text that full evaluations score, with damages: by the name of the
            compensation that they were recorded with, the one of points that name none last.
        cost: cost model of the machine and model.
        policy: name in the registry.
        calibrations: by the same names, what the policy may ask for, as
            `RoutingProfile.calibration` gives it.
        costly: whether the cost model was fitted with the policy's own decisions and compensation,
            which then count.

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
        costly: bool = False,
    ) -> None:
        if not all(trace.damage for trace in traces.values()):
            raise UsageError("a search by replay needs a trace with damages; record it with them")
        self.cost, self._traces = cost, traces
        self._spec, self._calibrations = policy_spec(policy), calibrations
        self._costly = costly
        *_, self._default = traces

    @property
    def trace(self) -> RoutingTrace:
        """What is replayed where a point names no compensation."""
        return self._traces[self._default]

    def forecast(
        self, points: Sequence[Params], progress: Progress | None = None
    ) -> list[Forecast]:
        """In the order of ``points``.

        Args:
            points: settings of the policy.
            progress: called with a stage's name, points done and in all.

        Raises:
            UsageError: a replay can't tell what the policy's decisions cost.
        """
        found = []
        for point in points:
            found.append(self._one(point))
            if progress:
                progress(STAGE, len(found), len(points))
        return found

    def grid(
        self, space: SearchSpace, n_points: int = 5, progress: Progress | None = None
    ) -> ForecastGrid:
        """All combinations of evenly spaced values, one axis per setting."""
        count = check_count("n_points", n_points)
        values = {d.name: tuple(d.grid(count)) for d in dimensions(space)}
        forecasts = self.forecast(list(grid_points(space, count)), progress)
        shape = tuple(len(known) for known in values.values())
        columns = {
            field.name: np.array([getattr(one, field.name) for one in forecasts]).reshape(shape)
            for field in fields(Forecast)
        }
        return ForecastGrid(values=values, columns=columns)

    def _one(self, point: Params) -> Forecast:
        settings = dict(point)
        name = str(settings.pop(COMPENSATION, self._default))
        policy = self._spec.make(settings, self._calibrations[name])
        found = evaluate_policy(self._traces[name], policy)
        if found.degradation is None:
            raise UsageError(not_replayable(self._spec.name))
        report = found.report
        return Forecast(
            degradation=found.degradation,
            speedup=self.cost.speedup(
                report,
                decided=self._costly,
                residual=self._costly and policy.compensation is not None,
            ),
            experts_per_token=report.experts_per_token,
            fast_pct=report.fast_pct,
            cached_pct=report.cached_pct,
            learned_pct=report.learned_pct,
        )


def not_replayable(policy: str) -> str:
    """Why a policy is not searched by replay, and what to do."""
    return (
        f"policy {policy!r} is not searched by replay: a trace does not tell what its decisions "
        "cost; use --method bayesian"
    )


__all__ = ["PolicyForecaster", "not_replayable"]
