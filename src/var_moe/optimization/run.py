"""The main job, `tune`: profile, search, measure again, choose, save."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from var_moe.calibration.fitted_files import load_compensation
from var_moe.calibration.profile import RoutingProfile
from var_moe.errors import UsageError
from var_moe.evaluation.evaluator import Evaluator, Progress, measure_apart
from var_moe.evaluation.perplexity import datasets_of
from var_moe.models.checks import check_droppable
from var_moe.optimization.candidate import Candidate
from var_moe.optimization.measure_again import (
    Remeasured,
    TuneOutcome,
    best_or_nearest,
    conclude,
    measure,
    remeasure,
    unfinished,
)
from var_moe.optimization.methods import bayesian_optimization, grid_search, random_search
from var_moe.optimization.objective import PolicyObjective, searched_compensations
from var_moe.optimization.preparation import EncodedText, halves, obtain_profile, read_text
from var_moe.optimization.replay_run import (
    ReplaySearch,
    replay_metadata,
    search_by_replay,
    verify_front,
)
from var_moe.optimization.results import RESULTS_FILE, OptimizationResult
from var_moe.optimization.search_space import (
    COMPENSATION,
    SearchSpace,
    defaults,
    is_config_space,
    point_count,
)
from var_moe.optimization.selection import PARETO_FILE, save_front
from var_moe.optimization.settings import TuneSettings
from var_moe.optimization.summary import profile_notes, search_notes
from var_moe.optimization.trial_log import check_storage, has_search, shown
from var_moe.storage import alone_in

if TYPE_CHECKING:
    from var_moe.models.loading import LoadedModel


@dataclass(frozen=True, kw_only=True)
class PreparedSearch:
    """A model and text that can be searched on: what searches share, whatever their seeds.

    Args:
        validation, profile, profile_place: the text, and the profile with its folder.
        evaluator, final: score the search's documents, and those of the last measurement.
        objective: of the search's documents.
        space: what is searched, with the compensations where there is a choice.
        identity: what decides the results besides the search itself.
    """

    validation: EncodedText
    profile: RoutingProfile
    profile_place: Path | None
    evaluator: Evaluator
    final: Evaluator
    objective: PolicyObjective
    space: SearchSpace
    identity: Mapping[str, Any]


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
        return _tune(loaded, settings, ready, progress=progress, say=say, verbose=verbose)


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


def _tune(
    loaded: LoadedModel,
    settings: TuneSettings,
    ready: PreparedSearch | None,
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
    measured: list[Remeasured] = []
    presets: list[Remeasured] = []
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
        for name, preset in objective.presets().items():
            presets.append(_preset(name, preset, measured, final, objective, settings))
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
            candidate=objective.candidate,
            max_degradation=settings.max_degradation,
            identity=ready.identity,
        )
    var_notes = profile_notes(ready.profile, ready.space) if is_config_space(ready.space) else []
    notes = [
        *var_notes,
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
        profile=ready.profile,
        top_k=evaluator.top_k,
    )


def prepare(
    loaded: LoadedModel,
    settings: TuneSettings,
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _line: None,
) -> PreparedSearch:
    """Read the text, obtain the profile, measure the unmodified model.

    Raises:
        UsageError: bad input, too little text, a model with one expert per token.
    """
    from var_moe.data.documents import require_documents

    check_droppable(loaded.name, loaded.top_k)
    validation = read_text(settings.dataset, "validation", loaded)
    require_documents(validation.documents, 20, "searching and ordering on validation text")
    profile, place = obtain_profile(
        loaded,
        settings.dataset,
        given=settings.profile,
        folder=settings.preparations,
        tokens=settings.calibration_tokens,
        keep=settings.resume,
        progress=progress,
    )
    if settings.compensation_folder is not None:
        learned = load_compensation(settings.compensation_folder, loaded)
        profile = profile.with_compensation(learned)
    # Each data set is judged by itself: of each, as many documents as of the others.
    search_half, ordering_half = halves(validation.documents, equal=settings.robust)
    for half, step in ((search_half, "searching"), (ordering_half, "the last measurement")):
        # One page may hold nearly all documents, and a page is never split.
        require_documents(half, 2, f"{step}, in its half of the pages of {settings.dataset!r}")
    searched = search_half[: settings.max_samples]
    spec, top_k = settings.spec, loaded.top_k
    compensations = searched_compensations(profile, spec.name, settings.compensation, top_k)
    default = Candidate(
        policy=spec.name,
        settings={**defaults(spec.search_space(top_k)), **settings.fixed},
        compensation=compensations[-1],
    )
    evaluator = Evaluator(
        loaded,
        searched,
        setting=settings.setting,
        progress=progress,
        robust=settings.robust,
        cost_policies=default.cost_policies(profile, top_k),
    )
    objective = PolicyObjective(
        evaluator,
        profile,
        spec.name,
        fixed=settings.fixed,
        compensations=compensations,
        max_degradation=settings.max_degradation,
        stop_early=settings.by_replay,
    )
    say(_baseline_line(evaluator))
    evaluator.predicted_speedup(evaluator.top_k)  # measured before the search's clock starts
    final = evaluator.with_documents(ordering_half[: settings.final_samples])
    evaluator.progress = None  # the search shows its own
    identity = {
        "policy": spec.name,
        "model": loaded.name,
        "revision": loaded.revision,
        "dtype": loaded.dtype,
        "device": str(loaded.device.type),
        "dataset": settings.dataset,
        "data_hash": validation.data_hash,
        "profile_hash": profile.hash,
        "search_documents": len(searched),
        "setting": settings.setting.to_dict(),
    }
    if settings.robust:
        identity["robust"] = True
    space = dict(settings.space_for(top_k))
    if COMPENSATION in objective.space:
        space[COMPENSATION] = objective.space[COMPENSATION]
    best = objective.calibration(compensations[-1]).get("compensation")
    if best is not None:
        identity["compensation_hash"] = best.hash
    return PreparedSearch(
        validation=validation,
        profile=profile,
        profile_place=place,
        evaluator=evaluator,
        final=final,
        objective=objective,
        space=space,
        identity=identity,
    )


def _baseline_line(evaluator: Evaluator) -> str:
    speeds = ", ".join(
        f"{name} {speed:,.0f}" for name, speed in evaluator.backend_throughputs.items()
    )
    return (
        f"baseline: perplexity {evaluator.baseline_losses.perplexity:.3f} on "
        f"{len(evaluator.documents)} documents; tokens/s by experts backend: {speeds}"
    )


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


def _found(
    ready: PreparedSearch, settings: TuneSettings, *, progress: Progress | None, verbose: bool
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
    config: Candidate,
    measured: Sequence[Remeasured],
    final: Evaluator,
    objective: PolicyObjective,
    settings: TuneSettings,
) -> Remeasured:
    """A preset's measurement: the candidate's, where the search proposed the same."""
    for one in measured:
        if one.config == config:
            return replace(one, name=name)
    return measure(
        final, objective, config, name=name, blocks=settings.final_blocks, always_time=True
    )


def _calls(ready: PreparedSearch, settings: TuneSettings) -> int | None:
    """No more evaluations than there are points; None leaves it to the search that is resumed."""
    if settings.n_calls is None and settings.resume and has_search(settings.trial_log):
        return None
    return int(min(settings.calls, point_count(ready.space)))


def _search(
    ready: PreparedSearch, settings: TuneSettings, options: dict[str, Any]
) -> OptimizationResult:
    objective, space, calls = ready.objective, ready.space, _calls(ready, settings)
    if settings.method == "grid":
        return grid_search(objective, space, settings.points, **options)
    if settings.method == "random":
        return random_search(objective, space, calls, **options)
    return bayesian_optimization(objective, space, calls, engine=settings.engine, **options)


__all__ = ["TuneOutcome", "TuneSettings", "tune"]
