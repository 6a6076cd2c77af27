"""Forecasts of a full grid of VAR's six thresholds, as columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from var_moe.config import DOCUMENTED_FIELDS, VARConfig
from var_moe.errors import UsageError
from var_moe.evaluation.cost import CostModel
from var_moe.evaluation.evaluator import Progress
from var_moe.optimization.search_space import (
    SEARCH_SPACE,
    Params,
    SearchSpace,
    check_grid,
    dimensions,
    is_config_space,
)
from var_moe.tracing.grid import ThresholdGrid
from var_moe.tracing.replay import TraceReplay

Floats = NDArray[np.float64]

AXES = DOCUMENTED_FIELDS
"""The grid's axes: frequency, entropy, confidence, cache size, time to live, window."""

_FIGURES = ("experts_per_token", "fast_pct", "cached_pct", "learned_pct", "cache_hit_rate")


@dataclass(frozen=True, kw_only=True)
class ForecastGrid:
    """Forecasts of all combinations of values.

    ``columns`` has experts_per_token, fast_pct, cached_pct, learned_pct, cache_hit_rate; also
    degradation where the trace has damages, and speedup where there is a cost model. Each has
    one axis per threshold, in the order of `AXES`.
    """

    values: Mapping[str, tuple[Any, ...]]  # of each of AXES, in that order
    columns: dict[str, Floats]  # (n1, ..., n6) each

    @property
    def shape(self) -> tuple[int, ...]:
        """Values per axis."""
        return tuple(len(found) for found in self.values.values())

    @property
    def size(self) -> int:
        """Points of the grid."""
        return int(np.prod(self.shape))

    def point(self, number: int) -> Params:
        """Point ``number`` of the flattened columns."""
        places = np.unravel_index(number, self.shape)
        return {
            name: found[int(place)]
            for (name, found), place in zip(self.values.items(), places, strict=True)
        }

    def row(self, number: int) -> dict[str, float]:
        """All figures of point ``number``."""
        return {name: float(column.flat[number]) for name, column in self.columns.items()}

    def table(self) -> dict[str, NDArray[np.generic]]:
        """The whole grid as flat columns: thresholds first, then figures."""
        places = np.unravel_index(np.arange(self.size), self.shape)
        found: dict[str, NDArray[np.generic]] = {
            name: np.asarray(known)[place]
            for (name, known), place in zip(self.values.items(), places, strict=True)
        }
        return found | {name: column.ravel() for name, column in self.columns.items()}

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


def grid_values(space: SearchSpace = SEARCH_SPACE, n_points: int = 5) -> dict[str, tuple[Any, ...]]:
    """Evenly spaced values of each threshold; the default alone of one that is not in the space.

    Raises:
        UsageError: the space has other names than VARConfig's six thresholds.
    """
    if not is_config_space(space):
        raise UsageError(f"a grid of forecasts: expected names among {', '.join(AXES)}")
    count = check_grid(space, n_points)
    known = {d.name: tuple(d.grid(count)) for d in dimensions(space)}
    fixed = VARConfig().documented()
    return {name: known.get(name, (fixed[name],)) for name in AXES}


def forecast_grid(
    replay: TraceReplay,
    values: Mapping[str, Sequence[int | float]],
    *,
    cost: CostModel | None = None,
    mode: str = "verified",
    residuals: bool | None = None,
    progress: Progress | None = None,
) -> ForecastGrid:
    """Forecast all combinations.

    Args:
        replay: of the trace.
        values: of each of `AXES`, see `grid_values`.
        cost: cost model; without, no speedups.
        mode, residuals: of all configurations.
        progress: called with points done and in all.
    """
    if set(values) != set(AXES):
        raise UsageError(f"a grid of forecasts: expected values of {', '.join(AXES)}")
    lists = {name: tuple(values[name]) for name in AXES}
    shape = tuple(len(found) for found in lists.values())
    names = [*_FIGURES, *(["degradation"] if replay.trace.damage else [])]
    columns = {name: np.empty(shape) for name in [*names, *(["speedup"] if cost else [])]}
    grid = ThresholdGrid(replay, lists[AXES[0]], lists[AXES[1]])
    base = VARConfig(mode=mode, residuals=residuals)
    total, done = int(np.prod(shape)), 0
    for places, config in _groups(lists, base):
        found = grid.evaluate(config)
        fast, cached, learned = np.moveaxis(found.tiers_pct, -1, 0)
        figures = {
            "experts_per_token": found.experts_per_token,
            "fast_pct": fast,
            "cached_pct": cached,
            "learned_pct": learned,
            "cache_hit_rate": found.cache_hit_rate,
        }
        if replay.trace.damage:
            figures["degradation"] = found.degradation
        if cost:
            figures["speedup"] = cost.speedups(
                found.pairs, tokens=found.tokens, residual=config.uses_residuals
            )
        at: tuple[slice | int, ...] = (slice(None), slice(None), *places)
        for name, figure in figures.items():
            columns[name][at] = figure
        done += shape[0] * shape[1]
        if progress:
            progress("replaying the grid", done, total)
    return ForecastGrid(values=lists, columns=columns)


def _groups(
    lists: Mapping[str, Sequence[int | float]], base: VARConfig
) -> Iterator[tuple[tuple[int, ...], VARConfig]]:
    """The combinations of the last four axes, with what a replay shares side by side."""
    names = AXES[2:]
    confidence, *cache = (range(len(lists[name])) for name in names)
    # The window makes the stack distances, then size and time to live the stays.
    for window, size, ttl, sure in product(cache[2], cache[0], cache[1], confidence):
        places = (sure, size, ttl, window)
        chosen = {name: lists[name][place] for name, place in zip(names, places, strict=True)}
        yield places, base.replace(**chosen)


def non_dominated(cost: Floats, gain: Floats) -> list[int]:
    """The points that no other beats: those of less cost have less gain. By rising cost.

    Of points that are equal in both, the first.
    """
    order = np.lexsort((-gain, cost))
    best = np.maximum.accumulate(gain[order])
    kept = np.ones(len(order), dtype=bool)
    kept[1:] = gain[order][1:] > best[:-1]
    return [int(i) for i in order[kept]]


__all__ = ["AXES", "ForecastGrid", "forecast_grid", "grid_values", "non_dominated"]
