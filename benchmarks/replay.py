"""How fast a replay is, and how well it predicts what a full evaluation measures.

    python benchmarks/replay.py --profile results/phase3/profile --output results/benchmarks/replay

1. time: one full evaluation (scoring the text with the router at work, the baseline's losses
   known) against one replayed configuration on the same tokens, for texts of several sizes. A
   replay pays for everything but the stack distances of its context window, then with them too;
2. agreement: random configurations of the search space in each mode, measured on the whole
   model and replayed: tiers, experts per token, degradation;
3. speed: the cost model's speedup of replayed decisions against the measured one.

The result file is written after each configuration, and the same command goes on from it; the
folder of another benchmark's settings is refused. With full sizes this takes an hour or more.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from var_moe.calibration.profile import RoutingProfile
from var_moe.config import SEARCH_SPACE, VARConfig
from var_moe.errors import UsageError
from var_moe.evaluation.batching import drawn
from var_moe.evaluation.cost import CostModel, fit_cost_model
from var_moe.evaluation.evaluator import Evaluator
from var_moe.models.loading import LoadedModel, load_model
from var_moe.optimization.candidate import preset
from var_moe.optimization.preparation import EncodedText, read_text, sample_documents
from var_moe.optimization.search_space import sample
from var_moe.routing.var import VARPolicy
from var_moe.storage import SCHEMA_VERSION, atomic_write_json, jsonable, provenance, read_json
from var_moe.tracing.record import record_trace
from var_moe.tracing.replay import TraceReplay
from var_moe.tracing.trace import RoutingTrace

MODES = ("verified", "plain")
REPEATS = 5


class Bench:
    """The benchmark's subject and its result file."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.loaded: LoadedModel = load_model(args.model)
        self.text: EncodedText = read_text(args.dataset, "validation", self.loaded)
        self.profile = RoutingProfile.load(args.profile)
        self.profile.check_loaded(self.loaded)
        self.path = args.output / "replay.json"
        settings = {
            "model": args.model,
            "text": {**self.text.to_dict(), "sampled_documents": args.documents},
            "profile_hash": self.profile.hash,
            "configurations_per_mode": args.configurations,
            "sizes_tokens": args.sizes,
            "speeds": args.speeds,
            "blocks": args.blocks,
            "seed": args.seed,
        }
        settings = jsonable(settings)
        self.result: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "settings": settings,
            "provenance": provenance(),
            "time": [],
            "agreement": {mode: [] for mode in MODES},
            "speed": [],
        }
        if self.path.is_file():
            kept = read_json(self.path)
            if kept.get("settings") != settings:
                raise UsageError(f"{self.path}: of other settings; choose another --output")
            self.result = kept

    def save(self) -> None:
        atomic_write_json(self.path, jsonable(self.result))

    def policy(self, config: VARConfig) -> VARPolicy:
        return VARPolicy(config, self.profile.table(), residuals=self.profile.residuals)

    def replay(self, documents: Sequence[Any], name: str) -> TraceReplay:
        trace = record_trace(
            self.loaded,
            documents,
            dataset=self.text.dataset,
            data_hash=self.text.data_hash,
            folder=self.args.output / name,
            profile=self.profile,
            tokens_per_batch=Evaluator(self.loaded, documents).tokens_per_batch,
        )
        return TraceReplay(trace, self.profile)

    def config(self, number: int, mode: str) -> VARConfig:
        return VARConfig.from_dict({**sample(SEARCH_SPACE, self.args.seed, number), "mode": mode})


def seconds(action: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure_time(bench: Bench) -> None:
    """Ratios of full evaluation to replay, configuration by configuration, on growing texts."""
    rows: list[dict[str, Any]] = bench.result["time"]
    for size in bench.args.sizes:
        documents = list(drawn(bench.text.documents, size, 0).values())
        done = [row for row in rows if row["asked_tokens"] == size]
        if len(done) >= bench.args.timed:
            continue
        replay = bench.replay(documents, f"trace-{size}")
        evaluator = Evaluator(bench.loaded, documents)
        _ = evaluator.baseline_losses  # known before any evaluation of a search
        for number in range(len(done), bench.args.timed):
            config = bench.config(1000 + number, MODES[number % len(MODES)])
            row = time_one(bench, evaluator, replay.trace, config)
            rows.append({"asked_tokens": size, "tokens": replay.trace.tokens, **row})
            bench.save()
            ratio = row["full_s"] / row["replay_s"]
            print(f"time: {replay.trace.tokens:,} tokens, {ratio:,.0f}x")


def time_one(
    bench: Bench, evaluator: Evaluator, trace: RoutingTrace, config: VARConfig
) -> dict[str, Any]:
    """One configuration in full and replayed, one after the other."""
    policy = bench.policy(config)
    alone, with_distances = [], []
    for _ in range(REPEATS):
        replay = TraceReplay(trace, bench.profile)
        with_distances.append(seconds(partial(replay.evaluate, config)))
        # Another configuration leaves the stack distances of the window, and nothing else.
        replay.evaluate(config.replace(cache_size=config.cache_size + 1))
        alone.append(seconds(partial(replay.evaluate, config)))
    return {
        "config": config.to_dict(),
        "full_s": seconds(lambda: evaluator.quality(policy)),
        "replay_s": float(np.median(alone)),
        "replay_with_distances_s": float(np.median(with_distances)),
    }


def measure_agreement(bench: Bench, evaluator: Evaluator, replay: TraceReplay) -> None:
    """Random configurations, measured and replayed."""
    for mode in MODES:
        rows: list[dict[str, Any]] = bench.result["agreement"][mode]
        for number in range(len(rows), bench.args.configurations):
            config = bench.config(number, mode)
            measured = evaluator.quality(bench.policy(config))
            found = replay.evaluate(config)
            rows.append(
                {
                    "config": config.to_dict(),
                    "learned_pct": measured.report.learned_pct,
                    "replayed_learned_pct": found.report.learned_pct,
                    "experts_per_token": measured.report.experts_per_token,
                    "replayed_experts_per_token": found.report.experts_per_token,
                    "degradation": measured.change.value,
                    "degradation_standard_error": measured.change.standard_error,
                    "predicted_degradation": found.degradation,
                }
            )
            bench.save()
            print(f"agreement: {mode} {number + 1}/{bench.args.configurations}")


def measure_speed(bench: Bench, evaluator: Evaluator, replay: TraceReplay) -> None:
    """The cost model's speedups against measured ones, modes in turn."""
    if not bench.args.speeds:
        return
    if "cost_model" not in bench.result:
        # VAR's own policies, whose decisions cost time too.
        own = preset("balanced").cost_policies(bench.profile, evaluator.top_k)
        var_all, var_leading = own or (None, None)
        cost = fit_cost_model(evaluator, var_all=var_all, var_leading=var_leading)
        bench.result["cost_model"] = cost.to_dict()
        bench.save()
    cost = CostModel.from_dict(bench.result["cost_model"])
    rows: list[dict[str, Any]] = bench.result["speed"]
    for number in range(len(rows), bench.args.speeds):
        config = bench.config(number // len(MODES), MODES[number % len(MODES)])
        speed = evaluator.speed(bench.policy(config), blocks=bench.args.blocks, factors=False)
        report, residual = replay.evaluate(config).report, config.uses_residuals
        rows.append(
            {
                "config": config.to_dict(),
                "speedup": speed.speedup.median,
                "speedup_95": [speed.speedup.low, speed.speedup.high],
                "predicted_speedup": cost.speedup(report, residual=residual),
                "experts_per_token": report.experts_per_token,
            }
        )
        bench.save()
        print(f"speed: {number + 1}/{bench.args.speeds}")


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """The figures that the benchmark is for."""
    found: dict[str, Any] = {"time": [], "agreement": {}}
    for size in dict.fromkeys(row["tokens"] for row in result["time"]):
        rows = [row for row in result["time"] if row["tokens"] == size]
        ratios = [row["full_s"] / row["replay_s"] for row in rows]
        slow = [row["full_s"] / row["replay_with_distances_s"] for row in rows]
        found["time"].append(
            {
                "tokens": size,
                "ratio": float(np.median(ratios)),
                "ratio_with_distances": float(np.median(slow)),
                "full_s": float(np.median([row["full_s"] for row in rows])),
                "replay_ms": 1000 * float(np.median([row["replay_s"] for row in rows])),
            }
        )
    for mode, rows in result["agreement"].items():

        def column(name: str, rows: list[dict[str, Any]] = rows) -> np.ndarray:
            return np.array([row[name] for row in rows])

        if len(rows) < 2:
            continue
        learned = np.abs(column("learned_pct") - column("replayed_learned_pct"))
        executed = np.abs(column("experts_per_token") - column("replayed_experts_per_token"))
        measured, predicted = column("degradation"), column("predicted_degradation")
        found["agreement"][mode] = {
            "learned_pct_max": learned.max(),
            "learned_pct_median": float(np.median(learned)),
            "experts_per_token_max": executed.max(),
            "experts_per_token_median": float(np.median(executed)),
            "degradation_rank_correlation": float(spearmanr(measured, predicted).statistic),
            "degradation_error_median_points": 100 * float(np.median(abs(measured - predicted))),
            "degradation_standard_error_median_points": 100
            * float(np.median(column("degradation_standard_error"))),
        }
    errors = [abs(row["predicted_speedup"] / row["speedup"] - 1) for row in result["speed"]]
    if errors:
        found["speedup_relative_error_median"] = float(np.median(errors))
        found["speedup_relative_error_max"] = max(errors)
    return found


def report(found: dict[str, Any]) -> None:
    """Print the summary."""
    for row in found["time"]:
        print(
            f"{row['tokens']:>8,} tokens: full {row['full_s']:.2f} s, replay "
            f"{row['replay_ms']:.2f} ms, ratio {row['ratio']:,.0f} "
            f"({row['ratio_with_distances']:,.0f} with stack distances)"
        )
    for mode, row in found["agreement"].items():
        print(
            f"{mode}: learned_pct off by at most {row['learned_pct_max']:.2f} points (median "
            f"{row['learned_pct_median']:.2f}), experts per token by "
            f"{row['experts_per_token_max']:.4f} ({row['experts_per_token_median']:.4f}); "
            f"degradation: rank correlation "
            f"{row['degradation_rank_correlation']:.3f}, median error "
            f"{row['degradation_error_median_points']:.2f} points (its own standard error "
            f"{row['degradation_standard_error_median_points']:.2f})"
        )
    if "speedup_relative_error_median" in found:
        print(
            f"predicted speedup: median error {100 * found['speedup_relative_error_median']:.1f}%, "
            f"largest {100 * found['speedup_relative_error_max']:.1f}%"
        )


def main() -> None:
    """Run what is not done yet, and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dataset", default="demo")
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=200, help="text of agreement and speed")
    parser.add_argument("--configurations", type=int, default=50, help="in each mode")
    parser.add_argument("--sizes", type=int, nargs="*", default=[25_000, 50_000, 100_000])
    parser.add_argument("--timed", type=int, default=6, help="configurations timed per size")
    parser.add_argument("--speeds", type=int, default=12, help="measured speedups")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/replay"))
    args = parser.parse_args()
    try:
        bench = Bench(args)
    except UsageError as error:
        raise SystemExit(f"error: {error}") from None
    measure_time(bench)
    documents = sample_documents(bench.text.documents, args.documents)
    replay = bench.replay(documents, f"trace-of-{args.documents}-documents")
    evaluator = Evaluator(bench.loaded, documents)
    measure_agreement(bench, evaluator, replay)
    measure_speed(bench, evaluator, replay)
    bench.result["summary"] = summary(bench.result)
    bench.save()
    report(bench.result["summary"])
    print(f"Saved: {bench.path}")


if __name__ == "__main__":
    main()
