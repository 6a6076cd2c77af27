"""How well the cost model predicts configurations that it was not fitted to.

    python -m benchmarks.prediction --profile results/phase3/profile --output results/prediction

The cost model is fitted once per policy, as `var-moe tune` and `analyze` do. The forwards that it
is fitted to, the baseline, and configurations that no fit has seen are timed in one run of
interleaved blocks: on a shared machine the baseline and our kernels do not slow down alike, so
that a fit of one minute is off by up to 20% in the next, which is the machine and not the model.

What is predicted: VAR at several thresholds in both modes, the damage policy with the profile's
learned compensation at several taus, and some of these in a batch shape that is not fitted. A
configuration's figure is its time relative to the baseline's in the fitted setting (the inverse of
its speedup, there); the error is predicted / measured - 1. Decisions are counted in the timed run
itself: what is tested is time, not the forecast of decisions.

Written are ``prediction.json``: each configuration's measured, predicted and error, the median and
largest, and the cost models.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from var_moe.calibration.profile import RoutingProfile
from var_moe.config import VARConfig
from var_moe.errors import UsageError
from var_moe.evaluation.cost import CostModel, FitTiming
from var_moe.evaluation.evaluator import Evaluator
from var_moe.evaluation.speed_setting import SpeedSetting
from var_moe.evaluation.throughput import Ratio, backend_arm, policy_arm, time_groups
from var_moe.execution.session import routed
from var_moe.models.loading import load_model
from var_moe.optimization.candidate import Candidate
from var_moe.optimization.preparation import read_text, sample_documents
from var_moe.storage import SCHEMA_VERSION, atomic_write_json, jsonable, provenance

UNFITTED = SpeedSetting(batch_size=4, sequence=256)
LIMIT = 0.10
TAUS = (0.002, 0.0045, 0.009, 0.02)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A configuration in a batch shape."""

    name: str
    candidate: Candidate
    fit: str  # which cost model predicts it
    setting: SpeedSetting


def cases(profile: RoutingProfile) -> list[Case]:
    """What is predicted."""
    usual = SpeedSetting()
    verified = {
        "balanced": VARConfig.preset("balanced"),
        "aggressive": VARConfig.preset("aggressive"),
        "confidence 0.9": VARConfig(frequency_threshold=10, confidence_threshold=0.9),
        "confidence 0.6": VARConfig(frequency_threshold=10, confidence_threshold=0.6),
    }
    plain = {
        "balanced": VARConfig.preset("balanced", mode="plain"),
        "aggressive": VARConfig.preset("aggressive", mode="plain"),
        "entropy 1.5": VARConfig(
            mode="plain", entropy_threshold=1.5, confidence_threshold=0.5, context_window_size=2
        ),
    }
    found = [
        Case(name=f"{mode} {name}", candidate=Candidate.of(config), fit=mode, setting=usual)
        for mode, configs in (("verified", verified), ("plain", plain))
        for name, config in configs.items()
    ]
    stand_in = profile.best_compensation()
    found += [
        Case(
            name=f"damage, tau {tau:g}, compensation {stand_in}",
            candidate=Candidate(policy="damage", settings={"tau": tau}, compensation=stand_in),
            fit="damage",
            setting=usual,
        )
        for tau in TAUS
    ]
    other = [case for case in found if case.name.startswith(("verified conf", "damage, tau 0.00"))]
    return found + [
        Case(
            name=f"{case.name}, {UNFITTED.batch_size} x {UNFITTED.sequence}",
            candidate=case.candidate,
            fit=case.fit,
            setting=UNFITTED,
        )
        for case in other
    ]


def fits(
    evaluator: Evaluator, profile: RoutingProfile, todo: list[Case], blocks: int
) -> dict[str, FitTiming]:
    """What a cost model is fitted to, for each policy with that policy's own cost."""
    found: dict[str, FitTiming] = {}
    for case in todo:
        if case.fit in found:
            continue
        most, least = case.candidate.cost_policies(profile, evaluator.top_k) or (None, None)
        found[case.fit] = FitTiming(evaluator, var_all=most, var_leading=least, blocks=blocks)
    return found


def measure(
    evaluator: Evaluator, profile: RoutingProfile, todo: list[Case], blocks: int
) -> tuple[list[dict[str, Any]], dict[str, CostModel]]:
    """Time all cases, the baseline and the fits in one run; each case beside its prediction."""
    model = evaluator.model
    settings = list(dict.fromkeys(case.setting for case in todo))
    policies = {case.name: case.candidate.make(profile) for case in todo}
    groups = []
    for setting in settings:
        arms: dict[str, Any] = {"baseline": backend_arm(model, evaluator.baseline_backend)}
        for case in todo:
            if case.setting == setting:
                arms[case.name] = policy_arm(
                    model, policies[case.name], backend=evaluator.running_backend
                )
        groups.append(setting.group(evaluator.documents, arms, blocks=blocks))
    plans = fits(evaluator, profile, todo, blocks)
    timed = time_groups(
        model,
        [*groups, *(group for plan in plans.values() for group in plan.groups)],
        blocks=blocks,
        progress=lambda d, t: print(f"timing: block {d}/{t}"),
    )
    rest = iter(timed[len(groups) :])
    costs = {name: plan.fitted([next(rest) for _ in plan.groups]) for name, plan in plans.items()}
    for name, cost in costs.items():
        print(f"fitted {name}: error of timings left out {100 * cost.error:.1f}%")
    reference = timed[0].seconds["baseline"] / settings[0].block_forwards
    rows = []
    for case in todo:
        at = settings.index(case.setting)
        each = timed[at].seconds[case.name] / case.setting.block_forwards
        running = routed(model, policies[case.name], backend=evaluator.running_backend)
        with running as session, torch.inference_mode():
            session.reset()
            for ids in groups[at].batches:
                model(input_ids=ids.to(model.device), use_cache=False)
            ran = session.report()
        cost = costs[case.fit]
        work = cost.work(
            ran.executed_pairs,
            tokens=ran.tokens,
            setting=case.setting,
            residual=policies[case.name].adds_residual,
        )
        measured = _ratio(each, reference)
        predicted = cost.predict(work) / cost.baseline
        rows.append(
            {
                "name": case.name,
                "kind": case.candidate.kind,
                "config": case.candidate.to_dict(),
                "setting": case.setting.to_dict(),
                "experts_per_token": ran.experts_per_token,
                "measured_relative_time": measured.median,
                "measured_relative_time_95": [measured.low, measured.high],
                "predicted_relative_time": predicted,
                "error_pct": 100 * (predicted / measured.median - 1),
            }
        )
    return rows, costs


def _ratio(each: np.ndarray, reference: np.ndarray) -> Ratio:
    from var_moe.evaluation.throughput import Timings

    return Timings({"case": each, "baseline": reference}, tokens=1).ratio("case", "baseline")


def report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Print the rows; returns median and largest error."""
    print(f"{'configuration':58} experts   measured [95%]          predicted   error")
    for row in rows:
        low, high = row["measured_relative_time_95"]
        print(
            f"{row['name']:58} {row['experts_per_token']:7.3f}   "
            f"{row['measured_relative_time']:.3f} [{low:.3f}, {high:.3f}]    "
            f"{row['predicted_relative_time']:9.3f}  {row['error_pct']:+6.1f}%"
        )
    errors = [abs(row["error_pct"]) for row in rows]
    found = {
        "configurations": len(rows),
        "error_pct_median": float(np.median(errors)),
        "error_pct_max": max(errors),
        "all_below_limit": max(errors) < 100 * LIMIT,
        "limit_pct": 100 * LIMIT,
    }
    print(
        f"{len(rows)} configurations that were not fitted: error {found['error_pct_median']:.1f}% "
        f"in the median, {found['error_pct_max']:.1f}% at most"
    )
    return found


def main() -> None:
    """Fit, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dataset", default="demo")
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/prediction"))
    args = parser.parse_args()
    try:
        loaded = load_model(args.model)
        text = read_text(args.dataset, "validation", loaded)
        profile = RoutingProfile.load(args.profile)
        profile.check_loaded(loaded)
    except UsageError as error:
        raise SystemExit(f"error: {error}") from None
    documents = sample_documents(text.documents, args.documents, args.seed)
    evaluator = Evaluator(loaded, documents)
    todo = cases(profile)
    rows, costs = measure(evaluator, profile, todo, args.blocks)
    result = {
        "schema_version": SCHEMA_VERSION,
        "summary": report(rows),
        "rows": rows,
        "baseline_backend": evaluator.baseline_backend,
        "blocks": args.blocks,
        "cost_models": {name: cost.to_dict() for name, cost in costs.items()},
        "profile_hash": profile.hash,
        "text": {**text.to_dict(), "sampled_documents": args.documents},
        "seed": args.seed,
        "model": {"name": loaded.name, "revision": loaded.revision, "dtype": loaded.dtype},
        "provenance": provenance(),
    }
    atomic_write_json(args.output / "prediction.json", jsonable(result))
    print(f"Saved: {args.output / 'prediction.json'}")


if __name__ == "__main__":
    main()
