"""Grid search: every combination of evenly spaced values."""

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
    grid_point,
    grid_size,
)

CONFIRM_ABOVE = 1000
"""Evaluations above which a command asks before it starts; `grid_search` itself never asks."""


def grid_search(
    objective_fn: Objective,
    search_space: SearchSpace = SEARCH_SPACE,
    n_points_per_dim: int = 3,
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
    """Evaluate the full grid, `grid_size(search_space, n_points_per_dim)` points.

    Args:
        objective_fn: a callable of a dict of parameters, or a rich objective.
        search_space: see `SEARCH_SPACE`.
        n_points_per_dim: values per name, bounds included; 1 takes the default alone.
        verbose: progress on stderr.
        seed: recorded in the result; the grid itself does not depend on it.
        journal: file that keeps each finished evaluation.
        resume: go on with the grid in `journal`.
        mode, confirm, settings, on_evaluation, should_stop: see `SearchOptions`.

    Raises:
        UsageError: an argument is not valid, or `journal` holds another search.
    """

    def make_suggest(header: SearchHeader) -> Suggest:
        def suggest(number: int, evaluations: Sequence[Evaluation]) -> Params:
            return grid_point(search_space, n_points_per_dim, number)

        return suggest

    return run_search(
        objective_fn,
        search_space,
        store=as_store(journal),
        make_suggest=make_suggest,
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
