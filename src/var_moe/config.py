"""VARConfig: the thresholds that decide which experts run, their presets and their JSON.

The six documented fields come first, with their documented names and defaults; a JSON file
with these six alone loads. What is valid here is wider than what the tuner searches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast, overload

from var_moe.errors import UsageError
from var_moe.storage import atomic_write_json, read_json

MODES = ("verified", "plain")
SEEDS = 2**32  # numpy, torch, Optuna and scikit-optimize take as many
MAX_DEGRADATION = 0.01
"""The bound on the relative perplexity change, wherever none is given."""
CACHE_SCOPES = ("shared", "document")
DOCUMENTED_FIELDS = (
    "frequency_threshold",
    "entropy_threshold",
    "confidence_threshold",
    "cache_size",
    "cache_ttl_seconds",
    "context_window_size",
)
_RANGES: dict[str, dict[str, Any]] = {
    "frequency_threshold": {"integer": True, "low": 0},
    "entropy_threshold": {"low": 0},
    "confidence_threshold": {"low": 0, "high": 1, "open_low": True},
    "cache_size": {"integer": True, "low": 0},
    "cache_ttl_seconds": {"low": 0, "open_low": True},
    "context_window_size": {"integer": True, "low": 1},
}
_CHOICES = {"mode": MODES, "cache_scope": CACHE_SCOPES, "residuals": (None, True, False)}


@dataclass(frozen=True, kw_only=True)
class VARConfig:
    """Thresholds of Verifiable Adaptive Routing.

    Args:
        frequency_threshold: occurrences of a token in the profile from which its table entry
            counts as known (>= 0).
        entropy_threshold: highest mean router entropy, in nats, of a token on the fast path (>= 0).
        confidence_threshold: routing mass of the leading experts from which a decision is cached,
            and in verified mode cut, in (0, 1].
        cache_size: keys that the context cache holds, least recently used evicted first (>= 0).
        cache_ttl_seconds: seconds that an entry lives, from its first insertion (> 0).
        context_window_size: token ids in a cache key, the token itself included (>= 1).
        mode: ``"verified"`` asks the router and lets a table or cache entry only license the cut;
            ``"plain"`` runs the stored experts unseen.
        residuals: add the calibration mean of what was dropped; ``None`` means on in verified
            mode, off in plain mode, where it is not defined.
        cache_scope: ``"shared"`` keeps the cache over documents, ``"document"`` empties it at
            each document's start.

    Raises:
        UsageError: a value is of the wrong type or out of its range; names field, value, range.
    """

    frequency_threshold: int = 50
    entropy_threshold: float = 0.5
    confidence_threshold: float = 0.8
    cache_size: int = 1000
    cache_ttl_seconds: float = 60
    context_window_size: int = 4
    mode: str = "verified"
    residuals: bool | None = None
    cache_scope: str = "shared"

    def __post_init__(self) -> None:
        for name, limits in _RANGES.items():
            check_number(f"VARConfig.{name}", getattr(self, name), **limits)
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                expected = ", ".join(map(str, choices))
                raise UsageError(f"VARConfig.{name} = {value!r}: expected one of {expected}")
        if self.residuals and self.mode == "plain":
            raise UsageError(
                "VARConfig.residuals = true with mode 'plain': residual means need the router's "
                "own choice; use mode 'verified' or residuals false"
            )

    @property
    def uses_residuals(self) -> bool:
        """Whether residual means are added: `residuals`, or by default in verified mode."""
        return self.mode == "verified" if self.residuals is None else self.residuals

    @classmethod
    def preset(cls, name: str, **changes: Any) -> VARConfig:
        """The preset ``name`` (conservative, balanced, aggressive), with ``changes`` on top."""
        if name not in PRESETS:
            raise UsageError(f"preset {name!r}: expected one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "VARConfig") -> VARConfig:
        """Build from a mapping; unknown keys are rejected by name, missing ones get defaults."""
        if not isinstance(values, Mapping):
            raise UsageError(f"{source}: expected a JSON object of VARConfig fields")
        known = [f.name for f in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise UsageError(
                f"{source}: unknown field {unknown[0]!r}; VARConfig has {', '.join(known)}"
            )
        try:
            return cls(**plain(values))
        except UsageError as error:
            raise UsageError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """All fields, the six documented ones first."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def documented(self) -> dict[str, Any]:
        """The six documented fields alone."""
        return {name: getattr(self, name) for name in DOCUMENTED_FIELDS}

    def replace(self, **changes: Any) -> VARConfig:
        """A copy with ``changes``."""
        return replace(self, **changes)

    def save(self, path: str | Path) -> None:
        """Write the JSON file, whole or not at all."""
        atomic_write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> VARConfig:
        """Read a JSON file that `save` wrote, or one with the six documented fields."""
        return cls.from_dict(read_json(path, what="VAR configuration"), source=str(path))


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with Python's own numbers in place of numpy's, which searches and sweeps give."""
    return {name: _python(value) for name, value in values.items()}


def _python(value: Any) -> Any:
    return value.item() if getattr(value, "ndim", 1) == 0 else value


def check_number(
    name: str,
    value: Any,
    *,
    integer: bool = False,
    low: float,
    high: float = math.inf,
    open_low: bool = False,
) -> None:
    """Raise UsageError, with ``name``, value and range, unless the value lies in [low, high]."""
    kind = "an integer" if integer else "a number"
    bracket = "(" if open_low else "["
    upper = "∞)" if math.isinf(high) else f"{high}]"
    expected = f"{name} = {value!r}: expected {kind} in {bracket}{low}, {upper}"
    if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
        raise UsageError(expected)
    if not math.isfinite(value) or value > high or value < low or (open_low and value == low):
        raise UsageError(expected)


@overload
def check_count(name: str, value: None, least: int = 1) -> None: ...
@overload
def check_count(name: str, value: Any, least: int = 1) -> int: ...
def check_count(name: str, value: Any, least: int = 1) -> int | None:
    """``value`` as a number of things; None, where there is no limit, passes.

    Raises:
        UsageError: it is no integer, or below ``least``; names it.
    """
    value = _python(value)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{name} = {value!r}: expected an integer of at least {least}")
    return value


PRESETS: dict[str, dict[str, Any]] = {
    name: dict(zip(DOCUMENTED_FIELDS, values, strict=True))
    for name, values in (
        ("conservative", (100, 0.3, 0.9, 500, 30, 4)),
        ("balanced", (50, 0.5, 0.8, 1000, 60, 4)),
        ("aggressive", (25, 0.7, 0.7, 2000, 120, 4)),
    )
}
"""The documented presets; each is a full configuration in the default mode."""

SEARCH_SPACE: dict[str, dict[str, Any]] = {
    "frequency_threshold": {"type": "int", "low": 10, "high": 200, "default": 50},
    "entropy_threshold": {"type": "float", "low": 0.1, "high": 1.5, "default": 0.5},
    "confidence_threshold": {"type": "float", "low": 0.5, "high": 0.95, "default": 0.8},
    "cache_size": {"type": "int", "low": 100, "high": 5000, "default": 1000},
    "cache_ttl_seconds": {"type": "int", "low": 10, "high": 300, "default": 60},
    "context_window_size": {"type": "int", "low": 2, "high": 8, "default": 4},
}
"""The documented search space of VARConfig's six thresholds."""


def check_seed(seed: Any) -> int | None:
    """``seed`` as Python's own number; UsageError unless it is None or an integer below 2**32."""
    seed = _python(seed)
    if seed is not None:
        check_number("seed", seed, integer=True, low=0, high=SEEDS - 1)
    return cast("int | None", seed)


def check_bound(value: float) -> float:
    """``value`` as a bound on the degradation; UsageError unless it is a number of at least 0."""
    check_number("max_degradation", value, low=0)
    return float(value)
