"""Whether searches' winners decide alike: each replayed on one trace that all have in common."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from var_moe.calibration.fitted_files import load_compensation
from var_moe.calibration.profile import RoutingProfile
from var_moe.config import VARConfig
from var_moe.errors import UsageError
from var_moe.optimization.candidate import Candidate, policy_of
from var_moe.optimization.replay_forecast import trace_folder
from var_moe.optimization.seed_runs import SeedRun
from var_moe.optimization.validation import find_profile
from var_moe.routing.base import RoutingPolicy
from var_moe.tracing.executed import executed_experts, share_alike
from var_moe.tracing.policies import evaluate_policy
from var_moe.tracing.replay import TraceReplay
from var_moe.tracing.shards import HEAD_FILE
from var_moe.tracing.trace import RoutingTrace


def agreement(
    runs: Sequence[SeedRun], *, profile: Path | None = None
) -> tuple[dict[str, Any] | None, str]:
    """What each winner decides on a common trace, and how often two decide alike.

    Args:
        runs: with a winner each.
        profile: profile folder, where none lies in the results folders.

    Returns:
        Per winner experts per token and predicted degradation; per pair the share of (layer,
        token) for which both run the same experts. Or None, and why.
    """
    if len(runs) < 2:
        return None, ""
    place = _trace_of(runs)
    if place is None:
        return None, "no trace in the results folders: the winners' decisions are not compared"
    try:
        traces: dict[Path, RoutingTrace] = {}

        def trace_of(run: SeedRun) -> RoutingTrace:
            own = trace_folder(place, run.compensation or "")
            found = own if (own / HEAD_FILE).is_file() else trace_folder(place)
            if found not in traces:
                traces[found] = RoutingTrace.load(found)
            return traces[found]

        rows = [(run.seed, run.winner, _profile(run, profile), trace_of(run)) for run in runs]
        return compare(rows), ""
    except UsageError as error:
        return None, f"the winners' decisions are not compared: {error}"


def compare(
    winners: Sequence[tuple[int, Candidate | None, RoutingProfile, RoutingTrace]],
) -> dict[str, Any]:
    """Winners, by seed, on a trace of one text with their own compensation; see `agreement`.

    Raises:
        UsageError: a profile or a compensation is not the one that the trace was recorded with.
    """
    rows, executed = [], {}
    for seed, winner, profile, trace in winners:
        assert winner is not None
        policy = policy_of(winner, profile)
        executed[seed] = executed_experts(trace, policy)
        rows.append(
            {
                "seed": seed,
                "experts_per_token": float((executed[seed] >= 0).sum())
                / (trace.layers * trace.tokens),
                "predicted_degradation": _predicted(trace, winner, policy, profile),
            }
        )
    alike = {
        (one, other): 100 * share_alike(executed[one], executed[other])
        for one, other in combinations(executed, 2)
    }
    shares = list(alike.values())
    return {
        "trace": {name: trace.head[name] for name in ("dataset", "data_hash", "tokens")},
        "decisions": trace.layers * trace.tokens,
        "winners": rows,
        "pairs": [{"seeds": list(seeds), "alike_pct": share} for seeds, share in alike.items()],
        "alike_pct_mean": sum(shares) / len(shares),
        "alike_pct_min": min(shares),
    }


def _predicted(
    trace: RoutingTrace, winner: Candidate, policy: RoutingPolicy, profile: RoutingProfile
) -> float | None:
    if not trace.damage:
        return None
    if isinstance(winner, VARConfig):
        return TraceReplay(trace, profile).evaluate(winner).degradation
    return evaluate_policy(trace, policy).degradation


def _trace_of(runs: Sequence[SeedRun]) -> Path | None:
    """The first folder with a trace: a run's, or the one that runs of several seeds share."""
    places = [place for run in runs for place in (run.folder, run.folder.parent)]
    return next((one for one in places if (trace_folder(one) / HEAD_FILE).is_file()), None)


def _profile(run: SeedRun, given: Path | None) -> RoutingProfile:
    profile = find_profile(run.config, given)
    fitted = run.known("compensation_folder")
    return profile if fitted is None else profile.with_compensation(load_compensation(fitted))
