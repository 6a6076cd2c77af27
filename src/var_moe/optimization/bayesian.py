"""Bayesian optimisation: a Gaussian process proposes the next point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from var_moe.config import check_seed
from var_moe.errors import UsageError
from var_moe.extras import require
from var_moe.optimization.guided import GuidedPlan, check_enqueue, check_startup
from var_moe.optimization.journal import JOURNAL_NAME, SearchHeader, as_store
from var_moe.optimization.objective_protocol import Objective, bound_of
from var_moe.optimization.optuna_engine import OptunaSearch
from var_moe.optimization.results import Evaluation, OptimizationResult
from var_moe.optimization.search import (
    OnEvaluation,
    SearchOptions,
    ShouldStop,
    Store,
    Suggest,
    run_search,
)
from var_moe.optimization.search_space import (
    SEARCH_SPACE,
    Params,
    SearchSpace,
    check_count,
)

CALLS = 50
ENGINES = ("optuna", "skopt")


def bayesian_optimization(
    objective_fn: Objective,
    search_space: SearchSpace = SEARCH_SPACE,
    n_calls: int | None = None,
    verbose: bool = True,
    *,
    seed: int | None = None,
    engine: str = "optuna",
    storage_path: str | Path | None = None,
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
        n_calls: evaluations, failed ones included; 50 by default.
        verbose: progress on stderr.
        seed: a fresh one by default, recorded in the result.
        engine: ``"optuna"`` or ``"skopt"``.
        storage_path: folder that keeps each finished evaluation, in ``optuna_study.log`` or
            ``trials.jsonl``.
        resume: go on with the search in `storage_path`, to `n_calls` evaluations in all, by
            default as many as it was begun with; each suggestion depends on the finished
            evaluations, the seed and its number alone.
        enqueue: further points to evaluate after the presets.
        n_startup: evaluations before the process is asked, see `GuidedPlan`.
        mode, confirm, settings, on_evaluation, should_stop: see `SearchOptions`.

    Raises:
        UsageError: an argument is not valid, scikit-optimize is not installed, or the folder
            holds another search.
    """
    if engine not in ENGINES:
        raise UsageError(f"engine = {engine!r}: expected one of {', '.join(ENGINES)}")
    points = check_enqueue(search_space, enqueue)
    n_startup = check_startup(n_startup)
    folder = None if storage_path is None else Path(storage_path)

    def plan_of(header: SearchHeader) -> GuidedPlan:
        return GuidedPlan(
            search_space,
            seed=header.known_seed,
            total=header.total,
            enqueue=points,
            n_startup=n_startup,
        )

    store: Store
    if engine == "optuna":
        search = OptunaSearch(search_space, bound=bound_of(objective_fn), folder=folder)
        store = search

        def make_suggest(header: SearchHeader) -> Suggest:
            plan = plan_of(header)

            def suggest(number: int, evaluations: Sequence[Evaluation]) -> Params:
                return search.suggest(number, evaluations, plan)

            return suggest
    else:
        from var_moe.optimization.skopt_engine import skopt_suggest

        require("skopt")
        store = as_store(None if folder is None else folder / JOURNAL_NAME)

        def make_suggest(header: SearchHeader) -> Suggest:
            return skopt_suggest(search_space, plan_of(header))

    return run_search(
        objective_fn,
        search_space,
        store=store,
        make_suggest=make_suggest,
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
