"""The methods compared, each as it is used: a search of so many evaluations with a trial log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from benchmarks.tuners.bench import Bench

from var_moe.config import SEARCH_SPACE
from var_moe.optimization.measure_again import Closer
from var_moe.optimization.methods import (
    bayesian_optimization,
    random_search,
    replay_search,
    run_search,
)
from var_moe.optimization.replay_sampler import Forecasts, ReplaySampler
from var_moe.optimization.results import OptimizationResult
from var_moe.optimization.samplers import GuidedSampler
from var_moe.optimization.search_space import Params
from var_moe.optimization.trial_log import LOG_NAME
from var_moe.optimization.trials import Trials

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
        storage=folder / LOG_NAME,
        **_common(bench, seed),
    )


def gp(bench: Bench, seed: int, folder: Path) -> OptimizationResult:
    """Optuna's GPSampler as the library uses it, with the bound as constraint."""
    return bayesian_optimization(
        bench.objective,
        n_calls=bench.setting.evaluations,
        engine="optuna",
        storage=folder / LOG_NAME,
        **_common(bench, seed),
    )


def skopt(bench: Bench, seed: int, folder: Path) -> OptimizationResult:
    """scikit-optimize's gp_minimize as the library uses it, on the documented score."""
    return bayesian_optimization(
        bench.objective,
        n_calls=bench.setting.evaluations,
        engine="skopt",
        storage=folder / LOG_NAME,
        **_common(bench, seed),
    )


def replay(bench: Bench, seed: int, folder: Path) -> OptimizationResult:
    """Forecasts choose the full evaluations."""
    return replay_search(
        bench.objective,
        Forecasts(bench.forecaster),
        n_calls=bench.setting.replay_evaluations,
        storage=folder / LOG_NAME,
        **_common(bench, seed),
    )


def closer(bench: Bench, seed: int) -> Closer:
    """What replay does with measurements of the ordering text that are left, as `tune` has it."""
    sampler = ReplaySampler(
        SEARCH_SPACE,
        Forecasts(bench.forecaster),
        bound=bench.objective.max_degradation,
        seed=seed,
    )
    return sampler.closer


class TPEPointSampler(GuidedSampler):
    """Optuna's TPESampler, with what the GP gets: the same first points, values, constraints."""

    def by_model(self, trials: Trials) -> Params:
        """Each setting by itself, as TPE proposes them."""
        model = optuna.samplers.TPESampler(seed=self.seed_for(trials.number), n_startup_trials=1)
        study, trial = trials.study, trials.asking
        assert trial is not None
        ranges = self.infer_relative_search_space(study, trial)
        values = {
            name: model.sample_independent(study, trial, name, one) for name, one in ranges.items()
        }
        return {d.name: d.clip(values[d.name]) for d in self.dims}


def tpe(bench: Bench, seed: int, folder: Path) -> OptimizationResult:
    """Tree-structured Parzen estimators."""
    return run_search(
        bench.objective,
        SEARCH_SPACE,
        lambda seed, total: TPEPointSampler(SEARCH_SPACE, seed=seed, total=total),
        method="tpe",
        total=bench.setting.evaluations,
        storage=folder / LOG_NAME,
        **_common(bench, seed),
    )


METHODS: dict[str, Method] = {
    "random": random,
    "tpe": tpe,
    "gp": gp,
    "skopt": skopt,
    "replay": replay,
}
