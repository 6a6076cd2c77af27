"""The documented searches: a grid, random points, a Gaussian process, and replay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from var_moe.config import check_seed
from var_moe.errors import UsageError
from var_moe.extras import require
from var_moe.optimization.forecast import Forecaster
from var_moe.optimization.objective_protocol import Objective, RichObjective
from var_moe.optimization.replay_sampler import Forecasts, ReplaySampler
from var_moe.optimization.results import OptimizationResult
from var_moe.optimization.samplers import (
    GPPointSampler,
    NumberedSampler,
    PointSampler,
    SkoptSampler,
    check_enqueue,
    check_startup,
)
from var_moe.optimization.search_space import (
    SEARCH_SPACE,
    Params,
    SearchSpace,
    check_count,
    grid_point,
    grid_size,
    sample,
)
from var_moe.optimization.study import OnEvaluation, SearchOptions, ShouldStop, run_search
from var_moe.optimization.trial_log import SearchHeader, Storage

CALLS, REPLAY_CALLS = 50, 10
ENGINES = {"optuna": GPPointSampler, "skopt": SkoptSampler}

CONFIRM_ABOVE = 1000
"""Evaluations above which a command asks before it starts; `grid_search` itself never asks."""


def grid_search(
    objective_fn: Objective,
    search_space: SearchSpace = SEARCH_SPACE,
    n_points_per_dim: int = 3,
    verbose: bool = True,
    *,
    seed: int | None = None,
    storage: Storage = None,
    resume: bool = False,
    mode: str | None = None,
    confirm: bool = True,
    settings: dict[str, Any] | None = None,
    on_evaluation: OnEvaluation | None = None,
    should_stop: ShouldStop | None = None,
) -> OptimizationResult:
    """Evaluate the full grid, `grid_size(search_space, n_points_per_dim)` points.

    Args:
        objective_fn: a callable of a dict of parameters, or a rich objective.
        search_space: see `SEARCH_SPACE`.
        n_points_per_dim: values per name, bounds included; 1 takes the default alone.
        verbose: progress on stderr.
        seed: recorded in the result; the grid itself does not depend on it.
        storage: keeps each finished evaluation: the path of a file, the URL of a database, or a
            storage of Optuna; None keeps nothing.
        resume: go on with the grid in `storage`; several processes can, at once.
        mode, confirm, settings, on_evaluation, should_stop: see `SearchOptions`.

    Raises:
        UsageError: an argument is not valid, or `storage` holds another search.
    """
    return run_search(
        objective_fn,
        search_space,
        storage=storage,
        sampler_of=lambda _header: NumberedSampler(
            search_space, partial(grid_point, search_space, n_points_per_dim)
        ),
        total=grid_size(search_space, n_points_per_dim),
        seed=check_seed(seed),
        options=SearchOptions(
            method="grid",
            mode=mode,
            confirm=confirm,
            verbose=verbose,
            resume=resume,
            settings={"n_points_per_dim": n_points_per_dim, **(settings or {})},
            on_evaluation=on_evaluation,
            should_stop=should_stop,
            count_flag="--n_points",
        ),
    )


def random_search(
    objective_fn: Objective,
    search_space: SearchSpace = SEARCH_SPACE,
    n_calls: int | None = None,
    verbose: bool = True,
    *,
    seed: int | None = None,
    storage: Storage = None,
    resume: bool = False,
    mode: str | None = None,
    confirm: bool = True,
    settings: dict[str, Any] | None = None,
    on_evaluation: OnEvaluation | None = None,
    should_stop: ShouldStop | None = None,
) -> OptimizationResult:
    """Evaluate `n_calls` independent random points; point number i is drawn from (seed, i) alone.

    Args:
        objective_fn: a callable of a dict of parameters, or a rich objective.
        search_space: see `SEARCH_SPACE`.
        n_calls: evaluations, failed ones included; 50 by default. A resumed search goes on to
            that many in all, by default to as many as it was begun with.
        verbose: progress on stderr.
        seed: a fresh one by default, recorded in the result.
        storage, resume: see `grid_search`.
        mode, confirm, settings, on_evaluation, should_stop: see `SearchOptions`.

    Raises:
        UsageError: an argument is not valid, or `storage` holds another search.
    """
    return run_search(
        objective_fn,
        search_space,
        storage=storage,
        sampler_of=lambda header: NumberedSampler(
            search_space, partial(sample, search_space, header.known_seed)
        ),
        total=check_count("n_calls", CALLS if n_calls is None else n_calls),
        seed=check_seed(seed),
        options=SearchOptions(
            method="random",
            mode=mode,
            confirm=confirm,
            verbose=verbose,
            resume=resume,
            count_given=n_calls is not None,
            settings=settings,
            on_evaluation=on_evaluation,
            should_stop=should_stop,
        ),
    )


def bayesian_optimization(
    objective_fn: Objective,
    search_space: SearchSpace = SEARCH_SPACE,
    n_calls: int | None = None,
    verbose: bool = True,
    *,
    seed: int | None = None,
    engine: str = "optuna",
    storage: Storage = None,
    resume: bool = False,
    enqueue: Sequence[Mapping[str, Any]] = (),
    n_startup: int | None = None,
    mode: str | None = None,
    confirm: bool = True,
    settings: dict[str, Any] | None = None,
    on_evaluation: OnEvaluation | None = None,
    should_stop: ShouldStop | None = None,
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
        seed: a fresh one by default, recorded in the result.
        engine: ``"optuna"`` or ``"skopt"``.
        storage, resume: see `grid_search`.
        enqueue: further points to evaluate after the presets.
        n_startup: evaluations before the process is asked, see `GuidedSampler`.
        mode, confirm, settings, on_evaluation, should_stop: see `SearchOptions`.

    Raises:
        UsageError: an argument is not valid, scikit-optimize is not installed, or `storage`
            holds another search.
    """
    if engine not in ENGINES:
        raise UsageError(f"engine = {engine!r}: expected one of {', '.join(ENGINES)}")
    if engine == "skopt":
        require("skopt")
    points = check_enqueue(search_space, enqueue)
    n_startup = check_startup(n_startup)

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
        storage=storage,
        sampler_of=sampler_of,
        total=check_count("n_calls", CALLS if n_calls is None else n_calls),
        seed=check_seed(seed),
        options=SearchOptions(
            method=f"bayesian-{engine}",
            mode=mode,
            confirm=confirm,
            verbose=verbose,
            resume=resume,
            count_given=n_calls is not None,
            settings={"enqueue": points, "n_startup": n_startup, **(settings or {})},
            on_evaluation=on_evaluation,
            should_stop=should_stop,
        ),
    )


def replay_search(
    objective_fn: RichObjective,
    forecaster: Forecaster,
    search_space: SearchSpace = SEARCH_SPACE,
    n_calls: int | None = None,
    verbose: bool = True,
    *,
    seed: int | None = None,
    storage: Storage = None,
    resume: bool = False,
    enqueue: Sequence[Params] = (),
    points: Sequence[Params] | None = None,
    mode: str | None = None,
    confirm: bool = True,
    settings: dict[str, Any] | None = None,
    on_evaluation: OnEvaluation | None = None,
    should_stop: ShouldStop | None = None,
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
        seed: of the pool; a fresh one by default, recorded in the result.
        storage, resume: see `grid_search`.
        enqueue: points to evaluate first.
        points: choose among these alone, as all points of a grid.
        mode, confirm, settings, on_evaluation, should_stop: see `SearchOptions`.

    Raises:
        UsageError: an argument is not valid, or `storage` holds another search.
    """
    first = check_enqueue(search_space, enqueue)

    def sampler_of(header: SearchHeader) -> PointSampler:
        return ReplaySampler(
            search_space,
            Forecasts(forecaster),
            bound=objective_fn.max_degradation,
            seed=header.known_seed,
            first=first,
            points=points,
        )

    return run_search(
        objective_fn,
        search_space,
        storage=storage,
        sampler_of=sampler_of,
        total=check_count("n_calls", REPLAY_CALLS if n_calls is None else n_calls),
        seed=check_seed(seed),
        options=SearchOptions(
            method="replay",
            mode=mode,
            confirm=confirm,
            verbose=verbose,
            resume=resume,
            count_given=n_calls is not None,
            settings={"enqueue": first, **(settings or {})},
            on_evaluation=on_evaluation,
            should_stop=should_stop,
        ),
    )
