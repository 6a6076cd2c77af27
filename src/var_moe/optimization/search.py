"""The loop that every method shares: suggest, evaluate, keep, tell; and its result."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias, runtime_checkable

from var_moe.config import VARConfig
from var_moe.errors import UsageError
from var_moe.optimization.journal import SearchHeader, Session
from var_moe.optimization.objective_protocol import Objective, bound_of, run_evaluation
from var_moe.optimization.progress import SearchProgress
from var_moe.optimization.results import Evaluation, OptimizationResult, jsonable
from var_moe.optimization.search_space import (
    Params,
    SearchSpace,
    defaults,
    dimensions,
    is_config_space,
)
from var_moe.optimization.selection import (
    best_evaluation,
    has_converged,
    highest_score,
    nearest_miss,
)

_LOG = logging.getLogger(__name__)

OnEvaluation: TypeAlias = Callable[[Evaluation, int, int], None]
ShouldStop: TypeAlias = Callable[[], bool]
Suggest: TypeAlias = Callable[[int, Sequence[Evaluation]], Params | None]
"""The point of evaluation `number` (from 0), given all finished evaluations; None ends the search,
as nothing is left that is worth one."""


class Store(Protocol):
    """Where finished evaluations are kept."""

    def begin(self, header: SearchHeader, *, resume: bool = False) -> Session:
        """Start the search, or go on with an earlier one."""
        ...

    def append(self, number: int, evaluation: Evaluation) -> None:
        """Keep evaluation `number`, durable when this returns."""
        ...

    def extend(self, header: SearchHeader) -> None:
        """Note that another number of evaluations is planned."""
        ...

    def close(self) -> None:
        """Let go of what `begin` took."""
        ...


@runtime_checkable
class Confirming(Protocol):
    """An objective that can measure a search's best again, on more text and for longer."""

    def confirm(self, result: OptimizationResult, /) -> OptimizationResult:
        """The result with the best configuration as measured again."""
        ...


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What every search method takes besides its points.

    Args:
        method: name of the method, in the result and in the journal.
        mode: of the VARConfig in `best_params`; None takes the objective's own, else verified.
        confirm: measure the best again on more text, where the objective can (`Confirming`);
            what is then best is the fastest that keeps the bound with its upper bound.
        verbose: progress on stderr.
        resume: go on with the search in the store.
        settings: JSON values that decide the results besides the space and the seed (model,
            data, profile); resuming with others is refused by name.
        on_evaluation: called with each new evaluation, its number from 1, and the total.
        should_stop: asked before each evaluation; True ends the search early.
        count_flag: the command-line option that lowers the number of evaluations.
        count_given: whether the number was asked for: then it also counts for a resumed search,
            which otherwise goes on to the number that it was begun with.
    """

    method: str
    mode: str | None = None
    confirm: bool = True
    verbose: bool = True
    resume: bool = False
    settings: dict[str, Any] | None = None
    on_evaluation: OnEvaluation | None = None
    should_stop: ShouldStop | None = None
    count_flag: str = "--n_calls"
    count_given: bool = False


def run_search(
    objective: Objective,
    space: SearchSpace,
    *,
    store: Store,
    make_suggest: Callable[[SearchHeader], Suggest],
    total: int,
    seed: int | None,
    options: SearchOptions,
) -> OptimizationResult:
    """Evaluate `total` points and keep each as it finishes.

    Whatever interrupts the search leaves everything finished in the store and passes through.
    """
    started = time.perf_counter()
    bound, mode = bound_of(objective), mode_of(objective, options.mode)
    header = SearchHeader(
        method=options.method,
        seed=seed,
        total=total,
        space={d.name: d.to_dict() for d in dimensions(space)},
        settings=jsonable({"mode": mode, "max_degradation": bound, **(options.settings or {})}),
    )
    # Fails on a wrong mode now rather than after the last evaluation.
    as_best_params(space, defaults(space), mode)
    session = store.begin(header, resume=options.resume)
    try:
        evaluations = list(session.evaluations)
        if options.count_given and total != session.header.total:
            session = _extended(session, total, store)
        _evaluate_all(
            objective, evaluations, store, make_suggest(session.header), session.header, options
        )
    finally:
        store.close()
    earlier = sum(e.seconds + e.suggestion_seconds for e in session.evaluations)
    result = _result(
        evaluations,
        space,
        header=session.header,
        bound=bound,
        mode=mode,
        seconds=earlier + time.perf_counter() - started,
        resumed=len(session.evaluations),
    )
    if options.confirm and isinstance(objective, Confirming) and is_config_space(space):
        result = objective.confirm(result)
    return result


def _extended(session: Session, total: int, store: Store) -> Session:
    """A resumed search with another number of evaluations."""
    done = len(session.evaluations)
    if total < done:
        _LOG.warning("%d evaluations are done, more than the %d asked for", done, total)
    header = replace(session.header, total=max(total, done))
    store.extend(header)
    return replace(session, header=header)


def mode_of(objective: Objective, asked: str | None) -> str:
    """The mode of VAR that a search is about.

    Raises:
        UsageError: the one asked for is not the one that the objective measures.
    """
    own = getattr(objective, "mode", None)
    if asked is not None and own is not None and asked != own:
        raise UsageError(f"mode = {asked!r}: the objective measures mode {own!r}")
    return str(asked or own or "verified")


def as_best_params(space: SearchSpace, params: Params, mode: str) -> VARConfig | dict[str, Any]:
    """`params` as a VARConfig in `mode`, or as they are in a space of other names."""
    if not is_config_space(space):
        return dict(params)
    return VARConfig.from_dict({**params, "mode": mode})


def _evaluate_all(
    objective: Objective,
    evaluations: list[Evaluation],
    store: Store,
    suggest: Suggest,
    header: SearchHeader,
    options: SearchOptions,
) -> None:
    progress = SearchProgress(
        total=header.total,
        finished=evaluations,
        verbose=options.verbose,
        count_flag=options.count_flag,
    )
    with progress:
        for number in range(len(evaluations), header.total):
            if options.should_stop is not None and options.should_stop():
                break
            asked = time.perf_counter()
            params = suggest(number, evaluations)
            if params is None:
                break
            suggestion_seconds = time.perf_counter() - asked
            evaluation = run_evaluation(objective, params)
            evaluation = evaluation.replace(suggestion_seconds=suggestion_seconds)
            store.append(number, evaluation)
            evaluations.append(evaluation)
            progress.update(evaluation, number + 1)
            if options.on_evaluation is not None:
                options.on_evaluation(evaluation, number + 1, header.total)


def _result(
    evaluations: list[Evaluation],
    space: SearchSpace,
    *,
    header: SearchHeader,
    bound: float | None,
    mode: str,
    seconds: float,
    resumed: int,
) -> OptimizationResult:
    best = best_evaluation(evaluations)
    extra: dict[str, Any] = {
        "suggestion_seconds": sum(e.suggestion_seconds for e in evaluations),
        "total": header.total,
        "failed": sum(e.failed for e in evaluations),
        "resumed": resumed,
        "stopped_early": len(evaluations) < header.total,
    }
    miss = nearest_miss(evaluations) if best is None else None
    if miss is not None:
        extra["nearest_miss"] = miss.to_dict()
    if best is not None and best.score is not None:
        params, score = best.params, best.score
    else:
        params, score = defaults(space), highest_score(evaluations)
    return OptimizationResult(
        best_params=as_best_params(space, params, mode),
        best_score=score,
        optimization_time=seconds,
        evaluations=tuple(evaluations),
        converged=has_converged(evaluations),
        method=header.method.partition("-")[0],
        seed=header.seed,
        max_degradation=bound,
        extra=extra,
    )
