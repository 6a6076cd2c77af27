"""The main job: profile, search, measure again, choose, save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from var_moe.config import PRESETS, VARConfig
from var_moe.evaluation.evaluator import Evaluator, Progress, measure_apart
from var_moe.evaluation.perplexity import datasets_of
from var_moe.optimization.conclusion import (
    TuneOutcome,
    conclude,
    profile_notes,
    search_notes,
    unfinished,
)
from var_moe.optimization.front import PARETO_FILE
from var_moe.optimization.methods import bayesian_optimization, grid_search, random_search
from var_moe.optimization.objective import VARObjective
from var_moe.optimization.ready import Ready, prepare
from var_moe.optimization.remeasure import Measured, best_or_nearest, measure, remeasure
from var_moe.optimization.replay_run import (
    ReplaySearch,
    replay_metadata,
    save_front,
    search_by_replay,
    verify_front,
)
from var_moe.optimization.results import OptimizationResult
from var_moe.optimization.saving import RESULTS_FILE
from var_moe.optimization.search_space import point_count
from var_moe.optimization.settings import TuneSettings
from var_moe.optimization.trial_log import alone_in, has_search, shown

if TYPE_CHECKING:
    from var_moe.models.loading import LoadedModel

FASTER = (
    "these are VAR's six thresholds; where it was measured, the damage policy runs fewer experts "
    "at the same degradation: `var-moe tune --policy damage`"
)


def tune(
    loaded: LoadedModel,
    settings: TuneSettings | None = None,
    *,
    ready: Ready | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _line: None,
    verbose: bool = True,
) -> TuneOutcome:
    """Find the fastest configuration that keeps the bound, and write the result files.

    Args:
        loaded: the model.
        settings: what to do; by default what `var-moe tune` does.
        ready: what an earlier search of the same model, text and policy prepared.
        progress: called with a stage's name, steps done and in all.
        say: called with each line worth showing.
        verbose: show the search's own progress.

    Raises:
        UsageError: bad input, too little text.
        VarMoeError: no configuration keeps the bound (``nearest_miss.json`` holds the closest),
            every evaluation failed, or the last measurement did; what was measured is saved.
    """
    settings = settings or TuneSettings()
    with alone_in(settings.output):
        return _tune(loaded, settings, ready, progress=progress, say=say, verbose=verbose)


def _tune(
    loaded: LoadedModel,
    settings: TuneSettings,
    ready: Ready | None,
    *,
    progress: Progress | None,
    say: Callable[[str], None],
    verbose: bool,
) -> TuneOutcome:
    ready = ready or prepare(loaded, settings, progress=progress, say=say)
    settings = replace(settings, space=ready.space)
    if settings.resume and not has_search(settings.trial_log):
        say(f"nothing to resume in {shown(settings.trial_log)}: a new search begins")
    if not settings.resume and (settings.output / RESULTS_FILE).is_file():
        say(
            f"{settings.output} holds the results of an earlier search: they are replaced at the "
            "end, its evaluations are kept in a file ending in .previous"
        )
    evaluator, final, objective = ready.evaluator, ready.final, ready.objective
    result, replayed = _found(ready, settings, progress=progress, verbose=verbose)
    (settings.output / PARETO_FILE).unlink(missing_ok=True)  # an earlier search's
    settings = replace(settings, n_calls=result.extra["total"])
    measured: list[Measured] = []
    presets: list[Measured] = []
    about = _about(ready, settings)
    with unfinished(result, measured, presets, output=settings.output, metadata=about):
        remeasure(
            final,
            objective,
            result.evaluations,
            blocks=settings.final_blocks,
            at_most=settings.candidates,
            closer=replayed.sampler.closer if replayed is not None else None,
            done=measured,
        )
        if isinstance(objective, VARObjective):
            for name in PRESETS:
                presets.append(_preset(name, measured, final, objective, settings))
        measured[:] = [one for one in measured if all(one.config != p.config for p in presets)]
        if replayed is not None:
            known = [*measured, *presets]
            blocks = settings.final_blocks
            verify_front(replayed, final, objective, known, blocks=blocks, done=measured)
        chosen = best_or_nearest([*measured, *presets])
        apart = []
        if datasets_of(final.documents):
            apart = measure_apart(final, objective.policy(chosen.config), what=chosen.name)
    if replayed is not None:
        save_front(
            settings.output,
            replayed.front,
            [*measured, *presets],
            config=objective.config,
            max_degradation=settings.max_degradation,
            identity=ready.identity,
        )
    notes = [
        *([] if settings.policy else [*profile_notes(ready.profile, ready.space), FASTER]),
        *search_notes(result, ready.validation.independent),
        *final.timing_notes(),
    ]
    metadata = {
        **about,
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


def _about(ready: Ready, settings: TuneSettings) -> dict[str, Any]:
    """What the metadata say before anything is measured again."""
    evaluator, final, place = ready.evaluator, ready.final, ready.profile_place
    return {
        "settings": settings.to_dict(),
        "identity": ready.identity,
        "baseline": {
            "perplexity": final.baseline_losses.perplexity,
            "search_perplexity": evaluator.baseline_losses.perplexity,
            "backend": evaluator.baseline_backend,
            "backend_throughputs_tps": evaluator.backend_throughputs,
        },
        "geometry": evaluator.geometry(),
        "profile": {"path": str(place) if place else None, **ready.profile.head},
        "validation": ready.validation.to_dict(),
        "ordering_documents": len(final.documents),
    }


def _found(
    ready: Ready, settings: TuneSettings, *, progress: Progress | None, verbose: bool
) -> tuple[OptimizationResult, ReplaySearch | None]:
    """The search alone; by replay with what that leaves besides."""
    options: dict[str, Any] = {
        "seed": settings.seed,
        "mode": settings.mode,
        "storage": settings.trial_log,
        "resume": settings.resume,
        "confirm": False,  # `tune` measures the best again on text of its own
        "settings": ready.identity,
        "verbose": verbose,
    }
    if not settings.by_replay:
        return _search(ready, settings, options), None
    replayed = search_by_replay(
        ready.objective,
        ready.space,
        n_calls=_calls(ready, settings),
        n_points=settings.points if settings.method == "grid" else None,
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
    config = VARConfig.preset(name, mode=settings.mode or "verified")
    for one in measured:
        if one.config == config:
            return replace(one, name=name)
    return measure(
        final, objective, config, name=name, blocks=settings.final_blocks, always_time=True
    )


def _calls(ready: Ready, settings: TuneSettings) -> int | None:
    """No more evaluations than there are points; None leaves it to the search that is resumed."""
    if settings.n_calls is None and settings.resume and has_search(settings.trial_log):
        return None
    return int(min(settings.calls, point_count(ready.space)))


def _search(ready: Ready, settings: TuneSettings, options: dict[str, Any]) -> OptimizationResult:
    objective, space, calls = ready.objective, ready.space, _calls(ready, settings)
    if settings.method == "grid":
        return grid_search(objective, space, settings.points, **options)
    if settings.method == "random":
        return random_search(objective, space, calls, **options)
    return bayesian_optimization(objective, space, calls, engine=settings.engine, **options)


__all__ = ["TuneOutcome", "TuneSettings", "tune"]
