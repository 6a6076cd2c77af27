"""The main job: profile, search, measure again, choose, save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from var_moe.config import PRESETS, VARConfig
from var_moe.evaluation.apart import measure_apart
from var_moe.evaluation.compare import Evaluator, Progress
from var_moe.evaluation.groups import datasets_of
from var_moe.optimization.bayesian import bayesian_optimization
from var_moe.optimization.conclusion import TuneOutcome, conclude, profile_notes, search_notes
from var_moe.optimization.grid import grid_search
from var_moe.optimization.journal import JOURNAL_NAME, STUDY_NAME
from var_moe.optimization.objective import VARObjective
from var_moe.optimization.policy_objective import PolicyObjective
from var_moe.optimization.random_points import random_search
from var_moe.optimization.ready import Ready, prepare
from var_moe.optimization.remeasure import Measured, best_or_nearest, measure, remeasure
from var_moe.optimization.replay_run import (
    ReplaySearch,
    replay_metadata,
    save_front,
    search_by_replay,
    sensitivity_note,
    verify_front,
)
from var_moe.optimization.results import OptimizationResult
from var_moe.optimization.settings import TuneSettings

if TYPE_CHECKING:
    from var_moe.models.loading import LoadedModel

FASTER = (
    "these are VAR's six thresholds; where it was measured, the damage policy runs fewer experts "
    "at the same degradation: `var-moe tune --policy damage`"
)


def tune(
    loaded: LoadedModel,
    settings: TuneSettings,
    *,
    ready: Ready | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _line: None,
    verbose: bool = True,
) -> TuneOutcome:
    """Find the fastest configuration that keeps the bound, and write the result files.

    Args:
        loaded: the model.
        settings: what to do.
        ready: what an earlier search of the same model, text and policy prepared.
        progress: called with a stage's name, steps done and in all.
        say: called with each line worth showing.
        verbose: show the search's own progress.

    Raises:
        UsageError: bad input, too little text.
        VarMoeError: no configuration keeps the bound; ``nearest_miss.json`` holds the closest.
    """
    ready = ready or prepare(loaded, settings, progress=progress, say=say)
    settings = replace(settings, space=ready.space)
    kept = [settings.output / name for name in (JOURNAL_NAME, STUDY_NAME)]
    if settings.resume and not any(path.is_file() for path in kept):
        say(f"nothing to resume in {settings.output}: a new search begins")
    evaluator, final, objective = ready.evaluator, ready.final, ready.objective
    result, replayed = _found(ready, settings, progress=progress, verbose=verbose)
    measured = remeasure(
        final,
        objective,
        result.evaluations,
        blocks=settings.final_blocks,
        at_most=settings.candidates,
        closer=replayed.plan.closer if replayed is not None else None,
    )
    presets = []
    if isinstance(objective, VARObjective):
        presets = [_preset(name, measured, final, objective, settings) for name in PRESETS]
    measured = [one for one in measured if all(one.config != p.config for p in presets)]
    if replayed is not None:
        measured += verify_front(
            replayed, final, objective, [*measured, *presets], blocks=settings.final_blocks
        )
        save_front(
            settings.output,
            replayed.front,
            [*measured, *presets],
            config=objective.config,
            max_degradation=settings.max_degradation,
            identity=ready.identity,
        )
    profile = ready.profile
    notes = [
        *([] if settings.policy else [*profile_notes(profile, settings.space), FASTER]),
        *search_notes(result, ready.validation.independent),
        *([sensitivity_note(replayed)] if replayed and replayed.sensitivity else []),
        *final.timing_notes(),
    ]
    chosen = best_or_nearest([*measured, *presets])
    apart = []
    if datasets_of(final.documents):
        apart = measure_apart(final, objective.policy(chosen.config), what=chosen.name)
    metadata = {
        "settings": settings.to_dict(),
        "identity": ready.identity,
        "baseline": {
            "perplexity": final.baseline_losses.perplexity,
            "search_perplexity": evaluator.baseline_losses.perplexity,
            "backend": evaluator.baseline_backend,
            "backend_throughputs_tps": evaluator.backend_throughputs,
        },
        "geometry": evaluator.geometry(),
        "profile": {
            "path": str(ready.profile_place) if ready.profile_place else None,
            **profile.head,
        },
        "validation": ready.validation.to_dict(),
        "ordering_documents": len(final.documents),
        "remeasured": [one.to_dict() for one in (*measured, *presets)],
        "by_dataset": [one.to_dict() for one in apart],
        "notes": notes,
        **({"replay": replay_metadata(replayed)} if replayed else {}),
    }
    return conclude(
        result,
        measured=measured,
        presets=presets,
        apart=apart,
        output=settings.output,
        max_degradation=settings.max_degradation,
        notes=notes,
        metadata=metadata,
        top_k=evaluator.top_k,
    )


def _found(
    ready: Ready, settings: TuneSettings, *, progress: Progress | None, verbose: bool
) -> tuple[OptimizationResult, ReplaySearch | None]:
    """The search alone; by replay with what that leaves besides."""
    options: dict[str, Any] = {
        "seed": settings.seed,
        "mode": None if settings.policy else settings.mode,
        "resume": settings.resume,
        "confirm": False,  # `tune` measures the best again on text of its own
        "settings": ready.identity,
        "verbose": verbose,
    }
    if not settings.by_replay:
        return _search(ready.objective, settings, options), None
    replayed = search_by_replay(
        ready.objective,
        settings.space,
        n_calls=settings.n_calls,
        n_points=settings.n_points if settings.method == "grid" else None,
        data={"dataset": settings.dataset, "data_hash": ready.validation.data_hash},
        folder=settings.output,
        shared=settings.shared,
        progress=progress,
        options=options,
    )
    return replayed.result, replayed


def _preset(
    name: str,
    measured: Sequence[Measured],
    final: Evaluator,
    objective: VARObjective,
    settings: TuneSettings,
) -> Measured:
    """A preset's measurement: the candidate's, where the search proposed the same."""
    config = VARConfig.preset(name, mode=settings.mode)
    for one in measured:
        if one.config == config:
            return replace(one, name=name)
    return measure(
        final, objective, config, name=name, blocks=settings.final_blocks, always_time=True
    )


def _search(
    objective: PolicyObjective, settings: TuneSettings, options: dict[str, Any]
) -> OptimizationResult:
    folder = settings.output
    if settings.method == "grid":
        journal = folder / JOURNAL_NAME
        return grid_search(objective, settings.space, settings.n_points, journal=journal, **options)
    if settings.method == "random":
        journal = folder / JOURNAL_NAME
        return random_search(
            objective, settings.space, settings.n_calls, journal=journal, **options
        )
    return bayesian_optimization(
        objective,
        settings.space,
        settings.n_calls,
        engine=settings.engine,
        storage_path=folder,
        **options,
    )


__all__ = ["TuneOutcome", "TuneSettings", "tune"]
