"""Each finding at both sides of its threshold."""

from __future__ import annotations

import pytest

from var_moe.analysis.bottlenecks import find_bottlenecks

WELL = {
    "speedup": 1.3,
    "speedup_low": 1.25,
    "speedup_high": 1.35,
    "backend_factor": 1.02,
    "learned_pct": 40.0,
    "cache_hit_rate": 0.4,
    "routing_share": 0.03,
    "experts_share": 0.75,
    "router_always_asked": False,
    "uses_cache": True,
    "scaling": [
        {"batch_size": 8, "sequence": 64, "speedup": 1.2},
        {"batch_size": 8, "sequence": 256, "speedup": 1.3},
    ],
}


def found(**changes):
    given = {**WELL, **changes}
    stats = {"learned_pct": given["learned_pct"], "cached_pct": 30.0, "top_k": 2}
    stats |= {"cache_hit_rate": given["cache_hit_rate"], "experts_per_token": 1.4}
    systems = {
        "comparison": {
            "actual_speedup": given["speedup"],
            "actual_speedup_95": [given["speedup_low"], given["speedup_high"]],
            "backend_factor": {"median": given["backend_factor"]},
            "largest_speedup": 1.6,
        },
        "var": {
            "backend": "sorted",
            "var_stats": stats,
        },
        "scaling": given["scaling"],
    }
    rows = find_bottlenecks(
        systems,
        policy_share=given["routing_share"],
        experts_share=given["experts_share"],
        always_asked=given["router_always_asked"],
        uses_cache=given["uses_cache"],
    )
    return {row["name"]: row for row in rows}


def test_a_good_run_has_none():
    assert found() == {}


@pytest.mark.parametrize(
    ("changes", "name", "severity", "figure"),
    [
        ({"speedup": 0.9, "speedup_low": 0.85, "speedup_high": 0.97}, "slowdown", "high", "0.900x"),
        ({"learned_pct": 80.0}, "high_learned_routing", "medium", "80.0%"),
        ({"learned_pct": 95.0}, "high_learned_routing", "high", "95.0%"),
        ({"cache_hit_rate": 0.05}, "low_cache_utilization", "medium", "5.0%"),
        ({"routing_share": 0.08}, "routing_overhead", "medium", "8.0%"),
        ({"backend_factor": 0.8}, "backend", "medium", "0.800x"),
        ({"experts_share": 0.4}, "little_expert_share", "info", "1.600x"),
        (
            {
                "scaling": [
                    {"batch_size": 1, "sequence": 64, "speedup": 0.9},
                    {"batch_size": 8, "sequence": 256, "speedup": 1.3},
                ]
            },
            "poor_scaling",
            "medium",
            "0.900x at 1 x 64",
        ),
    ],
)
def test_one_finding_each(changes, name, severity, figure):
    one = found(**changes)
    assert list(one) == [name]
    assert one[name]["severity"] == severity
    assert figure in one[name]["evidence"]
    assert one[name]["recommendation"]


def test_asking_the_router_by_design_is_no_alarm():
    one = found(learned_pct=100.0, router_always_asked=True)["high_learned_routing"]
    assert one["severity"] == "info"
    assert one["recommendation"].startswith("nothing to do:")


def test_a_slowdown_within_the_noise_is_none():
    assert found(speedup=0.98, speedup_low=0.9, speedup_high=1.05) == {}


def test_a_policy_without_a_cache_cannot_use_it_little():
    assert found(uses_cache=False, cache_hit_rate=0.0) == {}


def test_the_gravest_comes_first():
    names = list(found(speedup_high=0.9, experts_share=0.1, routing_share=0.2))
    assert names == ["slowdown", "routing_overhead", "little_expert_share"]
