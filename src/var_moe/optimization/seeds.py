"""One search per seed, over one profile, trace and cost model, and a table of their winners."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from var_moe.config import check_seed
from var_moe.errors import UsageError, VarMoeError
from var_moe.evaluation.evaluator import Progress
from var_moe.optimization.measure_again import NothingFitsError
from var_moe.optimization.preparation import prepare
from var_moe.optimization.replay_run import COST_FILE
from var_moe.optimization.results import METADATA_FILE, RESULTS_FILE, UNFINISHED
from var_moe.optimization.run import tune
from var_moe.optimization.settings import TuneSettings
from var_moe.storage import SCHEMA_VERSION, atomic_write_json, entries_of, provenance, read_json
from var_moe.terminal import figures_table

if TYPE_CHECKING:
    from var_moe.models.loading import LoadedModel

STABILITY_FILE = "stability.json"
_FIGURES = ("experts_per_token", "degradation", "degradation_upper_95", "speedup", "speedup_95")
_SPREAD = ("experts_per_token", "speedup")
# May differ between a finished search and what is asked for:
_OWN = ("output", "shared", "storage", "seed", "resume", "profile", "space", "n_calls")


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
