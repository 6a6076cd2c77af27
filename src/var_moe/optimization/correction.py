"""From forecast to measured degradation: what the full evaluations so far teach about a forecast.

A forecast (see `optimization.forecast`) is off in a way that changes slowly with its size: an
additive model of damage misses what cut decisions do to each other. So measured degradations are
regressed on forecast ones, ``d = b1 f + b2 f^2 / s``, with a prior that takes the forecast at its
word, and an error that grows with the forecast. With no evaluation the prior speaks alone; each
evaluation narrows it most where it was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]

SLOPE_SD, CURVE_SD = 0.4, 0.4
"""Prior standard deviation of b1 (mean 1) and of b2 (mean 0): how far a forecast may be off."""

MISFIT = 0.05
"""Standard deviation of a single measured degradation about the curve, relative to its forecast."""

FLOOR = 1e-4
"""The same in absolute terms: a hundredth of a percent."""


@dataclass(frozen=True)
class Correction:
    """Posterior of the regression; a conjugate normal model with known noise.

    Args:
        scale: forecast at which the quadratic term counts like the linear one.
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
        scale = max(scale, 10 * FLOOR)
        precision = np.diag([SLOPE_SD**-2.0, CURVE_SD**-2.0])
        weighted = precision @ np.array([1.0, 0.0])
        if len(forecast):
            f = np.asarray(forecast, dtype=np.float64)
            basis = _basis(f, scale)
            noise = _noise(f)
            precision = precision + (basis / noise[:, None] ** 2).T @ basis
            weighted = weighted + basis.T @ (np.asarray(measured) / noise**2)
        covariance = np.linalg.inv(precision)
        return cls(scale=scale, mean=covariance @ weighted, covariance=covariance)

    def predict(self, forecast: Floats) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the measured degradation. (M,), (M,)"""
        f = np.asarray(forecast, dtype=np.float64)
        basis = _basis(f, self.scale)
        spread = np.einsum("mi,ij,mj->m", basis, self.covariance, basis)
        return basis @ self.mean, np.sqrt(spread + _noise(f) ** 2)


def _basis(f: Floats, scale: float) -> Floats:
    return np.stack((f, f * np.abs(f) / scale), axis=1)


def _noise(f: Floats) -> Floats:
    noise: Floats = np.hypot(MISFIT * f, FLOOR)
    return noise


def feasible_improvement(
    speedup: Floats, mean: Floats, deviation: Floats, *, best: float, limit: float
) -> Floats:
    """Expected gain in speedup over ``best``, times the probability of keeping the limit. (M,)

    Args:
        speedup: (M,) forecast; what is executed determines it, so it is taken as known.
        mean, deviation: (M,) of the degradation.
        best: forecast speedup of the best feasible configuration so far.
        limit: on the degradation.
    """
    gain = np.maximum(speedup - best, 0.0)
    improvement: Floats = gain * stats.norm.cdf((limit - mean) / np.maximum(deviation, 1e-12))
    return improvement
