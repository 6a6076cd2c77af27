"""The main job, `tune`: profile, search, measure again, choose, save."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from var_moe.errors import UsageError
from var_moe.evaluation.evaluator import Progress
from var_moe.optimization.measure_again import LastMeasurement, TuneOutcome, conclude, unfinished
from var_moe.optimization.methods import (
    SearchOptions,
    bayesian_optimization,
    grid_search,
    random_search,
)
from var_moe.optimization.preparation import PreparedSearch, prepare
from var_moe.optimization.replay_run import ReplaySearch, search_by_replay
from var_moe.optimization.results import RESULTS_FILE, OptimizationResult
from var_moe.optimization.search_space import point_count
from var_moe.optimization.selection import PARETO_FILE, save_front
from var_moe.optimization.settings import TuneSettings
from var_moe.optimization.summary import profile_notes, search_notes
from var_moe.optimization.trial_log import check_storage, has_search, shown
from var_moe.storage import alone_in

if TYPE_CHECKING:
    from var_moe.models.loading import LoadedModel


def tune(
    loaded: LoadedModel,
    asked: str | Path | TuneSettings | None = None,
    *,
    ready: PreparedSearch | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _line: None,
    verbose: bool = True,
    **options: Any,
) -> TuneOutcome:
    """Find the fastest configuration that keeps the bound, and write the result files.

    Args:
        loaded: the model, as `load_model` returns it.
        asked: name or path of the text; or settings, in place of ``options``. By default what
            `var-moe tune` does.
        ready: what an earlier search of the same model, text and policy prepared.
        progress: called with a stage's name, steps done and in all.
        say: called with each line worth showing.
        verbose: show the search's own progress.
        options: any of `TuneSettings`, such as ``max_degradation=0.01``.

    Raises:
        UsageError: bad input, too little text.
        VarMoeError: no configuration keeps the bound (``nearest_miss.json`` holds the closest),
            every evaluation failed, or the last measurement did; what was measured is saved.
    """
    settings = _settings(asked, options)
    check_storage(settings.trial_log, resume=settings.resume)
    with alone_in(settings.output):
        ready = ready or prepare(loaded, settings, progress=progress, say=say)
        settings = replace(settings, space=ready.space)
        _tell_what_is_there(settings, say)
        result, replayed = _search(ready, settings, progress=progress, verbose=verbose)
        (settings.output / PARETO_FILE).unlink(missing_ok=True)  # an earlier search's
        settings = replace(settings, n_calls=result.extra["total"])
        about = _about(ready, settings)
        last = LastMeasurement(ready.final, ready.objective, blocks=settings.final_blocks)
        with unfinished(result, last, output=settings.output, metadata=about):
            closer = replayed.sampler.closer if replayed else None
            last.measure_search(result.evaluations, at_most=settings.candidates, closer=closer)
            last.measure_presets()
            if replayed:
                last.measure_front(replayed.front)
            by_dataset = last.by_dataset()
        if replayed:
            about["replay"] = replayed.metadata
            save_front(
                settings.output,
                replayed.front,
                last.measured,
                candidate=ready.objective.candidate,
                max_degradation=settings.max_degradation,
                identity=ready.identity,
            )
        notes = [
            *profile_notes(ready.profile, ready.objective.default),
            *search_notes(result, ready.validation.independent),
            *ready.final.timing_notes(),
        ]
        return conclude(
            result, last, by_dataset=by_dataset, output=settings.output, notes=notes, metadata=about
        )


def _settings(asked: str | Path | TuneSettings | None, options: Mapping[str, Any]) -> TuneSettings:
    """What `tune` is given, as settings."""
    if isinstance(asked, TuneSettings):
        if options:
            raise UsageError(
                f"tune: {', '.join(options)} given beside TuneSettings; put all into the settings"
            )
        return asked
    known = [field.name for field in fields(TuneSettings)]
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, n=1) or known
            raise UsageError(f"tune: no option {name!r}; expected {' or '.join(near[:3])}, ...")
    if asked is None:
        return TuneSettings(**options)
    if "dataset" in options:
        raise UsageError(f"tune: the text is given twice, {asked} and {options['dataset']}")
    return TuneSettings(dataset=str(asked), **options)


def _tell_what_is_there(settings: TuneSettings, say: Callable[[str], None]) -> None:
    """Say what becomes of an earlier search in the folder, or that there is none to resume."""
    if settings.resume and not has_search(settings.trial_log):
        say(f"nothing to resume in {shown(settings.trial_log)}: a new search begins")
    if not settings.resume and (settings.output / RESULTS_FILE).is_file():
        say(
            f"{settings.output} holds the results of an earlier search: they are replaced at the "
            "end, its evaluations are kept in a file ending in .previous"
        )


def _search(
    ready: PreparedSearch, settings: TuneSettings, *, progress: Progress | None, verbose: bool
) -> tuple[OptimizationResult, ReplaySearch | None]:
    """The search by the method asked for; by replay also its forecasts, sampler and front."""
    objective, space = ready.objective, ready.space
    calls: int | None = int(min(settings.calls, point_count(space)))
    if settings.n_calls is None and settings.resume and has_search(settings.trial_log):
        calls = None  # as many as the search was begun with
    options: SearchOptions = {
        "seed": settings.seed,
        "mode": settings.mode,
        "storage": settings.trial_log,
        "resume": settings.resume,
        "confirm": False,  # `tune` measures the best again on text of its own
        "settings": ready.identity,
    }
    if settings.by_replay:
        replayed = search_by_replay(
            ready, settings, calls, options, progress=progress, verbose=verbose
        )
        return replayed.result, replayed
    if settings.method == "grid":
        return grid_search(objective, space, settings.points, verbose, **options), None
    if settings.method == "random":
        return random_search(objective, space, calls, verbose, **options), None
    engine = settings.engine
    return bayesian_optimization(objective, space, calls, verbose, engine=engine, **options), None


def _about(ready: PreparedSearch, settings: TuneSettings) -> dict[str, Any]:
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


__all__ = ["TuneOutcome", "TuneSettings", "tune"]
