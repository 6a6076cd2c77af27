"""Figures as text, one way for all pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MOST_HOVERED = 2000
"""Marks with text of their own; an exhaustive grid can have many thousands."""


def percent(share: float | None, digits: int = 2) -> str:
    """A relative change with its sign, as +0.92%."""
    return "" if share is None else f"{100 * share:+.{digits}f}%"


def limit(share: float) -> str:
    """A bound, as 1%."""
    return f"{100 * share:g}%"


def factor(value: float | None) -> str:
    """A speedup, as 1.354x."""
    return "" if value is None else f"{value:.3f}x"


def between(ends: Sequence[float] | None, digits: int = 3) -> str:
    """An interval, as [1.255, 1.472]."""
    return "" if not ends else f"[{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"


def change(row: Mapping[str, Any]) -> str:
    """A degradation with its one-sided upper bound."""
    return f"{percent(row['degradation'])} ({percent(row['degradation_upper_95'])})"


def speedup(row: Mapping[str, Any], missing: str = "not timed") -> str:
    """A speedup with its interval."""
    if row.get("speedup") is None:
        return missing
    return f"{factor(row['speedup'])} {between(row.get('speedup_95'))}".strip()


def tiers(row: Mapping[str, Any]) -> str:
    """Fast, cached, learned in percent."""
    return " / ".join(f"{row[name]:.1f}" for name in ("fast_pct", "cached_pct", "learned_pct"))


def setting(value: Any) -> str:
    """A parameter's value, short."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def settings(config: Mapping[str, Any]) -> str:
    """A configuration's own parameters on one line."""
    inner = config.get("settings", config)
    return ", ".join(f"{name} {setting(value)}" for name, value in inner.items())


def kind(config: Mapping[str, Any]) -> str:
    """What decides: VAR in a mode, or a policy, and what stands in for dropped experts."""
    if "policy" not in config:
        return f"VAR, {config.get('mode', 'verified')} mode"
    stand_in = config.get("compensation")
    return f"policy {config['policy']}" + (f", compensation {stand_in}" if stand_in else "")


def hover(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a mark of each evaluation tells when it is pointed at."""
    if len(rows) > MOST_HOVERED:
        return []
    return [
        f"{settings(row['params']).replace(', ', '<br>')}<br>perplexity "
        f"{percent(row['degradation'])}<br>{row['experts_per_token']:.2f} experts per token"
        for row in rows
    ]
