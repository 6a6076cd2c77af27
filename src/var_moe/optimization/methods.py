"""The documented searches: a grid, random points, a Gaussian process, and replay.

Each is a sampler (`optimization.samplers`) for one loop, `run_search`. Every trial lives in an
Optuna storage (`optimization.trial_log`), and any number of processes may run the loop on one
study: what is left is asked of the storage before each evaluation.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias, TypedDict, Unpack

import optuna

from var_moe.config import SEARCH_SPACE, check_count, check_seed
from var_moe.errors import UsageError
from var_moe.extras import require
from var_moe.optimization.candidate import documented_params
from var_moe.optimization.replay_sampler import Forecasts, ReplaySampler
from var_moe.optimization.results import Evaluation, OptimizationResult
from var_moe.optimization.samplers import (
    GPPointSampler,
    NumberedSampler,
    PointSampler,
    SkoptSampler,
)
from var_moe.optimization.search_space import (
    Params,
    SearchSpace,
    defaults,
    dimensions,
    grid_point,
    grid_size,
    sample,
)
from var_moe.optimization.selection import best_evaluation, has_converged, nearest_miss
from var_moe.optimization.trial_log import SearchHeader, Storage, open_study, write_header
from var_moe.optimization.trials import Trials
from var_moe.optimization.worker import Objective, RichObjective, Worker, bound_of, mode_of
from var_moe.storage import jsonable
from var_moe.terminal import duration

_LOG = logging.getLogger(__name__)

CALLS, REPLAY_CALLS = 50, 10
ENGINES = {"optuna": GPPointSampler, "skopt": SkoptSampler}

SamplerOf: TypeAlias = Callable[[int, int], PointSampler]
"""From the seed and the number of evaluations planned."""


class SearchOptions(TypedDict, total=False):
    """What every search takes besides its points; all of it may be left out.

    Args:
        seed: a fresh one by default; recorded in the result.
        storage: keeps each finished evaluation: the path of a file, the URL of a database, or a
            storage of Optuna; by default nothing is kept.
        resume: go on with the search in the storage, or join it: several processes can at once.
        mode: of the VARConfig in `best_params`; by default the objective's own, else verified.
        confirm: measure the best again on more text, where the objective has a method `confirm`
            from result to result; so by default.
        settings: JSON values that decide the results besides the space and the seed (model,
            data, profile); resuming with others is refused by name.
        should_stop: asked before each evaluation; True ends the search early.
    """

    seed: int | None
    storage: Storage
    resume: bool
    mode: str | None
    confirm: bool
    settings: Mapping[str, Any] | None
    should_stop: Callable[[], bool] | None


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
        lambda _seed, _total: NumberedSampler(search_space, points),
        method="grid",
        total=grid_size(search_space, n_points_per_dim),
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

    def sampler_of(seed: int, _total: int) -> PointSampler:
        return NumberedSampler(search_space, partial(sample, search_space, seed))

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
    n_startup = check_count("n_startup", n_startup)

    def sampler_of(seed: int, total: int) -> PointSampler:
        return ENGINES[engine](search_space, seed=seed, total=total, n_startup=n_startup)

    return run_search(
        objective_fn,
        search_space,
        sampler_of,
        method=f"bayesian-{engine}",
        total=CALLS,
        n_calls=n_calls,
        own={"n_startup": n_startup, "enqueue": []},
        verbose=verbose,
        **options,
    )


def replay_search(
    objective_fn: RichObjective,
    forecasts: Forecasts,
    search_space: SearchSpace = SEARCH_SPACE,
    n_calls: int | None = None,
    verbose: bool = True,
    *,
    points: Sequence[Params] | None = None,
    **options: Unpack[SearchOptions],
) -> OptimizationResult:
    """Search with few full evaluations, each chosen from thousands of forecasts.

    It ends early where all points that are left decide as one that is evaluated. By default there
    are 10 evaluations; where ``points`` are given, as those of a grid, it chooses among them alone.
    See `random_search` for the other arguments.
    """

    def sampler_of(seed: int, _total: int) -> PointSampler:
        bound = objective_fn.max_degradation
        return ReplaySampler(search_space, forecasts, bound=bound, seed=seed, points=points)

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


def run_search(
    objective: Objective,
    space: SearchSpace,
    sampler_of: SamplerOf,
    *,
    method: str,
    total: int,
    n_calls: int | None = None,
    own: Mapping[str, Any] | None = None,
    verbose: bool = True,
    **options: Unpack[SearchOptions],
) -> OptimizationResult:
    """Evaluate `total` points in all, together with whoever else is at work on the study.

    Whatever interrupts the search leaves everything finished in the storage and passes through.

    Args:
        objective: what is evaluated.
        space: the search space.
        sampler_of: makes the sampler.
        method: its name, in the result and in the trial log.
        total: evaluations of a new search.
        n_calls: the number that was asked for, which counts for a resumed search as well.
        own: the method's own settings, which decide the results too.
        verbose: a line on stderr for each evaluation.
        options: see `SearchOptions`.
    """
    started = time.perf_counter()
    total = check_count("n_calls", total if n_calls is None else n_calls)
    bound, mode = bound_of(objective), mode_of(objective, options.get("mode"))
    facts = {"mode": mode, "max_degradation": bound, **(own or {})}
    header = SearchHeader(
        method=method,
        seed=check_seed(options.get("seed")),
        total=total,
        space={d.name: d.to_dict() for d in dimensions(space)},
        settings=jsonable({**facts, **(options.get("settings") or {})}),
    )
    # Fails on a wrong mode now rather than after the last evaluation.
    default = documented_params(defaults(space), mode)
    stop = options.get("should_stop") or (lambda: False)
    opened = open_study(options.get("storage"), header, resume=options.get("resume", False))
    with opened as (study, header):
        if n_calls is not None:
            header = _to_total(study, header, total)
        assert header.seed is not None
        before = Trials.of(study).evaluations
        if verbose and before:
            _say(f"resuming: {len(before)} of {header.total} evaluations are done")
        with Worker(study, sampler_of(header.seed, header.total), objective, bound) as work:
            for evaluation in work.evaluations(stop):
                if verbose:
                    done = Trials.of(study).evaluations
                    _say(progress_line(evaluation, done, header.total))
        evaluations = Trials.of(study).evaluations
    seconds = time.perf_counter() - started
    best, miss = best_evaluation(evaluations), nearest_miss(evaluations)
    scores = [e.score for e in evaluations if not e.failed and e.score is not None]
    extra = {} if best is not None or miss is None else {"nearest_miss": miss.to_dict()}
    result = OptimizationResult(
        best_params=default if best is None else documented_params(best.params, mode),
        best_score=max(scores, default=math.nan) if best is None else best.score or 0.0,
        optimization_time=seconds + sum(e.seconds + e.suggestion_seconds for e in before),
        evaluations=tuple(evaluations),
        converged=has_converged(evaluations),
        method=method.partition("-")[0],
        seed=header.seed,
        max_degradation=bound,
        extra={
            **extra,
            "suggestion_seconds": sum(e.suggestion_seconds for e in evaluations),
            "total": header.total,
            "failed": sum(e.failed for e in evaluations),
            "resumed": len(before),
            "stopped_early": len(evaluations) < header.total,
        },
    )
    confirm = getattr(objective, "confirm", None)
    if options.get("confirm", True) and confirm is not None:
        confirmed: OptimizationResult = confirm(result)
        return confirmed
    return result


def _to_total(study: optuna.Study, header: SearchHeader, total: int) -> SearchHeader:
    """The header with another number of evaluations, where that was asked for."""
    done = Trials.of(study).taken
    if total < done:
        _LOG.warning("%d evaluations are done, more than the %d asked for", done, total)
    if max(total, done) != header.total:
        header = replace(header, total=max(total, done))
        write_header(study, header)
    return header


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def progress_line(evaluation: Evaluation, done: Sequence[Evaluation], total: int) -> str:
    """An evaluation, the best of those that are done, and the time left by their mean."""
    best = max((e.score for e in done if e.eligible and e.score is not None), default=None)
    seconds = sum(e.seconds + e.suggestion_seconds for e in done) / len(done)
    return (
        f"[{len(done):>{len(str(total))}}/{total}] {_outcome(evaluation)} | "
        f"{'best -' if best is None else f'best {best:.4g}'} | {duration(evaluation.seconds)} | "
        f"ETA {duration(seconds * max(0, total - len(done)))}"
    )


def _outcome(evaluation: Evaluation) -> str:
    if evaluation.failed:
        return f"failed: {evaluation.error}"
    if evaluation.degradation is None:
        return f"score {evaluation.score:.6g}"
    parts = [f"degradation {100 * evaluation.degradation:+.2f}%"]
    if evaluation.feasible is False:
        parts.append("over the bound")
    if evaluation.speedup is not None:
        parts.append(f"speedup {evaluation.speedup:.3f}x")
    elif evaluation.predicted_speedup is not None:
        parts.append(f"predicted speedup {evaluation.predicted_speedup:.3f}x")
    if evaluation.experts_per_token is not None:
        parts.append(f"{evaluation.experts_per_token:.2f} experts per token")
    return ", ".join(parts)
