"""What holds the speedup back, in figures, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """One finding; ``severity`` is one of `SEVERITIES`."""

    name: str
    severity: str
    evidence: str
    recommendation: str

    def to_dict(self) -> dict[str, str]:
        """For result files."""
        return asdict(self)


def find_bottlenecks(
    systems: Mapping[str, Any],
    *,
    policy_share: float,
    experts_share: float,
    always_asked: bool,
    uses_cache: bool,
) -> list[Bottleneck]:
    """All findings, the gravest first.

    Args:
        systems: what ``systems_analysis.json`` holds of ``comparison``, ``var`` and ``scaling``.
        policy_share: of our decisions in the time of a routed forward.
        experts_share: of the experts in the time of the unmodified forward.
        always_asked: whether LEARNED decisions are cut too, as in verified mode.
        uses_cache: whether the policy has a context cache.
    """
    stats = systems["var"]["var_stats"]
    found = [
        *_speed(systems, stats),
        *_tiers(stats, always_asked=always_asked, uses_cache=uses_cache),
        *_machine(stats, policy_share),
    ]
    if experts_share < LITTLE_EXPERT_SHARE:
        most = systems["comparison"]["largest_speedup"]
        found.append(
            Bottleneck(
                name="little_expert_share",
                severity="info",
                evidence=f"experts take {100 * experts_share:.1f}% of the unmodified forward; the "
                f"leading experts alone everywhere would give {most:.3f}x",
                recommendation="no setting goes beyond that bound: speed up the rest (attention, "
                "head, calls), or take a model whose experts weigh more",
            )
        )
    return sorted(found, key=lambda one: SEVERITIES.index(one.severity))


def _speed(systems: Mapping[str, Any], stats: Mapping[str, Any]) -> Iterator[Bottleneck]:
    compared, scaling = systems["comparison"], systems["scaling"]
    low, high = compared["actual_speedup_95"]
    if high < 1:
        yield Bottleneck(
            name="slowdown",
            severity="high",
            evidence=f"speedup {compared['actual_speedup']:.3f}x [{low:.3f}, {high:.3f}] at "
            f"{stats['experts_per_token']:.2f} of {stats['top_k']} experts per token",
            recommendation="run fewer experts per token (`var-moe tune`), or use the unmodified "
            "model",
        )
    worst = min(scaling, key=lambda row: row["speedup"], default=None)
    best = max(scaling, key=lambda row: row["speedup"], default=None)
    if worst and best and worst["speedup"] < POOR_SCALING_RATIO * best["speedup"]:
        told = [
            f"{row['speedup']:.3f}x at {row['batch_size']} x {row['sequence']}"
            for row in (worst, best)
        ]
        yield Bottleneck(
            name="poor_scaling",
            severity="medium",
            evidence=f"{told[0]} tokens, {told[1]}",
            recommendation="gather more tokens in a forward: with few, calls and reading the "
            "experts' weights take the time, which dropping pairs does not save",
        )
    factor = compared["backend_factor"]["median"]
    if factor < BACKEND_FACTOR:
        yield Bottleneck(
            name="backend",
            severity="medium",
            evidence=f"our path ({systems['var']['backend']}) keeping all pairs runs at "
            f"{factor:.3f}x of the fastest backend of transformers",
            recommendation="try another backend for executed pairs: routed(..., "
            "backend='grouped_mm') or 'eager'",
        )


def _tiers(
    stats: Mapping[str, Any], *, always_asked: bool, uses_cache: bool
) -> Iterator[Bottleneck]:
    if stats["learned_pct"] > HIGH_LEARNED_PCT:
        severity = "high" if stats["learned_pct"] > SEVERE_LEARNED_PCT else "medium"
        yield Bottleneck(
            name="high_learned_routing",
            severity="info" if always_asked else severity,
            evidence=f"{stats['learned_pct']:.1f}% of decisions are the router's own; "
            f"{stats['experts_per_token']:.2f} of {stats['top_k']} experts per token",
            recommendation="none: this policy always asks the router, which costs nothing "
            "measurable, and cuts its decisions too; judge by experts per token"
            if always_asked
            else "raise entropy_threshold or lower frequency_threshold and confidence_threshold "
            "(`var-moe tune`), or use mode 'verified', which cuts sure learned decisions too",
        )
    if uses_cache and stats["cache_hit_rate"] < LOW_CACHE_HIT_RATE:
        yield Bottleneck(
            name="low_cache_utilization",
            severity="low" if always_asked else "medium",
            evidence=f"{100 * stats['cache_hit_rate']:.1f}% of the decisions that ask the cache "
            f"are served by it ({stats['cached_pct']:.1f}% of all)",
            recommendation="a smaller context_window_size recurs more often; a larger cache_size "
            "and cache_ttl_seconds keep contexts longer; a lower confidence_threshold admits more",
        )


def _machine(stats: Mapping[str, Any], policy_share: float) -> Iterator[Bottleneck]:
    if stats["expert_imbalance"] > IMBALANCE:
        yield Bottleneck(
            name="expert_imbalance",
            severity="low",
            evidence="in the most uneven layer the busiest expert runs "
            f"{stats['expert_imbalance']:.1f} times its even share of pairs",
            recommendation="no harm on one device; with experts on several, place the busy ones "
            "apart",
        )
    if policy_share > ROUTING_SHARE:
        yield Bottleneck(
            name="routing_overhead",
            severity="medium",
            evidence=f"our decisions take {100 * policy_share:.1f}% of a forward",
            recommendation="gather more tokens in a forward, or take a policy without a context "
            "cache (damage, or VAR with cache_size 0)",
        )
