"""What a search knows of a configuration without running the model: forecasts from a trace.

A policy's `Replayer` says what a configuration decides on the trace of the search's text; the
recorded damages of these decisions add up to the predicted degradation, and the cost model
predicts the speedup from the executed pairs. `Correction` learns from full evaluations how far
forecasts are off.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from var_moe.errors import UsageError
from var_moe.evaluation.cost import CostModel, fit_cost_model
from var_moe.evaluation.evaluator import Progress
from var_moe.optimization.objective import PolicyObjective
from var_moe.optimization.objective_protocol import LEARNED_TARGET_PCT
from var_moe.optimization.search_space import (
    COMPENSATION,
    Params,
    SearchSpace,
    check_grid,
    dimensions,
    stand_in_of,
)
from var_moe.optimization.settings import not_replayable
from var_moe.storage import atomic_write_json, read_json
from var_moe.tracing.policies import Replayer, replayer_of
from var_moe.tracing.record import record_trace
from var_moe.tracing.trace import RoutingTrace

Floats = NDArray[np.float64]

TRACE_FOLDER, COST_FILE = "trace", "cost_model.json"

FACTOR_SD, TREND_SD = 0.3, 0.15
"""Prior standard deviation of b0 and b1: how far a forecast may be off, as a logarithm."""

MISFIT = 0.05
"""Standard deviation of a single ln d about the line."""

FLOOR = 1e-4
"""Degradations below a hundredth of a percent are not told apart."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A configuration's figures on the search's text, as forecast."""

    degradation: float  # PPL(VAR) / PPL(baseline) - 1
    speedup: float  # over the baseline
    experts_per_token: float
    fast_pct: float
    cached_pct: float
    learned_pct: float

    @property
    def score(self) -> float:
        """The documented score if the bound is kept."""
        return self.speedup + max(0.0, (LEARNED_TARGET_PCT - self.learned_pct) / 100)

    def to_dict(self) -> dict[str, Any]:
        """For result files."""
        return {
            "forecast_degradation": self.degradation,
            "forecast_speedup": self.speedup,
            "experts_per_token": self.experts_per_token,
            "fast_pct": self.fast_pct,
            "cached_pct": self.cached_pct,
            "learned_pct": self.learned_pct,
        }


class Forecaster(Protocol):
    """Forecasts points of a search space; the same point gets the same forecast."""

    def forecast(self, points: Sequence[Params]) -> list[Forecast]:
        """In the order of ``points``."""
        ...


@dataclass(frozen=True, kw_only=True)
class ForecastGrid:
    """Forecasts of all combinations of values.

    ``columns`` has what `tracing.policies.Replayer.grid` returns, each with one axis per setting.
    """

    values: Mapping[str, tuple[Any, ...]]  # of each setting
    columns: Mapping[str, Floats]  # (n1, n2, ...) each

    @property
    def shape(self) -> tuple[int, ...]:
        """Values per axis."""
        return tuple(len(own) for own in self.values.values())

    @property
    def size(self) -> int:
        """Points of the grid."""
        return int(np.prod(self.shape))

    def point(self, number: int) -> Params:
        """Point ``number`` of the flattened columns."""
        places = np.unravel_index(number, self.shape)
        return {
            name: own[int(place)]
            for (name, own), place in zip(self.values.items(), places, strict=True)
        }

    def row(self, number: int) -> dict[str, float]:
        """All figures of point ``number``."""
        return {name: float(column.flat[number]) for name, column in self.columns.items()}

    def table(self) -> dict[str, NDArray[np.generic]]:
        """The whole grid as flat columns: settings first, then figures."""
        places = np.unravel_index(np.arange(self.size), self.shape)
        columns: dict[str, NDArray[np.generic]] = {
            name: np.asarray(known)[place]
            for (name, known), place in zip(self.values.items(), places, strict=True)
        }
        return columns | {name: column.ravel() for name, column in self.columns.items()}

    def front(self) -> list[int]:
        """Points that no other beats in both speed and degradation, from the safest to the fastest.

        Without a cost model, fewer experts per token count as faster.

        Raises:
            UsageError: the trace has no damages.
        """
        if "degradation" not in self.columns:
            raise UsageError("the trace has no damages, so there is no front to choose from")
        gain = self.columns.get("speedup", -self.columns["experts_per_token"])
        return non_dominated(self.columns["degradation"].ravel(), gain.ravel())


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
        if COMPENSATION in values:
            return self._grid_of_points(values, progress)
        replayer = self._replayers[self._default]

        def speedups(pairs: NDArray[np.int64], residual: bool) -> Floats:
            return self.cost.speedups(
                pairs,
                tokens=self.trace.tokens,
                decided=self._decided,
                residual=self._decided and residual,
            )

        columns = replayer.grid(values, self._fixed, speedups=speedups, progress=progress)
        if "degradation" not in columns:
            raise UsageError(not_replayable(self._policy))
        return ForecastGrid(values=values, columns=columns)

    def _grid_of_points(
        self, values: Mapping[str, tuple[Any, ...]], progress: Progress | None
    ) -> ForecastGrid:
        """A grid with an axis of compensations, each with a trace of its own."""
        empty = ForecastGrid(values=values, columns={})
        points = [empty.point(number) for number in range(empty.size)]
        forecasts = self.forecast(points, progress)
        return ForecastGrid(
            values=values,
            columns={
                f.name: np.array([getattr(one, f.name) for one in forecasts]).reshape(empty.shape)
                for f in fields(Forecast)
            },
        )

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
    """Trace the objective's text, fit the cost model, and put both in ``folder``.

    Each compensation has a trace of its own: the best in ``trace``, others beside it.

    Args:
        objective: its evaluator's text is traced.
        dataset, data_hash: of that text, for the trace's head.
        folder: results folder; an interrupted trace goes on there.
        resume: take the cost model that an interrupted search left, so that its choices go on as
            they were.
        progress: called with a stage's name, tokens done and in all.
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


@dataclass(frozen=True)
class Correction:
    """From forecast to measured degradation: the posterior of a regression on full evaluations.

    A forecast is off by a factor that changes slowly with its size: an additive model of damage
    misses what cut decisions do to each other. So the logarithm of the measured degradation is
    regressed on that of the forecast, ``ln d = ln f + b0 + b1 ln(f / s)``, with a prior that takes
    the forecast at its word; a conjugate normal model with known noise. With no evaluation the
    prior speaks alone; each evaluation narrows it most where it was made.

    Args:
        scale: forecast at which b0 alone is the correction.
        mean: (2,) of the coefficients.
        covariance: (2, 2) of the coefficients.
    """

    scale: float
    mean: Floats
    covariance: Floats

    @classmethod
    def fit(
        cls, forecast: Sequence[float], measured: Sequence[float], *, scale: float
    ) -> Correction:
        """From pairs of forecast and measured degradation; none gives the prior.

        Args:
            forecast, measured: of the same configurations.
            scale: size of the degradations that matter, above zero: the bound.
        """
        scale = max(scale, FLOOR)
        precision = np.diag([FACTOR_SD**-2.0, TREND_SD**-2.0])
        weighted = np.zeros(2)
        if len(forecast):
            basis, noise = _basis(forecast, scale), _noise(forecast)
            off = _log(measured) - _log(forecast)
            precision = precision + (basis / noise[:, None] ** 2).T @ basis
            weighted = basis.T @ (off / noise**2)
        covariance = np.linalg.inv(precision)
        return cls(scale=scale, mean=covariance @ weighted, covariance=covariance)

    def predict(self, forecast: Sequence[float] | Floats) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the logarithm of the measured degradation. (M,), (M,)"""
        basis = _basis(forecast, self.scale)
        spread = np.einsum("mi,ij,mj->m", basis, self.covariance, basis)
        deviation: Floats = np.sqrt(spread + _noise(forecast) ** 2)
        return _log(forecast) + basis @ self.mean, deviation


def _log(degradation: Sequence[float] | Floats) -> Floats:
    logs: Floats = np.log(np.maximum(np.asarray(degradation, dtype=np.float64), FLOOR))
    return logs


def _basis(forecast: Sequence[float] | Floats, scale: float) -> Floats:
    logs = _log(forecast)
    return np.stack((np.ones_like(logs), logs - np.log(scale)), axis=1)


def _noise(forecast: Sequence[float] | Floats) -> Floats:
    noise: Floats = np.hypot(MISFIT, FLOOR / np.exp(_log(forecast)))
    return noise


def feasible_improvement(
    speedup: Floats, mean: Floats, deviation: Floats, *, best: float, limit: float
) -> Floats:
    """Expected gain in speedup over ``best``: the gain times the chance to keep the limit. (M,)

    Args:
        speedup: (M,) forecast; what is executed determines it, so it is taken as known.
        mean, deviation: (M,) of the logarithm of the degradation.
        best: forecast speedup of the best feasible configuration so far.
        limit: on the degradation.
    """
    gain = np.maximum(speedup - best, 0.0)
    level = np.log(max(limit, FLOOR / 10))
    improvement: Floats = gain * stats.norm.cdf((level - mean) / deviation)
    return improvement


def non_dominated(cost: Floats, gain: Floats) -> list[int]:
    """The points that no other beats: those of less cost have less gain. By rising cost.

    Of points that are equal in both, the first.
    """
    order = np.lexsort((-gain, cost))
    best = np.maximum.accumulate(gain[order])
    kept = np.ones(len(order), dtype=bool)
    kept[1:] = gain[order][1:] > best[:-1]
    return [int(i) for i in order[kept]]
