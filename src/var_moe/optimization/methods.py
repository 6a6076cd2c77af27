"""The documented searches: a grid, random points, a Gaussian process, and replay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Unpack

from var_moe.config import SEARCH_SPACE, check_count
from var_moe.errors import UsageError
from var_moe.extras import require
from var_moe.optimization.forecast import Forecaster
from var_moe.optimization.replay_sampler import Forecasts, ReplaySampler
from var_moe.optimization.results import OptimizationResult
from var_moe.optimization.samplers import (
    GPPointSampler,
    NumberedSampler,
    PointSampler,
    SkoptSampler,
    check_enqueue,
)
from var_moe.optimization.search_space import Params, SearchSpace, grid_point, grid_size, sample
from var_moe.optimization.study import SearchOptions, run_search
from var_moe.optimization.trial_log import SearchHeader
from var_moe.optimization.worker import Objective, RichObjective

CALLS, REPLAY_CALLS = 50, 10
ENGINES = {"optuna": GPPointSampler, "skopt": SkoptSampler}


def grid_search(
    objective_fn: Objective,
    search_space: SearchSpace = SEARCH_SPACE,
    n_points_per_dim: int = 3,
    verbose: bool = True,
    **options: Unpack[SearchOptions],
) -> OptimizationResult:
    """Evaluate the full grid, `grid_size(search_space, n_points_per_dim)` points.

    Args:
        objective_fn: a callable of a dict of parameters, or a rich objective.
        search_space: see `SEARCH_SPACE`.
        n_points_per_dim: values per name, bounds included; 1 takes the default alone.
        verbose: progress on stderr.
        options: seed (the grid does not depend on it), storage, resume, ...: see `SearchOptions`.

    Raises:
        UsageError: an argument is not valid, or the storage holds another search.
    """
    points = partial(grid_point, search_space, n_points_per_dim)
    return run_search(
        objective_fn,
        search_space,
        lambda _header: NumberedSampler(search_space, points),
        method="grid",
        total=grid_size(search_space, n_points_per_dim),
        total_flag="--n_points",
        own={"n_points_per_dim": n_points_per_dim},
        verbose=verbose,
        **options,
    )


def random_search(
    objective_fn: Objective,
    search_space: SearchSpace = SEARCH_SPACE,
    n_calls: int | None = None,
    verbose: bool = True,
    **options: Unpack[SearchOptions],
) -> OptimizationResult:
    """Evaluate `n_calls` independent random points; point number i is drawn from (seed, i) alone.

    Args:
        objective_fn: a callable of a dict of parameters, or a rich objective.
        search_space: see `SEARCH_SPACE`.
        n_calls: evaluations, failed ones included; 50 by default. A resumed search goes on to
            that many in all, by default to as many as it was begun with.
        verbose: progress on stderr.
        options: seed, storage, resume, ...: see `SearchOptions`.

    Raises:
        UsageError: an argument is not valid, or the storage holds another search.
    """

    def sampler_of(header: SearchHeader) -> PointSampler:
        return NumberedSampler(search_space, partial(sample, search_space, header.known_seed))

    return run_search(
        objective_fn,
        search_space,
        sampler_of,
        method="random",
        total=CALLS,
        n_calls=n_calls,
        verbose=verbose,
        **options,
    )


def bayesian_optimization(
    objective_fn: Objective,
    search_space: SearchSpace = SEARCH_SPACE,
    n_calls: int | None = None,
    verbose: bool = True,
    *,
    engine: str = "optuna",
    enqueue: Sequence[Mapping[str, Any]] = (),
    n_startup: int | None = None,
    **options: Unpack[SearchOptions],
) -> OptimizationResult:
    """Search with a Gaussian process, the default configuration and the presets first.

    With Optuna a rich objective's bound is a constraint and a speedup is maximised; a bare
    callable's score is maximised as it is. scikit-optimize maximises the score in both cases.
    A point is never evaluated twice, unless the space has no other left.

    Args:
        objective_fn: a callable of a dict of parameters, or a rich objective.
        search_space: see `SEARCH_SPACE`. Presets outside its bounds are clipped to them.
        n_calls: evaluations, see `random_search`.
        verbose: progress on stderr.
        engine: ``"optuna"`` or ``"skopt"``.
        enqueue: further points to evaluate after the presets.
        n_startup: evaluations before the process is asked, see `GuidedSampler`.
        options: seed, storage, resume, ...: see `SearchOptions`.

    Raises:
        UsageError: an argument is not valid, scikit-optimize is not installed, or the
            storage holds another search.
    """
    if engine not in ENGINES:
        raise UsageError(f"engine = {engine!r}: expected one of {', '.join(ENGINES)}")
    if engine == "skopt":
        require("skopt")
    points = check_enqueue(search_space, enqueue)
    n_startup = check_count("n_startup", n_startup)

    def sampler_of(header: SearchHeader) -> PointSampler:
        return ENGINES[engine](
            search_space,
            seed=header.known_seed,
            total=header.total,
            enqueue=points,
            n_startup=n_startup,
        )

    return run_search(
        objective_fn,
        search_space,
        sampler_of,
        method=f"bayesian-{engine}",
        total=CALLS,
        n_calls=n_calls,
        own={"enqueue": points, "n_startup": n_startup},
        verbose=verbose,
        **options,
    )


def replay_search(
    objective_fn: RichObjective,
    forecaster: Forecaster,
    search_space: SearchSpace = SEARCH_SPACE,
    n_calls: int | None = None,
    verbose: bool = True,
    *,
    points: Sequence[Params] | None = None,
    **options: Unpack[SearchOptions],
) -> OptimizationResult:
    """Search with few full evaluations, each chosen from thousands of forecasts.

    It ends early where all points that are left decide as one that is evaluated.

    Args:
        objective_fn: a rich objective, as `create_objective_function` returns; best with its
            `stop_early` set.
        forecaster: forecasts of the same text, see `optimization.forecast`.
        search_space: see `SEARCH_SPACE`.
        n_calls: full evaluations, 10 by default; see `random_search`.
        verbose: progress on stderr.
        points: choose among these alone, as all points of a grid.
        options: seed, storage, resume, ...: see `SearchOptions`.

    Raises:
        UsageError: an argument is not valid, or the storage holds another search.
    """

    def sampler_of(header: SearchHeader) -> PointSampler:
        return ReplaySampler(
            search_space,
            Forecasts(forecaster),
            bound=objective_fn.max_degradation,
            seed=header.known_seed,
            points=points,
        )

    return run_search(
        objective_fn,
        search_space,
        sampler_of,
        method="replay",
        total=REPLAY_CALLS,
        n_calls=n_calls,
        verbose=verbose,
        **options,
    )
