"""What is searched: names, types, ranges and defaults, and points drawn from them.

A search space maps a name to ``{"type": "int" | "float", "low", "high", "default"}``, with
``"log": True`` where orders of magnitude matter, not differences; or to ``{"type": "choice",
"choices", "default"}``, for names to choose from. Every point is a pure function of the space, a
seed and an index, so that a resumed search draws what an unbroken one would.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from var_moe.config import DOCUMENTED_FIELDS, PRESETS, VARConfig, check_count
from var_moe.errors import UsageError

Params: TypeAlias = dict[str, Any]
SearchSpace: TypeAlias = Mapping[str, Mapping[str, Any]]

COMPENSATION = "compensation"
"""What stands in for dropped experts: the dimension that a search of a policy adds to its own."""

_KEYS = ("type", "low", "high", "default", "log")
_CHOICE_KEYS = ("type", "choices", "default")

# Far more draws than a space with any free point needs, and a small one gives up at once.
_FRESH_DRAWS = 100
# Indices of the second and later draws of `fresh_sample`, out of the way of ordinary ones.
_FRESH_STRIDE = 1_000_003


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One checked entry of a search space, bounds included.

    With `log`, equal factors are equally far apart: shares, grids and steps are in the logarithm.
    """

    name: str
    integer: bool
    low: int | float
    high: int | float
    default: int | float
    log: bool = False

    @property
    def free(self) -> bool:
        """Whether there is more than one value."""
        return self.low < self.high

    @property
    def count(self) -> int | float:
        """How many values there are."""
        return self.high - self.low + 1 if self.integer else math.inf if self.free else 1

    @property
    def ends(self) -> tuple[int | float, ...]:
        """The outermost values."""
        return (self.low, self.high)

    @property
    def span(self) -> float:
        """Length of the range, in the scale that it is searched on."""
        return math.log(self.high) - math.log(self.low) if self.log else self.high - self.low

    def at(self, share: float) -> int | float:
        """The value at `share` in [0, 1) of the range; integers are equally likely, but on a
        logarithmic scale."""
        if self.log:
            first, last = math.log(self.low), math.log(self.high + self.integer)
            value = math.exp(first + share * (last - first))
        else:
            value = self.low + share * (self.high - self.low + self.integer)
        return self.clip(math.floor(value) if self.integer else value)

    def moved(self, value: int | float, step: float) -> int | float:
        """`value` moved by `step`, in the scale of `span`, and kept inside the bounds."""
        return self.clip(value * math.exp(step) if self.log else value + step)

    def clip(self, value: float) -> int | float:
        """The nearest value inside the bounds, of this dimension's type."""
        nearest = min(max(value, self.low), self.high)
        return round(nearest) if self.integer else float(nearest)

    def grid(self, n_points: int) -> list[int | float]:
        """`n_points` evenly spaced values, integers rounded and repeats removed; 1: the default."""
        if n_points == 1:
            return [self.default]
        spaced = np.geomspace if self.log else np.linspace
        values = spaced(self.low, self.high, n_points).tolist()
        # Both round, so that the last value can miss the bound by one digit.
        return list(dict.fromkeys(self.clip(value) for value in values))

    def to_dict(self) -> dict[str, Any]:
        """The entry as it stands in a search space."""
        kind = "int" if self.integer else "float"
        entry = {"type": kind, "low": self.low, "high": self.high, "default": self.default}
        return {**entry, "log": True} if self.log else entry


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The same for an entry whose values are names, without an order or steps between them."""

    name: str
    choices: tuple[str, ...]
    default: str

    span = 0.0

    @property
    def free(self) -> bool:
        return len(self.choices) > 1

    @property
    def count(self) -> int:
        return len(self.choices)

    @property
    def ends(self) -> tuple[str, ...]:
        return self.choices

    def at(self, share: float) -> str:
        return self.choices[min(int(share * len(self.choices)), len(self.choices) - 1)]

    def turn(self, index: int) -> str:
        """The value of point number `index` where all take turns, the default first."""
        return self.choices[(self.choices.index(self.default) + index) % len(self.choices)]

    def moved(self, value: str, step: float) -> str:
        return value

    def clip(self, value: Any) -> str:
        return str(value)

    def grid(self, n_points: int) -> list[str]:
        """All values, however many points the other dimensions have."""
        return list(self.choices)

    def to_dict(self) -> dict[str, Any]:
        return {"type": "choice", "choices": list(self.choices), "default": self.default}


def dimensions(space: SearchSpace) -> list[Dimension | Choice]:
    """The space's entries in order, checked and typed.

    Raises:
        UsageError: names the entry, what is wrong with it and what is expected.
    """
    if not isinstance(space, Mapping) or not space:
        raise UsageError("search space: expected a mapping of at least one name to its range")
    return [dimension_of(name, entry) for name, entry in space.items()]


def dimension_of(name: Any, entry: Any) -> Dimension | Choice:
    """One entry; a missing default is the middle of the range, in the scale of the search."""
    where = f"search space: {name}"
    if not isinstance(name, str) or not isinstance(entry, Mapping):
        raise UsageError(f"{where}: expected a name with its type, low, high, default")
    if entry.get("type") == "choice":
        return _choice(where, name, entry)
    unknown = [key for key in entry if key not in _KEYS]
    if unknown:
        raise UsageError(f"{where}: unknown key {unknown[0]!r}; expected {', '.join(_KEYS)}")
    if entry.get("type") not in ("int", "float"):
        expected = "'int', 'float' or 'choice'"
        raise UsageError(f"{where}: type = {entry.get('type')!r}: expected {expected}")
    integer = entry["type"] == "int"
    kind = int if integer else float
    for key in ("low", "high", *(["default"] if "default" in entry else [])):
        if not is_number(entry.get(key), integer=integer):
            expected = "an integer" if integer else "a finite number"
            raise UsageError(f"{where}: {key} = {entry.get(key)!r}: expected {expected}")
    low, high, log = kind(entry["low"]), kind(entry["high"]), entry.get("log", False)
    if low > high:
        raise UsageError(f"{where}: low = {low} is above high = {high}")
    if not isinstance(log, bool | np.bool_):
        raise UsageError(f"{where}: log = {log!r}: expected true or false")
    if log and low <= 0:
        raise UsageError(f"{where}: low = {low}: expected a value above 0 on a logarithmic scale")
    middle = math.sqrt(low) * math.sqrt(high) if log else (low + high) / 2
    middle = min(max(middle, low), high)
    if integer:
        middle = round(middle) if log else (low + high) // 2
    default = kind(entry.get("default", middle))
    if not low <= default <= high:
        raise UsageError(f"{where}: default = {default}: expected a value in [{low}, {high}]")
    for value in (low, high) if name in DOCUMENTED_FIELDS else ():
        try:  # a range may be wider than documented, but not than what is valid
            VARConfig(**{name: value})  # type: ignore[arg-type]
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None
    return Dimension(name=name, integer=integer, low=low, high=high, default=default, log=bool(log))


def _choice(where: str, name: str, entry: Mapping[str, Any]) -> Choice:
    choices = entry.get("choices")
    if set(entry) != set(_CHOICE_KEYS) or not isinstance(choices, list | tuple) or not choices:
        raise UsageError(f"{where}: expected {', '.join(_CHOICE_KEYS)}, with a list of choices")
    if entry["default"] not in choices:
        raise UsageError(f"{where}: default = {entry['default']!r}: expected one of {choices}")
    return Choice(name=name, choices=tuple(map(str, choices)), default=str(entry["default"]))


def is_number(value: Any, *, integer: bool) -> bool:
    if isinstance(value, bool | np.bool_):
        return False
    if isinstance(value, int | np.integer):
        return True
    return not integer and isinstance(value, float | np.floating) and math.isfinite(value)


def defaults(space: SearchSpace) -> Params:
    """The default point."""
    return {d.name: d.default for d in dimensions(space)}


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
    points += [
        {d.name: d.clip(preset[d.name]) for d in dimensions(space)}
        for preset in PRESETS.values()
        if space.keys() <= preset.keys()
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
    points = math.prod(min(count, d.count) for d in dimensions(space))
    if points > MOST_POINTS:
        raise UsageError(
            f"{name} = {count}: a grid of {points:,} points; expected at most {MOST_POINTS:,}"
        )
    return count


def grid_size(space: SearchSpace, n_points_per_dim: int) -> int:
    """How many points the grid has, without building it."""
    return math.prod(len(values) for values in _grid_values(space, n_points_per_dim))


def grid_point(space: SearchSpace, n_points_per_dim: int, index: int) -> Params:
    """The grid's point number `index`, the last name varying fastest."""
    values = _grid_values(space, n_points_per_dim)
    places = np.unravel_index(index, [len(own) for own in values])
    return {name: own[place] for name, own, place in zip(space, values, places, strict=True)}


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
        ends = span.split(":")
        if len(ends) != 2:
            raise UsageError(f"bounds {text!r}: expected name=low:high, e.g. cache_size=100:8000")
        if name not in new:
            raise UsageError(f"bounds {text!r}: unknown name {name!r}; expected {', '.join(new)}")
        if name in given:
            raise UsageError(f"bounds {text!r}: {name} is given twice")
        given.add(name)
        if new[name]["type"] == "choice":
            raise UsageError(f"bounds {text!r}: {name} has no range; name the one that you want")
        low, high = (_parse(end, text) for end in ends)
        default = min(max(new[name]["default"], low), high)
        entry = {**new[name], "low": low, "high": high, "default": default}
        try:
            new[name] = dimension_of(name, entry).to_dict()
        except UsageError as error:
            raise UsageError(f"bounds {text!r}: {error}") from None
    return new


def point_count(space: SearchSpace) -> int | float:
    """How many different points there are; infinite with a float that has a range."""
    return math.prod(d.count for d in dimensions(space))


def _grid_values(space: SearchSpace, n_points_per_dim: int) -> list[list[Any]]:
    n_points = check_count("n_points_per_dim", n_points_per_dim)
    return [[*d.grid(n_points)] for d in dimensions(space)]


def _parse(number: str, text: str) -> int | float:
    try:
        value = float(number)
    except ValueError:
        raise UsageError(f"bounds {text!r}: {number.strip()!r} is not a number") from None
    return int(value) if value.is_integer() else value
