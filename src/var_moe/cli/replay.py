"""``var-moe replay``: what configurations decide on a recorded trace, without the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from var_moe.cli.options import Mode, QuietOptions, Words
from var_moe.cli.output import TIERS, Answer, finish, table
from var_moe.config import MAX_DEGRADATION
from var_moe.errors import UsageError

if TYPE_CHECKING:
    from var_moe.calibration.profile import RoutingProfile
    from var_moe.evaluation.cost import CostModel
    from var_moe.evaluation.evaluator import Progress
    from var_moe.optimization.candidate import Candidate
    from var_moe.optimization.forecast import ForecastGrid
    from var_moe.tracing.trace import RoutingTrace

_NO_COST = (
    "no cost_model.json beside the trace or the profile, so no speedup is predicted: give one with "
    "--cost (`var-moe tune` fits one)"
)
_NO_DAMAGE = (
    "the trace was recorded with --decisions_only, so no degradation is predicted and there is "
    "no front"
)
_SHOWN = 12  # points of a front
_SHORT = {
    "frequency_threshold": "freq.",
    "entropy_threshold": "entropy",
    "confidence_threshold": "conf.",
    "cache_size": "cache",
    "cache_ttl_seconds": "ttl",
    "context_window_size": "window",
}


def replay(
    trace: Path,
    *,
    profile: Path | None = None,
    config: Annotated[list[Path] | None, Parameter(consume_multiple=True)] = None,
    preset: Words = None,
    grid: int | None = None,
    mode: Mode = None,
    cost: Path | None = None,
    output: Path = Path("results/replay"),
    max_degradation: float = MAX_DEGRADATION,
    run: QuietOptions = QuietOptions(),
) -> Answer:
    """Predict tiers, experts per token, degradation and speedup from a trace.

    Args:
        trace: folder that `var-moe trace` (or a tuning run) recorded.
        profile: profile folder; by default the one in or beside the trace's folder.
        config: configurations that any command wrote, such as best_config.json, or VAR
            configurations (JSON), one or several.
        preset: conservative, balanced, aggressive; one or several.
        grid: replay all combinations of so many values per threshold, and show which
            thresholds matter and the best points.
        mode: overrides the mode of VAR's configurations.
        cost: cost model (JSON) for speedups; by default cost_model.json in or beside the
            folder of the trace or the profile.
        output: folder for replay.json and replay.csv.
        max_degradation: bound on the predicted degradation, to mark points of the grid.
    """
    from var_moe.config import SEARCH_SPACE, check_bound
    from var_moe.optimization.search_space import check_grid
    from var_moe.storage import check_output_folder

    check_output_folder(output)
    check_bound(max_degradation)
    if grid is not None and (config or preset):
        raise UsageError("--grid has configurations of its own: leave --config and --preset out")
    if grid is not None:
        check_grid(SEARCH_SPACE, grid, name="grid")
    run.say(f"reading trace {trace} ...")
    configs = _configs(config or [], preset or [], mode)
    place = _profile_folder(trace, profile)
    model = _cost_model(cost, [trace, trace.parent, place, place.parent])
    from var_moe.calibration.profile import RoutingProfile
    from var_moe.models.checks import check_droppable
    from var_moe.tracing.trace import RoutingTrace

    recorded = RoutingTrace.load(trace)
    check_droppable(recorded.head["model"], recorded.head["top_k"])
    known = RoutingProfile.load(place)
    recorded.check_profile(known)
    if model is not None:
        _check_cost(model, recorded.head)
    notes = [_NO_COST] if model is None else []
    notes += [] if recorded.damage else [_NO_DAMAGE]
    about = _about(recorded, known, trace, place, model, notes)
    if grid is None:
        rows = _rows(recorded, known, configs, model)
        return _end({**about, "rows": rows}, _flat(rows), output, _replays(rows, about["trace"]))
    with run.progress() as progress:
        forecasts = _grid(recorded, known, grid, mode or "verified", model, progress)
    names = {"degradation": "predicted_degradation", "speedup": "predicted_speedup"}
    front = _front(forecasts, mode or "verified", max_degradation, names)
    result = {
        **about,
        "mode": mode or "verified",
        "max_degradation": max_degradation,
        "values": {name: list(known) for name, known in forecasts.values.items()},
        "points": forecasts.size,
        "front": front,
    }
    columns = {names.get(name, name): column for name, column in forecasts.table().items()}
    return _end(result, columns, output, *_shown_front(result))


def _end(result: dict[str, Any], columns: Mapping[str, Any], output: Path, *parts: Any) -> Answer:
    """Write both files, and show the parts."""
    import pandas as pd

    from var_moe.storage import atomic_write, atomic_write_json, jsonable
    from var_moe.terminal import show

    plain: dict[str, Any] = jsonable(result)
    json_file, csv_file = output / "replay.json", output / "replay.csv"
    atomic_write_json(json_file, plain)
    frame = pd.DataFrame(columns)
    atomic_write(csv_file, lambda temporary: frame.to_csv(temporary, index=False))
    show(*parts)
    return finish(plain, json_file, csv_file)


def _configs(files: list[Path], presets: list[str], mode: str | None) -> dict[str, Candidate]:
    from var_moe.optimization.candidate import load_candidate, preset

    named = presets or ([] if files else ["balanced"])
    from_files = {str(path): load_candidate(path).in_mode(mode) for path in files}
    return from_files | {name: preset(name, mode) for name in named}


def _profile_folder(trace: Path, given: Path | None) -> Path:
    from var_moe.calibration.profile import HEAD_FILE

    if given is not None:
        return given
    places = [trace / "profile", trace.parent / "profile"]
    for place in places:
        if (place / HEAD_FILE).is_file():
            return place
    raise UsageError(
        f"no profile in {places[0]} or {places[1]}; give one with --profile, the one that the "
        "trace was recorded with"
    )


def _cost_model(given: Path | None, folders: list[Path]) -> CostModel | None:
    from var_moe.evaluation.cost import CostModel
    from var_moe.storage import read_json

    for path in [given] if given else [folder / "cost_model.json" for folder in folders]:
        if given or path.is_file():
            return CostModel.from_dict(read_json(path, what="cost model"), source=str(path))
    return None


def _check_cost(cost: CostModel, head: dict[str, Any]) -> None:
    sizes = {"layers": cost.layers, "experts": cost.experts, "top_k": cost.top_k}
    for name, size in sizes.items():
        if size != head[name]:
            raise UsageError(
                f"cost model of {name} = {size} does not fit the trace of model "
                f"{head['model']!r} with {name} = {head[name]}; fit one for that model"
            )


def _about(
    recorded: RoutingTrace,
    profile: RoutingProfile,
    trace: Path,
    place: Path,
    cost: CostModel | None,
    notes: list[str],
) -> dict[str, Any]:
    """What a result file says of where it comes from."""
    from var_moe.storage import SCHEMA_VERSION, provenance

    head = recorded.head
    kept = ("model", "revision", "dtype", "dataset", "data_hash", "tokens", "seed")
    return {
        "schema_version": SCHEMA_VERSION,
        "trace": {
            "folder": str(trace),
            **{name: head.get(name) for name in kept},
            "documents": len(recorded.documents),
        },
        "profile": {"folder": str(place), "hash": profile.hash},
        "cost_model_error_relative": None if cost is None else cost.error,
        "notes": notes,
        "provenance": provenance(),
    }


def _rows(
    trace: RoutingTrace,
    profile: RoutingProfile,
    configs: dict[str, Candidate],
    cost: CostModel | None,
) -> list[dict[str, Any]]:
    """What each configuration decides, and its speedup where there is a cost model."""
    from var_moe.tracing.policies import replayer_of

    rows = []
    for name, one in configs.items():
        try:
            calibration = profile.calibration(one.compensation)
            (replayed,) = replayer_of(trace, one.policy, calibration).replay([one.settings])
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None
        # As in a search: deciding counts where it is timed, or with a compensation.
        timed = one.spec.load().cost_settings(one.settings) is not None
        helped = replayed.adds_residual
        speedup = cost and cost.speedup(replayed.report, decided=timed or helped, residual=helped)
        row = {"name": name, "config": one.to_dict(), **replayed.to_dict()}
        rows.append({**row, "predicted_speedup": speedup})
    return rows


_FIGURES = (
    *("experts_per_token", "fast_pct", "cached_pct", "learned_pct", "cache_hit_rate"),
    *("predicted_degradation", "predicted_speedup"),
)


def _flat(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The rows as columns of a CSV file, each setting a column."""
    flat = []
    for row in rows:
        own = {key: value for key, value in row["config"].items() if key != "settings"}
        figures = {key: row[key] for key in row if key in _FIGURES}
        flat.append({"name": row["name"], **own, **row["config"].get("settings", {}), **figures})
    columns = dict.fromkeys(name for row in flat for name in row)
    return {name: [row.get(name) for row in flat] for name in columns}


def _grid(
    trace: RoutingTrace,
    profile: RoutingProfile,
    n_points: int,
    mode: str,
    cost: CostModel | None,
    progress: Progress,
) -> ForecastGrid:
    """Forecasts of every combination of `n_points` values of VAR's thresholds."""
    from var_moe.config import SEARCH_SPACE
    from var_moe.optimization.forecast import ForecastGrid
    from var_moe.optimization.search_space import dimensions
    from var_moe.tracing.replay import TraceReplay

    values = {d.name: tuple(d.grid(n_points)) for d in dimensions(SEARCH_SPACE)}

    def speedups(pairs: Any, residual: bool) -> Any:
        assert cost is not None
        return cost.speedups(pairs, tokens=trace.tokens, residual=residual)

    columns = TraceReplay(trace, profile).grid(
        values, {"mode": mode}, speedups=speedups if cost else None, progress=progress
    )
    return ForecastGrid(values=values, columns=columns)


def _front(
    forecasts: ForecastGrid, mode: str, max_degradation: float, names: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The points that no other beats in speed and degradation; none without degradations."""
    from var_moe.config import VARConfig

    front = []
    for number in forecasts.front() if "degradation" in forecasts.columns else []:
        row = {names.get(name, name): value for name, value in forecasts.row(number).items()}
        config = VARConfig(mode=mode, **forecasts.point(number))
        feasible = row["predicted_degradation"] <= max_degradation
        front.append({"config": config.to_dict(), **row, "feasible": feasible})
    return front


def _where(trace: Mapping[str, Any]) -> str:
    return f"{trace['model']} on {trace['dataset']}, {trace['tokens']:,} tokens"


def _replays(rows: Sequence[Mapping[str, Any]], trace: Mapping[str, Any]) -> Any:
    """A line for each configuration."""
    columns = {
        "": "{name}",
        "experts/token": "{experts_per_token:.3f}",
        "fast/cached/learned %": TIERS,
        "cache hits": "{cache_hit_rate:.1%}",
        "PPL change, predicted": "{predicted_degradation:+.2%}",
        "speedup, predicted": "{predicted_speedup:.3f}x",
    }
    shown = [{"predicted_degradation": None, **row} for row in rows]
    return table(f"Replayed {_where(trace)}", columns, shown)


def _shown_front(result: Mapping[str, Any]) -> list[Any]:
    """Points of the front; some of them where there are many."""
    front, limit = result["front"], f"{100 * result['max_degradation']:g}%"
    if not front:
        return []
    columns = {short: f"{{config[{name}]:g}}" for name, short in _SHORT.items()}
    columns |= {
        "experts/token": "{experts_per_token:.3f}",
        "fast/cached/learned %": TIERS,
        "PPL change": "{predicted_degradation:+.2%}{star}",
        "speedup": "{predicted_speedup:.3f}x",
    }
    last = len(front) - 1
    chosen = {round(last * step / (_SHOWN - 1)) for step in range(_SHOWN)}
    feasible = [number for number, row in enumerate(front) if row["feasible"]]
    rows = [
        {"predicted_speedup": None, **front[number], "star": " *" * front[number]["feasible"]}
        for number in sorted(chosen | set(feasible[-1:]))
    ]
    title = (
        f"{len(front)} points that no other beats in speed and degradation "
        f"(* predicted within {limit})"
    )
    about = f"Replayed {result['points']:,} points ({result['mode']}): {_where(result['trace'])}"
    return [about, table(title, columns, rows)]
