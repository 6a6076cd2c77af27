"""From forecast to measured degradation: what the full evaluations so far teach about a forecast.

A forecast (see `optimization.forecast`) is off by a factor that changes slowly with its size: an
additive model of damage misses what cut decisions do to each other. So the logarithm of the
measured one is regressed on that of the forecast, ``ln d = ln f + b0 + b1 ln(f / s)``, with a prior
that takes the forecast at its word. With no evaluation the prior speaks alone; each evaluation
narrows it most where it was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]

FACTOR_SD, TREND_SD = 0.3, 0.15
"""Prior standard deviation of b0 and b1: how far a forecast may be off, as a logarithm."""

MISFIT = 0.05
"""Standard deviation of a single ln d about the line."""

FLOOR = 1e-4
"""Degradations below a hundredth of a percent are not told apart."""


@dataclass(frozen=True)
class Correction:
    """Posterior of the regression; a conjugate normal model with known noise.

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
