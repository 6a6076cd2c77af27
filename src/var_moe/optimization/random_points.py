"""Random search: point number i is drawn from (seed, i) alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from var_moe.config import check_seed
from var_moe.optimization.journal import SearchHeader, TrialJournal, as_store
from var_moe.optimization.objective_protocol import Objective
from var_moe.optimization.results import Evaluation, OptimizationResult
from var_moe.optimization.search import (
    OnEvaluation,
    SearchOptions,
    ShouldStop,
    Suggest,
    run_search,
)
from var_moe.optimization.search_space import (
    SEARCH_SPACE,
    Params,
    SearchSpace,
    check_count,
    sample,
)

CALLS = 50


def random_search(
    objective_fn: Objective,
    search_space: SearchSpace = SEARCH_SPACE,
    n_calls: int | None = None,
    verbose: bool = True,
    *,
    seed: int | None = None,
    journal: TrialJournal | str | Path | None = None,
    resume: bool = False,
    mode: str | None = None,
    confirm: bool = True,
    settings: dict[str, Any] | None = None,
    on_evaluation: OnEvaluation | None = None,
    should_stop: ShouldStop | None = None,
) -> OptimizationResult:
    """Evaluate `n_calls` independent random points.

    Args:
        objective_fn: a callable of a dict of parameters, or a rich objective.
        search_space: see `SEARCH_SPACE`.
        n_calls: evaluations, failed ones included; 50 by default.
        verbose: progress on stderr.
        seed: a fresh one by default, recorded in the result.
        journal: file that keeps each finished evaluation.
        resume: go on with the search in `journal`, to `n_calls` evaluations in all, by
            default as many as it was begun with, with the points that an unbroken run would have
            had.
        mode, confirm, settings, on_evaluation, should_stop: see `SearchOptions`.

    Raises:
        UsageError: an argument is not valid, or `journal` holds another search.
    """

    def make_suggest(header: SearchHeader) -> Suggest:
        def suggest(number: int, evaluations: Sequence[Evaluation]) -> Params:
            return sample(search_space, header.known_seed, number)

        return suggest

    return run_search(
        objective_fn,
        search_space,
        store=as_store(journal),
        make_suggest=make_suggest,
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
