"""What holds the speedup back, in figures, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HIGH_LEARNED_PCT, SEVERE_LEARNED_PCT = 70.0, 90.0
LOW_CACHE_HIT_RATE = 0.1
POOR_SCALING_RATIO = 0.8  # smallest speedup over the largest, of all shapes
ROUTING_SHARE = 0.05  # of our decisions in a forward's time
LITTLE_EXPERT_SHARE = 0.6  # of the experts in the unmodified forward's time
BACKEND_FACTOR = 0.95  # our path keeping all pairs against the baseline

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
        One dict per bottleneck: ``name``, ``severity`` (of `SEVERITIES`), ``evidence``,
        ``recommendation``.
    """
    stats, compared = systems["var"]["var_stats"], systems["comparison"]
    experts = f"{stats['experts_per_token']:.2f} of {stats['top_k']} experts per token"
    learned, cache = stats["learned_pct"], stats["cache_hit_rate"]
    factor, (low, high) = compared["backend_factor"]["median"], compared["actual_speedup_95"]
    scaling = sorted(systems["scaling"], key=lambda row: row["speedup"])
    worst, best = scaling[0], scaling[-1]
    rules = (
        (
            high < 1,
            "slowdown",
            "high",
            f"speedup {compared['actual_speedup']:.3f}x [{low:.3f}, {high:.3f}] at {experts}",
            "run fewer experts per token (`var-moe tune`), or use the unmodified model",
        ),
        (
            worst["speedup"] < POOR_SCALING_RATIO * best["speedup"],
            "poor_scaling",
            "medium",
            f"{_at(worst)} tokens, {_at(best)}",
            "gather more tokens in a forward: with few, calls and reading the experts' weights "
            "take the time, which dropping pairs does not save",
        ),
        (
            factor < BACKEND_FACTOR,
            "backend",
            "medium",
            f"our path ({systems['var']['backend']}) keeping all pairs runs at {factor:.3f}x of "
            "the fastest backend of transformers",
            "try another backend for executed pairs: routed(..., backend='grouped_mm') or 'eager'",
        ),
        (
            learned > HIGH_LEARNED_PCT,
            "high_learned_routing",
            "info" if always_asked else "high" if learned > SEVERE_LEARNED_PCT else "medium",
            f"{learned:.1f}% of decisions are the router's own; {experts}",
            "nothing to do: asking the router costs no measurable time, and confident "
            "LEARNED decisions are cut, too; look at experts per token"
            if always_asked
            else "raise entropy_threshold or lower frequency_threshold and confidence_threshold "
            "(`var-moe tune`), or use mode 'verified', which cuts sure learned decisions too",
        ),
        (
            uses_cache and cache < LOW_CACHE_HIT_RATE,
            "low_cache_utilization",
            "low" if always_asked else "medium",
            f"{100 * cache:.1f}% of the decisions that ask the cache are served by it "
            f"({stats['cached_pct']:.1f}% of all)",
            "a smaller context_window_size recurs more often; a larger cache_size and "
            "cache_ttl_seconds keep contexts longer; a lower confidence_threshold admits more",
        ),
        (
            policy_share > ROUTING_SHARE,
            "routing_overhead",
            "medium",
            f"our decisions take {100 * policy_share:.1f}% of a forward",
            "gather more tokens in a forward, or take a policy without a context cache (damage, "
            "or VAR with cache_size 0)",
        ),
        (
            experts_share < LITTLE_EXPERT_SHARE,
            "little_expert_share",
            "info",
            f"experts take {100 * experts_share:.1f}% of the unmodified forward; the leading "
            f"experts alone everywhere would give {compared['largest_speedup']:.3f}x",
            "no setting goes beyond that bound: speed up the rest (attention, head, calls), or "
            "take a model whose experts weigh more",
        ),
    )
    names = ("name", "severity", "evidence", "recommendation")
    there = [dict(zip(names, row, strict=True)) for holds, *row in rules if holds]
    return sorted(there, key=lambda row: SEVERITIES.index(row["severity"]))


def _at(row: Mapping[str, Any]) -> str:
    return f"{row['speedup']:.3f}x at {row['batch_size']} x {row['sequence']}"
