"""What holds the speedup back, in figures, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HIGH_LEARNED_PCT, SEVERE_LEARNED_PCT = 70.0, 90.0
LOW_CACHE_HIT_RATE = 0.1
POOR_SCALING_RATIO = 0.8
"""Smallest speedup over the largest, of all sequence lengths and batch sizes."""
IMBALANCE = 2.0
"""The busiest expert's pairs over the mean of its layer, in the worst layer."""
ROUTING_SHARE = 0.05
"""Our decisions' share of a forward's time."""
LITTLE_EXPERT_SHARE = 0.6
"""Experts' share of the unmodified forward below which the speedup is bounded low."""
BACKEND_FACTOR = 0.95
"""Our path keeping all pairs against the baseline: below this, the backend costs speed."""

SEVERITIES = ("high", "medium", "low", "info")


def find_bottlenecks(
    systems: Mapping[str, Any],
    *,
    policy_share: float,
    experts_share: float,
    always_asked: bool,
    uses_cache: bool,
) -> list[dict[str, str]]:
    """All that holds the speedup back, the gravest first.

    Args:
        systems: what ``systems_analysis.json`` holds of ``comparison``, ``var`` and ``scaling``.
        policy_share: of our decisions in the time of a routed forward.
        experts_share: of the experts in the time of the unmodified forward.
        always_asked: whether LEARNED decisions are cut too, as in verified mode.
        uses_cache: whether the policy has a context cache.

    Returns:
        Of each ``name``, ``severity`` (of `SEVERITIES`), ``evidence`` and ``recommendation``.
    """
    stats, compared = systems["var"]["var_stats"], systems["comparison"]
    bottlenecks: list[dict[str, str]] = []

    def add(name: str, severity: str, evidence: str, recommendation: str) -> None:
        row = {"name": name, "severity": severity, "evidence": evidence}
        bottlenecks.append({**row, "recommendation": recommendation})

    experts = f"{stats['experts_per_token']:.2f} of {stats['top_k']} experts per token"
    low, high = compared["actual_speedup_95"]
    if high < 1:
        add(
            "slowdown",
            "high",
            f"speedup {compared['actual_speedup']:.3f}x [{low:.3f}, {high:.3f}] at {experts}",
            "run fewer experts per token (`var-moe tune`), or use the unmodified model",
        )
    scaling = sorted(systems["scaling"], key=lambda row: row["speedup"])
    if scaling and scaling[0]["speedup"] < POOR_SCALING_RATIO * scaling[-1]["speedup"]:
        worst, best = (
            f"{row['speedup']:.3f}x at {row['batch_size']} x {row['sequence']}"
            for row in (scaling[0], scaling[-1])
        )
        add(
            "poor_scaling",
            "medium",
            f"{worst} tokens, {best}",
            "gather more tokens in a forward: with few, calls and reading the experts' weights "
            "take the time, which dropping pairs does not save",
        )
    factor = compared["backend_factor"]["median"]
    if factor < BACKEND_FACTOR:
        add(
            "backend",
            "medium",
            f"our path ({systems['var']['backend']}) keeping all pairs runs at {factor:.3f}x of "
            "the fastest backend of transformers",
            "try another backend for executed pairs: routed(..., backend='grouped_mm') or 'eager'",
        )
    if stats["learned_pct"] > HIGH_LEARNED_PCT:
        severity = "high" if stats["learned_pct"] > SEVERE_LEARNED_PCT else "medium"
        add(
            "high_learned_routing",
            "info" if always_asked else severity,
            f"{stats['learned_pct']:.1f}% of decisions are the router's own; {experts}",
            "none: this policy always asks the router, which costs nothing measurable, and cuts "
            "its decisions too; judge by experts per token"
            if always_asked
            else "raise entropy_threshold or lower frequency_threshold and confidence_threshold "
            "(`var-moe tune`), or use mode 'verified', which cuts sure learned decisions too",
        )
    if uses_cache and stats["cache_hit_rate"] < LOW_CACHE_HIT_RATE:
        add(
            "low_cache_utilization",
            "low" if always_asked else "medium",
            f"{100 * stats['cache_hit_rate']:.1f}% of the decisions that ask the cache are served "
            f"by it ({stats['cached_pct']:.1f}% of all)",
            "a smaller context_window_size recurs more often; a larger cache_size and "
            "cache_ttl_seconds keep contexts longer; a lower confidence_threshold admits more",
        )
    if policy_share > ROUTING_SHARE:
        add(
            "routing_overhead",
            "medium",
            f"our decisions take {100 * policy_share:.1f}% of a forward",
            "gather more tokens in a forward, or take a policy without a context cache (damage, "
            "or VAR with cache_size 0)",
        )
    if stats["expert_imbalance"] > IMBALANCE:
        add(
            "expert_imbalance",
            "low",
            "in the most uneven layer the busiest expert runs "
            f"{stats['expert_imbalance']:.1f} times its even share of pairs",
            "no harm on one device; with experts on several, place the busy ones apart",
        )
    if experts_share < LITTLE_EXPERT_SHARE:
        add(
            "little_expert_share",
            "info",
            f"experts take {100 * experts_share:.1f}% of the unmodified forward; the leading "
            f"experts alone everywhere would give {compared['largest_speedup']:.3f}x",
            "no setting goes beyond that bound: speed up the rest (attention, head, calls), or "
            "take a model whose experts weigh more",
        )
    return sorted(bottlenecks, key=lambda row: SEVERITIES.index(row["severity"]))
