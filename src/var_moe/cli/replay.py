"""``var-moe replay``: what configurations decide on a recorded trace, without the model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from var_moe.cli.output import Answer
from var_moe.config import MAX_DEGRADATION
from var_moe.errors import UsageError

if TYPE_CHECKING:
    from var_moe.calibration.profile import RoutingProfile
    from var_moe.evaluation.cost import CostModel
    from var_moe.evaluation.evaluator import Progress
    from var_moe.optimization.candidate import Candidate
    from var_moe.tracing.trace import RoutingTrace

COST_FILE = "cost_model.json"
_NO_COST = (
    f"no {COST_FILE} beside the trace or the profile, so no speedup is predicted: give one with "
    "--cost (`var-moe tune` fits one)"
)
_NO_DAMAGE = (
    "the trace was recorded with --decisions_only, so no degradation is predicted and there is "
    "no front"
)


def replay(
    trace: Path,
    *,
    profile: Path | None = None,
    config: Annotated[list[Path] | None, Parameter(consume_multiple=True)] = None,
    preset: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    grid: int | None = None,
    mode: Literal["verified", "plain"] | None = None,
    cost: Path | None = None,
    output: Path = Path("results/replay"),
    max_degradation: float = MAX_DEGRADATION,
    quiet: bool = False,
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
        quiet: no progress.
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
    if not quiet:
        print(f"reading trace {trace} ...", file=sys.stderr, flush=True)
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
        result = _some(recorded, known, configs, model, about, output)
    else:
        from var_moe.cli.progress import StageProgress

        with StageProgress() as progress:
            shown = None if quiet else progress
            mode = mode or "verified"
            result = _grid(
                recorded, known, grid, mode, model, about, output, max_degradation, shown
            )
    for note in notes:
        print(f"Note: {note}")
    return Answer(result)


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

    found = [given] if given else [folder / COST_FILE for folder in folders]
    for path in found:
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


def _some(
    trace: RoutingTrace,
    profile: RoutingProfile,
    configs: dict[str, Candidate],
    cost: CostModel | None,
    about: dict[str, Any],
    output: Path,
) -> dict[str, Any]:
    from var_moe.cli.replay_tables import print_replays
    from var_moe.storage import atomic_write_json, jsonable
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
    result: dict[str, Any] = jsonable({**about, "rows": rows})
    atomic_write_json(output / "replay.json", result)
    flat = [
        {
            "name": row["name"],
            **{k: v for k, v in row["config"].items() if k != "settings"},
            **row["config"].get("settings", {}),
            **{k: v for k, v in row.items() if k in _FLAT},
        }
        for row in rows
    ]
    columns = dict.fromkeys(name for row in flat for name in row)
    _write_csv({name: [row.get(name) for row in flat] for name in columns}, output)
    print_replays(rows, about["trace"])
    print(f"Saved: {output / 'replay.json'}, {output / 'replay.csv'}")
    return result


_FLAT = (
    *("experts_per_token", "fast_pct", "cached_pct", "learned_pct", "cache_hit_rate"),
    *("predicted_degradation", "predicted_speedup"),
)


def _grid(
    trace: RoutingTrace,
    profile: RoutingProfile,
    n_points: int,
    mode: str,
    cost: CostModel | None,
    about: dict[str, Any],
    output: Path,
    max_degradation: float,
    progress: Progress | None,
) -> dict[str, Any]:
    from var_moe.cli.replay_tables import print_front
    from var_moe.config import SEARCH_SPACE, VARConfig
    from var_moe.optimization.forecast import ForecastGrid
    from var_moe.optimization.search_space import dimensions
    from var_moe.storage import atomic_write_json, jsonable
    from var_moe.tracing.replay import TraceReplay

    values = {d.name: tuple(d.grid(n_points)) for d in dimensions(SEARCH_SPACE)}

    def speedups(pairs: Any, residual: bool) -> Any:
        assert cost is not None
        return cost.speedups(pairs, tokens=trace.tokens, residual=residual)

    columns = TraceReplay(trace, profile).grid(
        values, {"mode": mode}, speedups=speedups if cost else None, progress=progress
    )
    found = ForecastGrid(values=values, columns=columns)
    predicted = {"degradation": "predicted_degradation", "speedup": "predicted_speedup"}
    front = []
    for number in found.front() if "degradation" in found.columns else []:
        row = {predicted.get(name, name): value for name, value in found.row(number).items()}
        config = VARConfig(mode=mode, **found.point(number))
        feasible = row["predicted_degradation"] <= max_degradation
        front.append({"config": config.to_dict(), **row, "feasible": feasible})
    result: dict[str, Any] = {
        **about,
        "mode": mode,
        "max_degradation": max_degradation,
        "values": {name: list(known) for name, known in found.values.items()},
        "points": found.size,
        "front": front,
    }
    atomic_write_json(output / "replay.json", jsonable(result))
    _write_csv({predicted.get(k, k): v for k, v in found.table().items()}, output)
    print_front(front, about["trace"], found.size, mode, max_degradation)
    print(f"Saved: {output / 'replay.json'}, {output / 'replay.csv'}")
    return result


def _write_csv(columns: dict[str, Any], output: Path) -> None:
    import pandas as pd

    from var_moe.storage import atomic_write

    frame = pd.DataFrame(columns)
    atomic_write(output / "replay.csv", lambda temporary: frame.to_csv(temporary, index=False))
