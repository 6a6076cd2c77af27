"""One run: a search, the choice of its final configuration, and that one on test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.tuners.bench import Bench
from benchmarks.tuners.memo import MemoEvaluator
from benchmarks.tuners.methods import METHODS, closer
from benchmarks.tuners.setting import run_file

from var_moe.optimization.candidate import Candidate
from var_moe.optimization.measure_again import LastMeasurement
from var_moe.optimization.results import Evaluation, documented_score
from var_moe.storage import SCHEMA_VERSION, atomic_write_json, jsonable


def run(bench: Bench, method: str, seed: int) -> dict[str, Any]:
    """Search, choose and test; all evaluations are kept as they finish, the run at its end."""
    path = run_file(bench.folder, method, seed)
    journal = path.with_suffix("")
    journal.mkdir(parents=True, exist_ok=True)
    result = METHODS[method](bench, seed, journal)
    objective = bench.objective
    last = LastMeasurement(bench.ordering, objective, blocks=0)
    last.measure_search(
        result.evaluations,
        at_most=bench.setting.candidates,
        closer=closer(bench, seed) if method == "replay" else None,
    )
    measured, best = last.measured, last.best
    # With nothing that passes, the nearest miss shows what the search would have ended with.
    final = best or min(measured, key=lambda one: one.quality.change.upper)
    suggestions = sum(e.suggestion_seconds for e in result.evaluations)
    known = [objective.known(e.params) for e in result.evaluations if not e.failed]
    evaluations = sum(one.seconds for one in known)
    choosing = sum(bench.ordering.measured(objective.policy(m.config)).seconds for m in measured)
    setup = bench.forecaster_seconds if method == "replay" else 0.0
    found = {
        "schema_version": SCHEMA_VERSION,
        "method": method,
        "seed": seed,
        "evaluations": len(result.evaluations),
        "failed": sum(e.failed for e in result.evaluations),
        "config": final.config.to_dict(),
        "passed_ordering": best is not None,
        "ordering": figures(bench.ordering, bench, final.config),
        "test": figures(bench.test, bench, final.config),
        "candidates_measured": len(measured),
        "seconds": {
            "setup_s": setup,
            "evaluations_s": evaluations,
            "evaluations_cpu_s": sum(one.cpu_seconds for one in known),
            "suggestions_s": suggestions,
            "choosing_s": choosing,
            "total_s": setup + evaluations + suggestions + choosing,
        },
        "best_score": best_so_far(result.evaluations),
    }
    atomic_write_json(path, jsonable(found))
    return found


def figures(evaluator: MemoEvaluator, bench: Bench, config: Candidate) -> dict[str, Any]:
    """A configuration on one text; the score is the documented one, of the point estimate."""
    policy = bench.objective.policy(config)
    quality, speedup = evaluator.quality(policy), evaluator.speedup(policy)
    change, bound = quality.change, bench.setting.max_degradation
    return {
        "score": documented_score(
            degradation=change.value,
            max_degradation=bound,
            speedup=speedup,
            learned_pct=quality.report.learned_pct,
        ),
        "speedup": speedup,
        "degradation": change.value,
        "degradation_standard_error": change.standard_error,
        "degradation_upper_95": change.upper,
        "feasible": change.upper < bound,
        "feasible_point": change.value <= bound,
        "experts_per_token": quality.report.experts_per_token,
        "fast_pct": quality.report.fast_pct,
        "cached_pct": quality.report.cached_pct,
        "learned_pct": quality.report.learned_pct,
    }


def best_so_far(evaluations: Sequence[Evaluation]) -> list[float | None]:
    """Highest feasible score after each evaluation, on the search's text; None before the first."""
    best: float | None = None
    curve: list[float | None] = []
    for one in evaluations:
        if one.eligible and one.score is not None:
            best = one.score if best is None else max(best, one.score)
        curve.append(best)
    return curve
