"""The methods compared, each as it is used: a search of so many evaluations with a journal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tuners.bench import Bench

from var_moe.optimization.bayesian import bayesian_optimization
from var_moe.optimization.guided import GuidedPlan, is_repeat
from var_moe.optimization.journal import JOURNAL_NAME, SearchHeader, TrialJournal
from var_moe.optimization.optuna_engine import CONSTRAINT, UPPER_CONSTRAINT, told_value
from var_moe.optimization.random_points import random_search
from var_moe.optimization.remeasure import Closer
from var_moe.optimization.replay_search import Forecasts, ReplayPlan, replay_search
from var_moe.optimization.results import Evaluation, OptimizationResult
from var_moe.optimization.search import SearchOptions, Suggest, run_search
from var_moe.optimization.search_space import SEARCH_SPACE, Params, dimensions
from var_moe.optimization.selection import Z_95

Method = Callable[[Bench, int, Path], OptimizationResult]


def _common(bench: Bench, seed: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "mode": bench.setting.mode,
        "resume": True,
        "confirm": False,
        "verbose": False,
        "settings": bench.identity,
    }


def random(bench: Bench, seed: int, folder: Path) -> OptimizationResult:
    """Independent random points."""
    return random_search(
        bench.objective,
        n_calls=bench.setting.evaluations,
        journal=folder / JOURNAL_NAME,
        **_common(bench, seed),
    )


def gp(bench: Bench, seed: int, folder: Path) -> OptimizationResult:
    """Optuna's GPSampler as the library uses it, with the bound as constraint."""
    return bayesian_optimization(
        bench.objective,
        n_calls=bench.setting.evaluations,
        engine="optuna",
        storage_path=folder,
        **_common(bench, seed),
    )


def skopt(bench: Bench, seed: int, folder: Path) -> OptimizationResult:
    """scikit-optimize's gp_minimize as the library uses it, on the documented score."""
    return bayesian_optimization(
        bench.objective,
        n_calls=bench.setting.evaluations,
        engine="skopt",
        storage_path=folder,
        **_common(bench, seed),
    )


def replay(bench: Bench, seed: int, folder: Path) -> OptimizationResult:
    """Forecasts choose the full evaluations."""
    return replay_search(
        bench.objective,
        bench.forecaster,
        n_calls=bench.setting.replay_evaluations,
        journal=folder / JOURNAL_NAME,
        **_common(bench, seed),
    )


def closer(bench: Bench, seed: int) -> Closer:
    """What replay does with measurements of the ordering text that are left, as `tune` has it."""
    plan = ReplayPlan(
        SEARCH_SPACE,
        Forecasts(bench.forecaster),
        bound=bench.objective.max_degradation,
        seed=seed,
    )
    return plan.closer


def tpe(bench: Bench, seed: int, folder: Path) -> OptimizationResult:
    """Optuna's TPESampler, with what the GP gets: the same first points, values, constraints."""
    common = _common(bench, seed)
    common.pop("seed")
    bound = bench.objective.max_degradation

    def make_suggest(header: SearchHeader) -> Suggest:
        plan = GuidedPlan(SEARCH_SPACE, seed=header.known_seed, total=header.total)

        def suggest(number: int, evaluations: Sequence[Evaluation]) -> Params:
            point = plan.without_model(number, evaluations)
            if point is not None:
                return point
            point = _ask_tpe(evaluations, bound, plan.seed_for(number))
            return plan.instead(number, evaluations) if is_repeat(point, evaluations) else point

        return suggest

    return run_search(
        bench.objective,
        SEARCH_SPACE,
        store=TrialJournal(folder / JOURNAL_NAME),
        make_suggest=make_suggest,
        total=bench.setting.evaluations,
        seed=seed,
        options=SearchOptions(method="tpe", **common),
    )


def _ask_tpe(evaluations: Sequence[Evaluation], bound: float, seed: int) -> Params:
    """The next point from a new study that is told everything: a resumed search goes on alike."""
    import optuna
    from optuna.distributions import FloatDistribution, IntDistribution

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    ranges = {
        d.name: IntDistribution(int(d.low), int(d.high))
        if d.integer
        else FloatDistribution(d.low, d.high)
        for d in dimensions(SEARCH_SPACE)
    }
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=1)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for one in evaluations:
        if one.failed or one.degradation is None:
            continue
        margin = Z_95 * 2**0.5 * (one.degradation_se or 0.0)
        distance = one.degradation - bound
        study.add_trial(
            optuna.trial.create_trial(
                value=told_value(one),
                params=one.params,
                distributions=ranges,
                constraints={CONSTRAINT: distance, UPPER_CONSTRAINT: distance + margin},
            )
        )
    trial = study.ask(ranges)
    return {d.name: d.clip(trial.params[d.name]) for d in dimensions(SEARCH_SPACE)}


METHODS: dict[str, Method] = {
    "random": random,
    "tpe": tpe,
    "gp": gp,
    "skopt": skopt,
    "replay": replay,
}
