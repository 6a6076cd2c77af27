"""Objectives with known answers, for the tests of the searches."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import optuna

from var_moe.optimization.methods import bayesian_optimization, random_search
from var_moe.optimization.results import Evaluation, documented_score
from var_moe.optimization.search_space import Choice, dimensions, grid_point, grid_size
from var_moe.optimization.trial_log import STUDY_NAME

SMALL_SPACE = {
    "x": {"type": "float", "low": 0.0, "high": 1.0, "default": 0.2},
    "n": {"type": "int", "low": 0, "high": 40, "default": 8},
}


class SmallObjective:
    """Speedup 1 + x, degradation x²/25 + n/10,000: at the bound 0.01 and n = 0, x = 0.5.

    Args:
        stop_at: the number of the evaluation (from 1) that raises `stop` instead.
        fail_at: numbers of evaluations that raise an ordinary error.
    """

    max_degradation = 0.01

    def __init__(self, *, stop_at=None, stop=KeyboardInterrupt, fail_at=()):
        self.stop_at, self.stop, self.fail_at = stop_at, stop, fail_at
        self.seen = []

    def __call__(self, params):
        return self.evaluate(params).score

    def evaluate(self, params):
        number = len(self.seen) + 1
        if number == self.stop_at:
            raise self.stop("stopped")
        self.seen.append(dict(params))
        if number in self.fail_at:
            raise RuntimeError("out of\nmemory")
        return rich_evaluation(
            params,
            degradation=params["x"] ** 2 / 25 + params["n"] / 10_000,
            speedup=1 + params["x"],
            bound=self.max_degradation,
        )


class SixObjective:
    """The six documented names, in the manner of VAR: fewer pairs run faster and cost quality.

    The default scores 1.163, the aggressive preset is over the bound, and the feasible
    optimum is 1.256 (differential evolution; the best of 20,000 random points is 1.253).
    """

    max_degradation = 0.01

    def __call__(self, params):
        return self.evaluate(params).score

    def evaluate(self, params):
        fast = _step((params["entropy_threshold"] - 0.9) * 3)
        cut = _step((0.85 - params["confidence_threshold"]) * 10)
        reach = 1 - math.exp(-params["cache_size"] / 1500)
        cached = cut * reach / params["context_window_size"] ** 0.5
        known = 1 - params["frequency_threshold"] / 400
        skipped = min(1.0, 0.5 * fast * known + 0.2 * cut + 0.3 * cached)
        return rich_evaluation(
            params,
            degradation=0.03 * (fast * known) ** 2 + 0.012 * cut**2 + 0.004 * cached,
            speedup=1 + 0.6 * skipped,
            bound=self.max_degradation,
        )


def _step(value):
    return 1 / (1 + math.exp(-value))


def rich_evaluation(params, *, degradation, speedup, bound, learned_pct=80.0, **more):
    """An evaluation as the objective of a model would return it."""
    feasible = degradation <= bound
    return Evaluation(
        params=dict(params),
        score=documented_score(
            degradation=degradation,
            max_degradation=bound,
            speedup=speedup,
            learned_pct=learned_pct,
        ),
        degradation=degradation,
        degradation_se=0.001,
        speedup=speedup if feasible else None,
        predicted_speedup=speedup,
        learned_pct=learned_pct,
        **more,
    )


def is_point(space, point):
    """Whether a point has the names of a space, in order, and a value of each."""
    dims = dimensions(space)
    return list(point) == [d.name for d in dims] and all(
        point[d.name] in d.choices
        if isinstance(d, Choice)
        else type(point[d.name]) is type(d.default) and d.low <= point[d.name] <= d.high
        for d in dims
    )


def grid_points(space, n_points):
    """All points of a grid, in order."""
    return [grid_point(space, n_points, index) for index in range(grid_size(space, n_points))]


CALLS, STARTUP = 8, 5


def search(objective, n_calls=CALLS, **more):
    """A search by the Gaussian process, whose evaluations up to `STARTUP` need no model."""
    more = {"seed": 5, "verbose": False, "n_startup": STARTUP, **more}
    return bayesian_optimization(objective, SMALL_SPACE, n_calls, **more)


@cache
def unbroken():
    """What `search` finds where nothing interrupts it."""
    return search(SmallObjective())


def kept(result):
    """Evaluations without the times, which differ between runs."""
    return [replace(e, seconds=0.0, suggestion_seconds=0.0) for e in result.evaluations]


def load(storage):
    """The study in a storage, as Optuna reads it."""
    if "://" not in str(storage):
        backend = optuna.storages.journal.JournalFileBackend(str(storage))
        storage = optuna.storages.JournalStorage(backend)
    return optuna.load_study(storage=storage, study_name=STUDY_NAME)


def search_in_a_process(storage, calls, pause, hang_at, method="bayesian"):
    """For a subprocess: a search, or its share of one, that prints the points it evaluated.

    Evaluations take `pause` seconds; number `hang_at` (from 1) never ends, and makes a file.
    """

    class Slow(SmallObjective):
        def evaluate(self, params):
            if len(self.seen) + 1 == int(hang_at):
                Path(f"{storage.partition('///')[2] or storage}.hanging").touch()
                time.sleep(600)
            time.sleep(float(pause))
            return super().evaluate(params)

    objective = Slow()
    search = bayesian_optimization if method == "bayesian" else random_search
    search(objective, SMALL_SPACE, int(calls), verbose=False, seed=5, storage=storage, resume=True)
    print(json.dumps(objective.seen))


if __name__ == "__main__":
    search_in_a_process(*sys.argv[1:])
