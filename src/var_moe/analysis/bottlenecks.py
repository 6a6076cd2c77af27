"""What holds the speedup back, in figures, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

SLOWDOWN = 1.0
"""Speedup whose interval lies below this: VAR makes the model slower."""
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


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The measured figures that findings are made of."""

    speedup: float
    speedup_low: float
    speedup_high: float
    backend_factor: float
    backend_used: str
    learned_pct: float
    cached_pct: float
    cache_hit_rate: float
    experts_per_token: float
    top_k: int
    router_always_asked: bool  # verified mode, the damage policy: LEARNED decisions cut too
    uses_cache: bool
    scaling: Sequence[Mapping[str, Any]]
    imbalance: float
    routing_share: float
    experts_share: float
    bound: float  # speedup with the leading experts everywhere, predicted


def find_bottlenecks(facts: Facts) -> list[Bottleneck]:
    """All findings, the gravest first."""
    found = [*_speed(facts), *_tiers(facts), *_machine(facts)]
    return sorted(found, key=lambda one: SEVERITIES.index(one.severity))


def _speed(facts: Facts) -> Iterator[Bottleneck]:
    interval = f"{facts.speedup:.3f}x [{facts.speedup_low:.3f}, {facts.speedup_high:.3f}]"
    if facts.speedup_high < SLOWDOWN:
        yield Bottleneck(
            name="slowdown",
            severity="high",
            evidence=f"speedup {interval} at {facts.experts_per_token:.2f} of {facts.top_k} "
            "experts per token",
            recommendation="run fewer experts per token (`var-moe tune`), or use the unmodified "
            "model",
        )
    speeds = [row["speedup"] for row in facts.scaling]
    if speeds and min(speeds) < POOR_SCALING_RATIO * max(speeds):
        worst = min(facts.scaling, key=lambda row: row["speedup"])
        best = max(facts.scaling, key=lambda row: row["speedup"])
        yield Bottleneck(
            name="poor_scaling",
            severity="medium",
            evidence=f"{worst['speedup']:.3f}x at {worst['batch_size']} x {worst['sequence']} "
            f"tokens, {best['speedup']:.3f}x at {best['batch_size']} x {best['sequence']}",
            recommendation="gather more tokens in a forward: with few, calls and reading the "
            "experts' weights take the time, which dropping pairs does not save",
        )
    if facts.backend_factor < BACKEND_FACTOR:
        yield Bottleneck(
            name="backend",
            severity="medium",
            evidence=f"our path ({facts.backend_used}) keeping all pairs runs at "
            f"{facts.backend_factor:.3f}x of the fastest backend of transformers",
            recommendation="try another backend for executed pairs: routed(..., "
            "backend='grouped_mm') or 'eager'",
        )


def _tiers(facts: Facts) -> Iterator[Bottleneck]:
    if facts.learned_pct > HIGH_LEARNED_PCT:
        evidence = (
            f"{facts.learned_pct:.1f}% of decisions are the router's own; "
            f"{facts.experts_per_token:.2f} of {facts.top_k} experts per token"
        )
        if facts.router_always_asked:
            yield Bottleneck(
                name="high_learned_routing",
                severity="info",
                evidence=evidence,
                recommendation="none: this policy always asks the router, which costs nothing "
                "measurable, and cuts its decisions too; judge by experts per token",
            )
        else:
            yield Bottleneck(
                name="high_learned_routing",
                severity="high" if facts.learned_pct > SEVERE_LEARNED_PCT else "medium",
                evidence=evidence,
                recommendation="raise entropy_threshold or lower frequency_threshold and "
                "confidence_threshold (`var-moe tune`), or use mode 'verified', which cuts sure "
                "learned decisions too",
            )
    if facts.uses_cache and facts.cache_hit_rate < LOW_CACHE_HIT_RATE:
        yield Bottleneck(
            name="low_cache_utilization",
            severity="low" if facts.router_always_asked else "medium",
            evidence=f"{100 * facts.cache_hit_rate:.1f}% of the decisions that ask the cache are "
            f"served by it ({facts.cached_pct:.1f}% of all)",
            recommendation="a smaller context_window_size recurs more often; a larger cache_size "
            "and cache_ttl_seconds keep contexts longer; a lower confidence_threshold admits more",
        )


def _machine(facts: Facts) -> Iterator[Bottleneck]:
    if facts.imbalance > IMBALANCE:
        yield Bottleneck(
            name="expert_imbalance",
            severity="low",
            evidence=f"in the most uneven layer the busiest expert runs {facts.imbalance:.1f} "
            "times its even share of pairs",
            recommendation="no harm on one device; with experts on several, place the busy ones "
            "apart",
        )
    if facts.routing_share > ROUTING_SHARE:
        yield Bottleneck(
            name="routing_overhead",
            severity="medium",
            evidence=f"our decisions take {100 * facts.routing_share:.1f}% of a forward",
            recommendation="gather more tokens in a forward, or take a policy without a context "
            "cache (damage, or VAR with cache_size 0)",
        )
    if facts.experts_share < LITTLE_EXPERT_SHARE:
        yield Bottleneck(
            name="little_expert_share",
            severity="info",
            evidence=f"experts take {100 * facts.experts_share:.1f}% of the unmodified forward; "
            f"the leading experts alone everywhere would give {facts.bound:.3f}x",
            recommendation="no setting goes beyond that bound: speed up the rest (attention, head, "
            "calls), or take a model whose experts weigh more",
        )
