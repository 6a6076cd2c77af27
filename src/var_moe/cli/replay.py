"""``var-moe replay``: what configurations decide on a recorded trace, without the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from var_moe.cli.options import Mode, QuietOptions, Words
from var_moe.cli.output import TIERS, CommandResult, finish, table
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
    "no cost_model.json beside the trace or the profile, so no speedup is predicted "
    "(`var-moe tune` and `var-moe trace --timings` fit one)"
)
_NO_DAMAGE = (
    "the trace was recorded with --decisions_only, so no degradation is predicted and there is "
    "no front"
)
_SHOWN = 12  # points of a front
_PREDICTED = {"degradation": "predicted_degradation", "speedup": "predicted_speedup"}
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
    output: Path = Path("results/replay"),
    max_degradation: float = MAX_DEGRADATION,
    run: QuietOptions = QuietOptions(),
) -> CommandResult:
    """Predict tiers, experts per token, degradation and speedup from a trace.

    Speedups are predicted with the cost_model.json in or beside the folder of the trace or the
    profile.

    Args:
        trace: folder that `var-moe trace` (or a tuning run) recorded.
        profile: profile folder; by default the one in or beside the trace's folder.
        config: configurations that any command wrote, such as best_config.json, or VAR
            configurations (JSON), one or several.
        preset: conservative, balanced, aggressive; one or several.
        grid: replay all combinations of so many values per threshold, and show which
            thresholds matter and the best points.
        mode: overrides the mode of VAR's configurations.
        output: folder for replay.json, and for replay.csv with all points of the grid.
        max_degradation: bound on the predicted degradation, to mark points of the grid.
    """
    from var_moe.cli.subject import named_candidates
    from var_moe.config import SEARCH_SPACE, check_bound
    from var_moe.optimization.search_space import check_grid
    from var_moe.storage import (
        SCHEMA_VERSION,
        atomic_write,
        atomic_write_json,
        check_output_folder,
        jsonable,
        provenance,
    )

    check_output_folder(output)
    check_bound(max_degradation)
    if grid is not None and (config or preset):
        raise UsageError("--grid has configurations of its own: leave --config and --preset out")
    if grid is not None:
        check_grid(SEARCH_SPACE, grid, name="grid")
    run.say(f"reading trace {trace} ...")
    candidates = named_candidates(config or [], preset or ([] if config else ["balanced"]), mode)
    place = _profile_folder(trace, profile)
    cost = _cost_model([trace, trace.parent, place, place.parent])
    import pandas as pd

    from var_moe.calibration.profile import RoutingProfile
    from var_moe.models.checks import check_droppable
    from var_moe.terminal import show
    from var_moe.tracing.trace import RoutingTrace

    recorded, known = RoutingTrace.load(trace), RoutingProfile.load(place)
    head = recorded.head
    check_droppable(head["model"], head["top_k"])
    recorded.check_profile(known)
    if cost is not None:
        _check_cost(cost, head)
    kept = ("model", "revision", "dtype", "dataset", "data_hash", "tokens", "seed")
    about = {"folder": str(trace), **{name: head.get(name) for name in kept}}
    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "trace": {**about, "documents": len(recorded.documents)},
        "profile": {"folder": str(place), "hash": known.hash},
        "cost_model_error_relative": None if cost is None else cost.error,
        "notes": [_NO_COST] * (cost is None) + [_NO_DAMAGE] * (not recorded.damage),
        "provenance": provenance(),
    }
    show(f"Replayed {head['model']} on {head['dataset']}, {head['tokens']:,} tokens")
    files = [output / "replay.json"]
    if grid is None:
        result["rows"] = _rows(recorded, known, candidates, cost)
        show(_shown_rows(result["rows"]))
    else:
        var_mode = mode or "verified"
        with run.progress() as progress:
            forecasts = _grid(recorded, known, grid, var_mode, cost, progress)
        front = _front(forecasts, var_mode, max_degradation)
        result |= {"mode": var_mode, "max_degradation": max_degradation, "front": front}
        result["values"] = {name: list(values) for name, values in forecasts.values.items()}
        result["points"] = forecasts.size
        frame = pd.DataFrame(forecasts.table()).rename(columns=_PREDICTED)
        files.append(output / "replay.csv")
        atomic_write(files[1], lambda temporary: frame.to_csv(temporary, index=False))
        show(*([_shown_front(front, max_degradation)] if front else []))
    result = jsonable(result)
    atomic_write_json(files[0], result)
    return finish(result, *files)


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


def _cost_model(folders: Sequence[Path]) -> CostModel | None:
    from var_moe.evaluation.cost import CostModel
    from var_moe.storage import read_json

    for path in (folder / "cost_model.json" for folder in folders):
        if path.is_file():
            return CostModel.from_dict(read_json(path, what="cost model"), source=str(path))
    return None


def _check_cost(cost: CostModel, head: Mapping[str, Any]) -> None:
    for name in ("layers", "experts", "top_k"):
        if (size := getattr(cost, name)) != head[name]:
            raise UsageError(
                f"cost model of {name} = {size} does not fit the trace of model "
                f"{head['model']!r} with {name} = {head[name]}; fit one for that model"
            )


def _rows(
    trace: RoutingTrace,
    profile: RoutingProfile,
    candidates: Mapping[str, Candidate],
    cost: CostModel | None,
) -> list[dict[str, Any]]:
    """What each configuration decides, and its speedup where there is a cost model."""
    from var_moe.tracing.policies import replayer_of

    rows = []
    for name, one in candidates.items():
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


def _shown_rows(rows: Sequence[Mapping[str, Any]]) -> Any:
    columns = {
        "": "{name}",
        "experts per token": "{experts_per_token:.3f}",
        "fast/cached/learned %": TIERS,
        "cache hits": "{cache_hit_rate:.1%}",
        "PPL change, predicted": "{predicted_degradation:+.2%}",
        "speedup, predicted": "{predicted_speedup:.3f}x",
    }
    return table("", columns, [{"predicted_degradation": None, **row} for row in rows])


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


def _front(forecasts: ForecastGrid, mode: str, max_degradation: float) -> list[dict[str, Any]]:
    """The points that no other beats in speed and degradation; none without degradations."""
    from var_moe.config import VARConfig

    front = []
    for number in forecasts.front() if "degradation" in forecasts.columns else []:
        row = {_PREDICTED.get(name, name): value for name, value in forecasts.row(number).items()}
        config = VARConfig(mode=mode, **forecasts.point(number))
        feasible = row["predicted_degradation"] <= max_degradation
        front.append({"config": config.to_dict(), **row, "feasible": feasible})
    return front


def _shown_front(front: Sequence[Mapping[str, Any]], max_degradation: float) -> Any:
    """Points of the front, some of them where there are many; and the fastest within the bound."""
    columns = {short: f"{{config[{name}]:g}}" for name, short in _SHORT.items()}
    columns |= {
        "experts per token": "{experts_per_token:.3f}",
        "fast/cached/learned %": TIERS,
        "PPL change": "{predicted_degradation:+.2%}{star}",
        "speedup": "{predicted_speedup:.3f}x",
    }
    chosen = {round((len(front) - 1) * step / (_SHOWN - 1)) for step in range(_SHOWN)}
    chosen |= set([number for number, row in enumerate(front) if row["feasible"]][-1:])
    rows = [
        {"predicted_speedup": None, **front[number], "star": " *" * front[number]["feasible"]}
        for number in sorted(chosen)
    ]
    title = (
        f"{len(front)} points that no other beats in speed and degradation "
        f"(* predicted within {100 * max_degradation:g}%)"
    )
    return table(title, columns, rows)
