"""What is searched: names, types, ranges and defaults, and points drawn from them.

A search space maps a name to ``{"type": "int" | "float", "low", "high", "default"}``, with
``"log": True`` where orders of magnitude matter, not differences; or to ``{"type": "choice",
"choices", "default"}``, for names to choose from. Every point is a pure function of the space, a
seed and an index, so that a resumed search draws what an unbroken one would.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from var_moe.config import DOCUMENTED_FIELDS, PRESETS, SEARCH_SPACE, check_count
from var_moe.errors import UsageError
from var_moe.optimization.dimension import (
    COMPENSATION,
    Choice,
    Dimension,
    Params,
    SearchSpace,
    dimension_of,
    dimensions,
    validate_space,
)

# Far more draws than a space with any free point needs, and a small one gives up at once.
_FRESH_DRAWS = 100
# Indices of the second and later draws of `fresh_sample`, out of the way of ordinary ones.
_FRESH_STRIDE = 1_000_003


def defaults(space: SearchSpace) -> Params:
    """The default point."""
    return {d.name: d.default for d in dimensions(space)}


def is_config_space(space: SearchSpace) -> bool:
    """Whether every name is one of VARConfig's six documented fields."""
    return all(name in DOCUMENTED_FIELDS for name in space)


def starting_points(space: SearchSpace) -> list[Params]:
    """The default, with each name of a choice once, and, for VARConfig's own fields, the three
    presets; repeats removed.

    A preset outside the space's bounds is clipped to them: its nearest allowed neighbour is
    still a better first guess than a random point.
    """
    points = [defaults(space)]
    for d in dimensions(space):
        if isinstance(d, Choice):
            points += [{**points[0], d.name: name} for name in d.choices]
    if is_config_space(space):
        points += [
            {d.name: d.clip(preset[d.name]) for d in dimensions(space)}
            for preset in PRESETS.values()
        ]
    return distinct(points)


def distinct(points: Sequence[Params]) -> list[Params]:
    """`points` without repeats, the first of each kept."""
    first: dict[object, Params] = {}
    for point in points:
        first.setdefault(point_key(point), point)
    return list(first.values())


def point_key(params: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """A hashable identity of a point, whatever the order of its names."""
    return tuple(sorted(params.items()))


def stand_in_of(params: Mapping[str, Any]) -> str | None:
    """The compensation that a point names; None where a search has no choice of it."""
    return params.get(COMPENSATION)


def check_point(space: SearchSpace, params: Mapping[str, Any], *, what: str = "point") -> Params:
    """`params` in the space's order and types.

    Raises:
        UsageError: a name is missing or unknown, or a value is not in its range.
    """
    dims = dimensions(space)
    names = [d.name for d in dims]
    wrong = sorted(set(params) ^ set(names))
    if wrong:
        raise UsageError(f"{what}: {wrong[0]!r} is missing or unknown; expected {', '.join(names)}")
    for d in dims:
        if not d.holds(params[d.name]):
            raise UsageError(f"{what}: {d.name} = {params[d.name]!r}: expected {d.expected}")
    return {d.name: d.clip(params[d.name]) for d in dims}


def sample(space: SearchSpace, seed: int, index: int) -> Params:
    """The random point number `index` of `seed`: the same whatever was drawn before it.

    Names to choose from take turns, so that each has its share of few points.
    """
    dims = dimensions(space)
    # One share of the range per dimension: narrowing one bound leaves the others' draws.
    shares = np.random.default_rng([seed, index]).random(len(dims))
    return {
        d.name: d.turn(index) if isinstance(d, Choice) else d.at(share)
        for d, share in zip(dims, shares.tolist(), strict=True)
    }


def fresh_sample(space: SearchSpace, seed: int, index: int, seen: Sequence[Params]) -> Params:
    """Like `sample`, drawn again while the point is in `seen`, unless the space is used up."""
    known = {point_key(point) for point in seen}
    point: Params = {}
    for attempt in range(_FRESH_DRAWS):
        point = sample(space, seed, index + attempt * _FRESH_STRIDE)
        if point_key(point) not in known:
            break
    return point


MOST_POINTS = 10_000_000
"""Of a grid: its points and their forecasts are held in memory, and written as a table."""


def check_grid(space: SearchSpace, n_points: int, *, name: str = "n_points") -> int:
    """`n_points` per dimension, where a full grid of the space has no more than can be held.

    Raises:
        UsageError: names the argument and the number of points.
    """
    count = check_count(name, n_points)
    points = math.prod(min(count, _count(d)) for d in dimensions(space))
    if points > MOST_POINTS:
        raise UsageError(
            f"{name} = {count}: a grid of {points:,} points; expected at most {MOST_POINTS:,}"
        )
    return count


def grid_size(space: SearchSpace, n_points_per_dim: int) -> int:
    """How many points the grid has, without building it."""
    return math.prod(len(values) for values in _grid_values(space, n_points_per_dim))


def grid_points(space: SearchSpace, n_points_per_dim: int) -> Iterator[Params]:
    """The full grid, the last name varying fastest."""
    names = list(space)
    for values in itertools.product(*_grid_values(space, n_points_per_dim)):
        yield dict(zip(names, values, strict=True))


def grid_point(space: SearchSpace, n_points_per_dim: int, index: int) -> Params:
    """The grid's point number `index`, as `grid_points` counts them."""
    point: Params = {}
    for name, values in reversed(
        list(zip(space, _grid_values(space, n_points_per_dim), strict=True))
    ):
        index, place = divmod(index, len(values))
        point[name] = values[place]
    return {name: point[name] for name in space}


def parse_bounds(bounds: Sequence[str], space: SearchSpace) -> dict[str, dict[str, Any]]:
    """A copy of `space` with the ranges in `bounds`, each ``"name=low:high"``.

    ``low`` may equal ``high``, which fixes the name's value. A default outside the new range
    moves to the nearest bound.

    Raises:
        UsageError: an unknown name, a name given twice, or no valid range; names the text.
    """
    new = {d.name: d.to_dict() for d in dimensions(space)}
    given: set[str] = set()
    for text in bounds:
        name, _, span = text.partition("=")
        name = name.strip()
        low, colon, high = span.partition(":")
        if not colon:
            raise UsageError(f"bounds {text!r}: expected name=low:high, e.g. cache_size=100:8000")
        if name not in new:
            raise UsageError(f"bounds {text!r}: unknown name {name!r}; expected {', '.join(new)}")
        if name in given:
            raise UsageError(f"bounds {text!r}: {name} is given twice")
        given.add(name)
        if new[name]["type"] == "choice":
            raise UsageError(f"bounds {text!r}: {name} has no range; name the one that you want")
        integer = new[name]["type"] == "int"
        entry = {
            **new[name],
            "low": _parse(low, integer, text),
            "high": _parse(high, integer, text),
        }
        entry["default"] = min(max(entry["default"], entry["low"]), entry["high"])
        try:
            dimension_of(name, entry)
        except UsageError as error:
            raise UsageError(f"bounds {text!r}: {error}") from None
        new[name] = entry
    return new


def point_count(space: SearchSpace) -> int | float:
    """How many different points there are; infinite with a float that has a range."""
    return math.prod(_count(d) for d in dimensions(space))


def _count(d: Dimension | Choice) -> int | float:
    if isinstance(d, Choice):
        return len(d.choices)
    return d.high - d.low + 1 if d.integer else math.inf if d.free else 1


def _grid_values(space: SearchSpace, n_points_per_dim: int) -> list[list[Any]]:
    n_points = check_count("n_points_per_dim", n_points_per_dim)
    return [[*d.grid(n_points)] for d in dimensions(space)]


def _parse(number: str, integer: bool, text: str) -> int | float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (integer and not value.is_integer()):
        kind = "an integer" if integer else "a number"
        raise UsageError(f"bounds {text!r}: {number.strip()!r} is not {kind}") from None
    return int(value) if integer else value


__all__ = [
    "COMPENSATION",
    "SEARCH_SPACE",
    "Choice",
    "Dimension",
    "Params",
    "SearchSpace",
    "check_count",
    "check_grid",
    "check_point",
    "defaults",
    "dimensions",
    "distinct",
    "fresh_sample",
    "grid_point",
    "grid_points",
    "grid_size",
    "is_config_space",
    "parse_bounds",
    "point_count",
    "point_key",
    "sample",
    "stand_in_of",
    "starting_points",
    "validate_space",
]
