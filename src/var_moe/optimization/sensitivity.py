"""Which thresholds matter: exact Sobol indices on a full grid of forecasts.

With every combination known and equally likely, the functional analysis of variance needs no
surrogate and no sampling (Sobol 1993; Hutter et al. 2014 do it on a fitted forest). The first
index of a threshold is the share of the variance that it explains alone; the total index adds
every interaction that it is part of (Homma and Saltelli 1996). They describe the grid: other
ranges give other indices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from var_moe.errors import UsageError
from var_moe.optimization.forecast_grid import ForecastGrid
from var_moe.storage import SCHEMA_VERSION

TARGETS = ("speedup", "experts_per_token", "degradation")


@dataclass(frozen=True, kw_only=True)
class Indices:
    """Sobol indices of one figure, by axis; zeros where the figure does not vary.

    Args:
        first: share of the variance by this axis alone.
        total: share in which this axis takes part.
        variance: of the figure over the grid.
    """

    first: tuple[float, ...]
    total: tuple[float, ...]
    variance: float


def sobol(figure: NDArray[np.float64]) -> Indices:
    """First and total indices of a function known on a full factorial grid.

    Args:
        figure: one axis per parameter, all combinations equally likely.

    Raises:
        UsageError: a value is not finite.
    """
    if not np.isfinite(figure).all():
        raise UsageError("sensitivity: a figure of the grid is not finite")
    variance = float(figure.var())
    axes = range(figure.ndim)
    if variance <= (1e-12 * float(np.abs(figure).max(initial=0.0))) ** 2:  # rounding alone
        zeros = (0.0,) * figure.ndim
        return Indices(first=zeros, total=zeros, variance=0.0)
    first = [
        float(figure.mean(axis=tuple(other for other in axes if other != axis)).var()) / variance
        for axis in axes
    ]
    total = [float(figure.var(axis=axis).mean()) / variance for axis in axes]
    return Indices(first=tuple(first), total=tuple(total), variance=variance)


def sensitivity(grid: ForecastGrid) -> dict[str, Indices]:
    """Indices of each of `TARGETS` that the grid has, over its six thresholds."""
    return {name: sobol(grid.columns[name]) for name in TARGETS if name in grid.columns}


def sensitivity_rows(
    found: Mapping[str, Indices], parameters: Sequence[str]
) -> list[dict[str, Any]]:
    """One row per parameter: its name, and ``<figure>_first`` and ``<figure>_total`` of each."""
    rows: list[dict[str, Any]] = []
    for place, parameter in enumerate(parameters):
        row: dict[str, Any] = {"parameter": parameter}
        for name, indices in found.items():
            row[f"{name}_first"] = indices.first[place]
            row[f"{name}_total"] = indices.total[place]
        rows.append(row)
    return rows


def sensitivity_result(grid: ForecastGrid) -> dict[str, Any]:
    """For ``sensitivity.json``; the caller adds where the grid comes from."""
    found = sensitivity(grid)
    return {
        "schema_version": SCHEMA_VERSION,
        "method": "Sobol indices of a full grid, all points equally likely",
        "values": {name: list(known) for name, known in grid.values.items()},
        "points": grid.size,
        "variance": {name: indices.variance for name, indices in found.items()},
        "rows": sensitivity_rows(found, list(grid.values)),
    }


__all__ = ["TARGETS", "Indices", "sensitivity", "sensitivity_result", "sensitivity_rows", "sobol"]
