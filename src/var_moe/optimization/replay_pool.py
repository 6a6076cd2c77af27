"""What a search by replay forecasts: a pool of points, and neighbours of the best of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from scipy.stats import qmc

from var_moe.optimization.search_space import (
    Choice,
    Dimension,
    Params,
    SearchSpace,
    dimensions,
    distinct,
    is_config_space,
    starting_points,
)

POOL_GROUPS, POOL_CONFIDENCES, POOL_REST = 48, 8, 6
"""Points of VAR's pool: so many draws of what the cache shares, by so many of the rest each."""

POOL_EVEN = 256
"""Evenly spread points of another policy's pool: its few settings leave no gaps between them."""

SHARED = ("context_window_size", "cache_size", "cache_ttl_seconds")
"""Settings for which a replay does most of its work: points that share them cost little."""

_NEIGHBOURS, _NEIGHBOURS_PER_SETTING = 48, 16
_MOST_CORNERS = 3  # of a space with so many settings, at 2^n of them


def pool_points(space: SearchSpace, seed: int) -> list[Params]:
    """The points to choose from, the default first.

    For VAR the presets, and random points that share what is costly to replay. For any other
    policy the ends of each range and evenly spread points, whatever the seed.
    """
    if not is_config_space(space):
        return _even_points(space)
    dims = dimensions(space)
    dice = np.random.default_rng([seed, 5])
    points = starting_points(space)
    for _ in range(POOL_GROUPS):
        shared = {d.name: d.at(dice.random()) for d in dims if d.name in SHARED}
        for _ in range(POOL_CONFIDENCES):
            confidence = dice.random()
            for _ in range(POOL_REST):
                point = {}
                for d in dims:
                    share = confidence if d.name == "confidence_threshold" else dice.random()
                    point[d.name] = shared.get(d.name, d.at(share))
                points.append(point)
    return distinct(points)


def _even_points(space: SearchSpace) -> list[Params]:
    """The default, the corners, and a scrambled Sobol sequence."""
    dims = dimensions(space)
    points = starting_points(space)
    if len(dims) <= _MOST_CORNERS:
        points += [_point(dims, ends) for ends in product(*(d.ends for d in dims))]
    shares = qmc.Sobol(len(dims), scramble=True, seed=5).random(POOL_EVEN)
    points += [
        _point(dims, [d.at(share) for d, share in zip(dims, row, strict=True)])
        for row in shares.tolist()
    ]
    return distinct(points)


def _point(dims: Sequence[Dimension | Choice], values: Sequence[Any]) -> Params:
    return {d.name: value for d, value in zip(dims, values, strict=True)}


def neighbours(
    dims: Sequence[Dimension | Choice], centres: Sequence[Params], dice: np.random.Generator
) -> list[Params]:
    """Points near the centres: one or all settings moved by a tenth of their range or less."""
    found: list[Params] = []
    dims = [d for d in dims if d.span] or list(dims)  # what has a scale to move on
    for number in range(min(_NEIGHBOURS, _NEIGHBOURS_PER_SETTING * len(dims))):
        point = dict(centres[number % len(centres)])
        moved = [dims[int(dice.integers(len(dims)))]] if number % 2 else dims
        for d in moved:
            point[d.name] = d.moved(point[d.name], dice.normal(scale=0.05 * d.span))
        found.append(point)
    # Shared settings side by side, for the replay.
    return sorted(found, key=lambda p: [p.get(name, 0) for name in SHARED])
