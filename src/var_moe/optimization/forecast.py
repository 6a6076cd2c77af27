"""Forecasts of configurations, how far they are off, and what is gained by trusting them.

`optimization.replay_run` makes forecasts from a trace; `Correction` learns from full evaluations
how far they are off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from var_moe.errors import UsageError
from var_moe.optimization.results import LEARNED_TARGET_PCT
from var_moe.optimization.search_space import Params

Floats = NDArray[np.float64]

FACTOR_SD, TREND_SD = 0.3, 0.15
"""Prior standard deviation of b0 and b1: how far a forecast may be off, as a logarithm."""

MISFIT = 0.05
"""Standard deviation of a single ln d about the line."""

FLOOR = 1e-4
"""Degradations below a hundredth of a percent are not told apart."""


def non_dominated(cost: Floats, gain: Floats) -> list[int]:
    """The points that no other beats: those of less cost have less gain. By rising cost.

    Of points that are equal in both, the first.
    """
    order = np.lexsort((-gain, cost))
    best = np.maximum.accumulate(gain[order])
    kept = np.ones(len(order), dtype=bool)
    kept[1:] = gain[order][1:] > best[:-1]
    return [int(i) for i in order[kept]]


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
        values = asdict(self)
        forecast = {f"forecast_{name}": values.pop(name) for name in ("degradation", "speedup")}
        return forecast | values


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


@dataclass(frozen=True)
class Correction:
    """From forecast to measured degradation: the posterior of a regression on full evaluations.

    A forecast is off by a factor that changes slowly with its size: an additive model of damage
    misses what cut decisions do to each other. So the logarithm of the measured degradation is
    regressed on that of the forecast, ``ln d = ln f + b0 + b1 ln(f / s)``, with a prior that takes
    the forecast at its word: a conjugate normal model with known noise.

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

        ``scale`` is the size of the degradations that matter: the bound.
        """
        scale = max(scale, FLOOR)
        precision = np.diag([FACTOR_SD**-2.0, TREND_SD**-2.0])
        logs = _log(forecast)
        basis, variance = _basis(logs, scale), _noise(logs) ** 2
        precision = precision + (basis / variance[:, None]).T @ basis
        covariance = np.linalg.inv(precision)
        mean = covariance @ basis.T @ ((_log(measured) - logs) / variance)
        return cls(scale=scale, mean=mean, covariance=covariance)

    def predict(self, forecast: Sequence[float] | Floats) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the logarithm of the measured degradation. (M,), (M,)"""
        logs = _log(forecast)
        basis = _basis(logs, self.scale)
        spread = np.einsum("mi,ij,mj->m", basis, self.covariance, basis)
        deviation: Floats = np.sqrt(spread + _noise(logs) ** 2)
        return logs + basis @ self.mean, deviation


def _log(degradation: Sequence[float] | Floats) -> Floats:
    logs: Floats = np.log(np.maximum(np.asarray(degradation, dtype=np.float64), FLOOR))
    return logs


def _basis(logs: Floats, scale: float) -> Floats:
    return np.stack((np.ones_like(logs), logs - np.log(scale)), axis=1)


def _noise(logs: Floats) -> Floats:
    noise: Floats = np.hypot(MISFIT, FLOOR / np.exp(logs))
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
