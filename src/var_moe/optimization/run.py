"""The main job, `tune`: profile, search, measure again, choose, save; for one seed or several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from var_moe.config import check_seed
from var_moe.errors import UsageError, VarMoeError
from var_moe.evaluation.evaluator import Progress
from var_moe.optimization.measure_again import (
    LastMeasurement,
    NothingFitsError,
    TuneOutcome,
    conclude,
    unfinished,
)
from var_moe.optimization.methods import (
    SearchOptions,
    bayesian_optimization,
    grid_search,
    random_search,
)
from var_moe.optimization.preparation import PreparedSearch, prepare
from var_moe.optimization.replay_run import COST_FILE, ReplaySearch, search_by_replay
from var_moe.optimization.results import METADATA_FILE, RESULTS_FILE, UNFINISHED, OptimizationResult
from var_moe.optimization.search_space import point_count
from var_moe.optimization.selection import PARETO_FILE, save_front
from var_moe.optimization.settings import TuneSettings
from var_moe.optimization.summary import profile_notes, search_notes
from var_moe.optimization.trial_log import check_storage, has_search, shown
from var_moe.storage import (
    SCHEMA_VERSION,
    alone_in,
    atomic_write_json,
    entries_of,
    provenance,
    read_json,
)
from var_moe.terminal import figures_table

if TYPE_CHECKING:
    from var_moe.models.loading import LoadedModel

STABILITY_FILE = "stability.json"
_FIGURES = ("experts_per_token", "degradation", "degradation_upper_95", "speedup", "speedup_95")
_SPREAD = ("experts_per_token", "speedup")
# May differ between a finished search and what is asked for:
_OWN = ("output", "shared", "storage", "seed", "resume", "profile", "space", "n_calls")


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


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds as ``1,2,3``.

    Raises:
        UsageError: not numbers, fewer than two, one twice, or one below 0.
    """
    try:
        seeds = [int(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"--seeds {text!r}: expected numbers with commas, e.g. 1,2,3") from None
    for seed in seeds:
        check_seed(seed)
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds {text}: expected two different seeds or more")
    return tuple(seeds)


def tune_seeds(
    loaded: LoadedModel,
    settings: TuneSettings,
    seeds: Sequence[int],
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _line: None,
    verbose: bool = True,
) -> dict[str, Any]:
    """Search once per seed, each into ``run_<seed>`` of the output folder.

    The profile, the trace and the cost model lie in the output folder and are made once. With
    `settings.resume`, finished searches are left alone. Returns what ``stability.json`` holds.

    Raises:
        UsageError: a finished search was run with other settings; names the first.
        VarMoeError: nothing kept the bound with any seed; the files are written all the same.
    """
    if settings.storage is not None:
        raise UsageError("a storage holds one search: leave --storage out with --seeds")
    folder = settings.output
    shared = replace(settings, shared=folder)
    asked = {"model": loaded.name, **shared.to_dict()}
    places = {seed: folder / f"run_{seed}" for seed in sorted(seeds)}
    left = [s for s, place in places.items() if not (settings.resume and _finished(place, asked))]
    (folder / STABILITY_FILE).unlink(missing_ok=True)
    if not settings.resume:  # what an earlier run left there is of another day
        for old in (folder / COST_FILE, *(place / METADATA_FILE for place in places.values())):
            old.unlink(missing_ok=True)
    ready = prepare(loaded, shared, progress=progress, say=say) if left else None
    for seed in left:
        own = replace(shared, output=places[seed], seed=seed)
        try:
            outcome = tune(loaded, own, ready=ready, progress=progress, say=say, verbose=verbose)
            say(f"seed {seed}: {outcome.answer}")
        except NothingFitsError as error:
            say(f"seed {seed}: {error}")
    runs = [_row(seed, place) for seed, place in places.items()]
    winners = [row for row in runs if row["found"]]
    report = {
        "schema_version": SCHEMA_VERSION,
        **{name: asked[name] for name in ("model", "dataset", "max_degradation")},
        "runs": runs,
        "spread": {name: _spread([row[name] for row in winners]) for name in _SPREAD},
        "provenance": provenance(),
    }
    atomic_write_json(folder / STABILITY_FILE, report)
    if not winners:
        raise VarMoeError(f"nothing kept the bound with any seed; see {folder / STABILITY_FILE}")
    return report


def _finished(place: Path, asked: Mapping[str, Any]) -> bool:
    """Whether a folder holds the results of a whole search with these settings."""
    path = place / METADATA_FILE
    if not path.is_file():
        return False
    metadata = read_json(path, what="metadata of a search")
    with entries_of(path):
        known = {**metadata["settings"], "model": metadata["identity"]["model"]}
        if UNFINISHED in metadata["search"]:
            return False  # its evaluations are kept: the search itself goes on with them
    for name, value in asked.items():
        if name not in _OWN and known.get(name) != value:
            raise UsageError(
                f"{place}: begun with {name} = {known.get(name)!r}, now {value!r}; resume with the "
                "same settings or choose another --output"
            )
    return True


def _row(seed: int, place: Path) -> dict[str, Any]:
    """What a finished search measured of its winner, on text that it did not search on."""
    results = read_json(place / RESULTS_FILE, what="results of a search")
    metadata = read_json(place / METADATA_FILE, what="metadata of a search")
    with entries_of(place):
        rows = [row for row in metadata["remeasured"] if row["passed"]]
        best: dict[str, Any] = next(
            (row for row in rows if row["config"] == results["best_params"]), {}
        )
        # With --robust the worst data set is judged.
        figures = {n: best.get(f"worst_{n}", best[n]) for n in ("config", *_FIGURES) if best}
    return {"seed": seed, "folder": str(place), "found": bool(best), **figures}


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if len(values) < 2:
        return None
    relative = (max(values) - min(values)) / median(values)
    return {"min": min(values), "max": max(values), "spread_relative": relative}


def seeds_table(report: Mapping[str, Any]) -> Any:
    """One row per seed; the last is the spread, (max - min) / median."""
    table = figures_table(
        f"{report['model']} on {report['dataset']}, bound {100 * report['max_degradation']:g}%",
        *("seed", "experts/token", "change", "95% upper bound", "speedup [95%]"),
    )
    for row in report["runs"]:
        cells = ["nothing kept the bound", "", "", ""]
        if row["found"]:
            low, high = row["speedup_95"]
            cells = [
                f"{row['experts_per_token']:.3f}",
                *(f"{100 * row[name]:+.2f}%" for name in ("degradation", "degradation_upper_95")),
                f"{row['speedup']:.3f} [{low:.3f}, {high:.3f}]",
            ]
        table.add_row(str(row["seed"]), *cells)
    table.add_section()
    told = [f"{100 * x['spread_relative']:.2f}%" if x else "" for x in report["spread"].values()]
    table.add_row("spread", told[0], "", "", told[1])
    return table
