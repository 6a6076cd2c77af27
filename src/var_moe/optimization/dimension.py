"""One checked entry of a search space: a range of numbers, or names to choose from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from var_moe.config import DOCUMENTED_FIELDS, VARConfig
from var_moe.errors import UsageError

Params: TypeAlias = dict[str, Any]
SearchSpace: TypeAlias = Mapping[str, Mapping[str, Any]]

COMPENSATION = "compensation"
"""What stands in for dropped experts: the dimension that a search of a policy adds to its own."""

_KEYS = ("type", "low", "high", "default", "log")
_CHOICE_KEYS = ("type", "choices", "default")


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
    def ends(self) -> tuple[int | float, ...]:
        """The outermost values."""
        return (self.low, self.high)

    @property
    def expected(self) -> str:
        """What a value must be, for messages."""
        return f"{'an integer' if self.integer else 'a number'} in [{self.low}, {self.high}]"

    def holds(self, value: Any) -> bool:
        """Whether it is a value of this dimension."""
        return is_number(value, integer=self.integer) and bool(self.low <= value <= self.high)

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
            return self.clip(math.floor(value) if self.integer else value)
        if self.integer:
            return int(min(self.high, self.low + math.floor(share * (self.high - self.low + 1))))
        return float(min(self.high, self.low + share * (self.high - self.low)))

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
    """One checked entry of a search space whose values are names, without an order."""

    name: str
    choices: tuple[str, ...]
    default: str

    span = 0.0  # no name is near another one

    @property
    def free(self) -> bool:
        """Whether there is more than one value."""
        return len(self.choices) > 1

    @property
    def ends(self) -> tuple[str, ...]:
        """All values: none lies between others."""
        return self.choices

    @property
    def expected(self) -> str:
        """What a value must be, for messages."""
        return f"one of {', '.join(self.choices)}"

    def holds(self, value: Any) -> bool:
        """Whether it is a value of this dimension."""
        return value in self.choices

    def at(self, share: float) -> str:
        """The value at `share` in [0, 1)."""
        return self.choices[min(int(share * len(self.choices)), len(self.choices) - 1)]

    def turn(self, index: int) -> str:
        """The value of point number `index` where all take turns, the default first."""
        return self.choices[(self.choices.index(self.default) + index) % len(self.choices)]

    def moved(self, value: str, step: float) -> str:
        """`value`: there are no steps between names."""
        return value

    def clip(self, value: Any) -> str:
        """The value itself."""
        return str(value)

    def grid(self, n_points: int) -> list[str]:
        """All values, however many points the other dimensions have."""
        return list(self.choices)

    def to_dict(self) -> dict[str, Any]:
        """The entry as it stands in a search space."""
        return {"type": "choice", "choices": list(self.choices), "default": self.default}


def dimensions(space: SearchSpace) -> list[Dimension | Choice]:
    """The space's entries in order, checked and typed; a missing default is the middle of the
    range, in the scale that it is searched on.

    Raises:
        UsageError: names the entry, what is wrong with it and what is expected.
    """
    if not isinstance(space, Mapping) or not space:
        raise UsageError("search space: expected a mapping of at least one name to its range")
    return [dimension_of(name, entry) for name, entry in space.items()]


def validate_space(space: SearchSpace) -> None:
    """Raise UsageError, naming the entry, if `space` is not a valid search space."""
    dimensions(space)


def dimension_of(name: Any, entry: Any) -> Dimension | Choice:
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
    for key in ("low", "high", "default"):
        if key == "default" and key not in entry:
            continue
        if not is_number(entry.get(key), integer=integer):
            expected = "an integer" if integer else "a finite number"
            raise UsageError(f"{where}: {key} = {entry.get(key)!r}: expected {expected}")
    low, high = kind(entry["low"]), kind(entry["high"])
    if low > high:
        raise UsageError(f"{where}: low = {low} is above high = {high}")
    log = _log(where, entry, low)
    default = kind(entry.get("default", _middle(low, high, integer=integer, log=log)))
    if not low <= default <= high:
        raise UsageError(f"{where}: default = {default}: expected a value in [{low}, {high}]")
    if name in DOCUMENTED_FIELDS:
        _check_config_bounds(where, name, low, high)
    return Dimension(name=name, integer=integer, low=low, high=high, default=default, log=log)


def _choice(where: str, name: str, entry: Mapping[str, Any]) -> Choice:
    choices = entry.get("choices")
    if set(entry) != set(_CHOICE_KEYS) or not isinstance(choices, list | tuple) or not choices:
        raise UsageError(f"{where}: expected {', '.join(_CHOICE_KEYS)}, with a list of choices")
    if entry["default"] not in choices:
        raise UsageError(f"{where}: default = {entry['default']!r}: expected one of {choices}")
    return Choice(name=name, choices=tuple(map(str, choices)), default=str(entry["default"]))


def _log(where: str, entry: Mapping[str, Any], low: int | float) -> bool:
    """Whether a range is searched on a logarithmic scale, which can't reach zero."""
    log = entry.get("log", False)
    if not isinstance(log, bool | np.bool_):
        raise UsageError(f"{where}: log = {log!r}: expected true or false")
    if log and low <= 0:
        raise UsageError(f"{where}: low = {low}: expected a value above 0 on a logarithmic scale")
    return bool(log)


def _middle(low: int | float, high: int | float, *, integer: bool, log: bool) -> int | float:
    if log:
        middle = min(max(math.sqrt(low) * math.sqrt(high), low), high)
        return round(middle) if integer else middle
    return (low + high) // 2 if integer else (low + high) / 2


def _check_config_bounds(where: str, name: str, low: float, high: float) -> None:
    """A range of a VARConfig field may be wider than documented, but not than what is valid."""
    for value in (low, high):
        try:
            VARConfig(**{name: value})  # type: ignore[arg-type]
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None


def is_number(value: Any, *, integer: bool) -> bool:
    if isinstance(value, bool | np.bool_):
        return False
    if isinstance(value, int | np.integer):
        return True
    return not integer and isinstance(value, float | np.floating) and math.isfinite(value)
