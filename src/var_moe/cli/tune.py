"""``var-moe tune``: the main job, and ``--validate`` on held-out text."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from var_moe.cli.compensation import parse_compensation
from var_moe.errors import UsageError

if TYPE_CHECKING:
    from var_moe.optimization.search_space import SearchSpace

DEFAULT_OUTPUT = Path("results/phase3")
DEFAULT_BOUND = 0.01
CALLS, FORECAST_CALLS = 50, 10
BEST_POLICY = "damage"


def tune(
    *,
    method: Literal["replay", "bayesian", "grid", "random"] | None = None,
    model: str | None = None,
    dataset: str | None = None,
    n_calls: int | None = None,
    n_points: int | None = None,
    exhaustive: bool = False,
    max_degradation: float | None = None,
    output: Path | None = None,
    validate: Path | None = None,
    from_: Annotated[Path | None, Parameter(name="--from")] = None,
    seed: int | None = None,
    mode: Literal["verified", "plain"] | None = None,
    policy: str | None = None,
    compensation: str | None = None,
    engine: Literal["optuna", "skopt"] = "optuna",
    max_samples: int | None = None,
    final_samples: int | None = None,
    bounds: Annotated[list[str] | None, Parameter(consume_multiple=False)] = None,
    resume: bool = False,
    profile: Path | None = None,
    calibration_tokens: int | None = None,
    split: str = "test",
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    yes: bool = False,
    quiet: bool = False,
) -> int:
    """Find the configuration with the most throughput within a perplexity bound.

    Args:
        method: how points are chosen: replay (default) runs the model for ten configurations that
            thousands of forecasts choose; grid chooses among n_points^6 forecasts (with --policy,
            it runs the model for each point of its grid); bayesian and random run the model for
            each point.
        model: demo (default), a local folder, or a Hub id.
        dataset: demo (default; or demo-postgres, ...), wikitext, a Hub name[:config], or a
            local file.
        n_calls: full evaluations; 10 by default where forecasts choose them, else 50.
        n_points: values per dimension of the grid; 5 by default, 3 with --exhaustive.
        exhaustive: run the model for every point of the grid.
        max_degradation: bound on the relative perplexity change; 0.01 (default) allows 1%.
        output: folder for the result files; results/phase3 by default.
        validate: measure this configuration on held-out text instead of searching; model,
            dataset, bound and folder are then by default those of its search.
        from_: answer --max_degradation from the front that an earlier search left in this folder,
            without a model.
        seed: of the search; by default a fresh one, which is recorded.
        mode: verified (default) asks the router and lets table and cache only license a cut.
        policy: damage (default) cuts what is predicted to cost least; var has the six thresholds,
            and is the default where --mode, --method or --bounds is given; or another one (naee,
            ser, top_p, ...).
        compensation: what stands in for dropped experts: none, means, learned, or the folder of a
            fitted one; by default the best in the profile for damage, none for other policies.
        engine: of the bayesian method.
        max_samples: documents that each evaluation (or --validate) scores.
        final_samples: documents of the last measurement; by default half of validation.
        bounds: name=low:high, expands or narrows the search space; may be repeated.
        resume: go on with the interrupted search in --output.
        profile: a ready profile folder; by default the routing is profiled first.
        calibration_tokens: size of a fresh profile.
        split: text for --validate.
        device: auto, cpu, cuda, ...
        dtype: auto, float32, bfloat16, float16.
        trust_remote_code: run a Hub model's own code.
        yes: do not ask before a long grid.
        quiet: no progress.
    """
    from var_moe.cli.progress import StageProgress
    from var_moe.models.loading import check_name, load_model
    from var_moe.storage import check_output_folder

    if validate is not None:
        if policy is not None:
            raise UsageError("--policy does not belong to --validate: the configuration names it")
        return _validate(
            validate,
            compensation=compensation,
            model=model,
            dataset=dataset,
            split=split,
            max_degradation=max_degradation,
            output=output,
            profile=profile,
            mode=mode,
            max_samples=max_samples,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            quiet=quiet,
        )
    if from_ is not None:
        return _from(from_, max_degradation, output)
    from var_moe.evaluation.text import check_dataset
    from var_moe.optimization.objective_protocol import check_bound
    from var_moe.optimization.search_space import grid_size, parse_bounds, point_count

    # Everything that can be wrong is looked at before the model is loaded.
    model, dataset, output = model or "demo", dataset or "demo", output or DEFAULT_OUTPUT
    max_degradation = check_bound(DEFAULT_BOUND if max_degradation is None else max_degradation)
    check_output_folder(output)
    if policy is None and mode is None and method is None and not bounds:
        policy = BEST_POLICY
    policy, mode = _policy(None if policy == "var" else policy, mode)
    stand_in, place = parse_compensation(compensation)
    if stand_in is not None and policy is None:
        raise UsageError("--compensation needs a --policy that drops experts, such as damage")
    method = method or _default_method(policy)
    exhaustive = exhaustive or bool(policy)
    by_forecasts = method == "replay" or (method == "grid" and not exhaustive)
    if n_calls is None:
        n_calls = FORECAST_CALLS if by_forecasts else CALLS
    if n_points is None:
        n_points = 3 if exhaustive else 5
    check_name(model)
    check_dataset(dataset)
    # A policy's names are the same for every K; its ranges wait for the model.
    space = parse_bounds(bounds or [], _space(policy, top_k=2))
    if method == "grid" and exhaustive and not yes:
        _confirm_grid(grid_size(space, n_points))
    if method == "bayesian" and engine == "skopt":
        from var_moe.optimization.skopt_engine import require_skopt

        require_skopt()
    if not quiet:
        print(f"loading model {model} ...", file=sys.stderr, flush=True)
    from var_moe.optimization.conclusion import NothingFitsError
    from var_moe.optimization.run import DEFAULT_SAMPLES, TuneSettings
    from var_moe.optimization.run import tune as run_tune
    from var_moe.optimization.summary import show
    from var_moe.profiling.collect import DEFAULT_TOKENS

    settings = TuneSettings(
        method=method,
        engine=engine,
        exhaustive=exhaustive,
        dataset=dataset,
        n_calls=n_calls,
        n_points=n_points,
        max_degradation=max_degradation,
        output=output,
        seed=seed,
        mode=mode or "verified",
        policy=policy,
        compensation=stand_in,
        compensation_folder=place,
        max_samples=DEFAULT_SAMPLES if max_samples is None else max_samples,
        final_samples=final_samples,
        space=space,
        resume=resume,
        profile=profile,
        calibration_tokens=DEFAULT_TOKENS if calibration_tokens is None else calibration_tokens,
    )
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 118)
    with StageProgress() as progress:
        loaded = load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        if policy:
            space = parse_bounds(bounds or [], _space(policy, top_k=loaded.top_k))
            settings = replace(settings, space=space, n_calls=int(min(n_calls, point_count(space))))
        try:
            outcome = run_tune(
                loaded,
                settings,
                progress=None if quiet else progress,
                say=(lambda _line: None) if quiet else progress.say,
                verbose=not quiet,
            )
        except NothingFitsError as error:
            show(error.parts[1:], console)  # the first part is the error's own line
            raise
    show(outcome.parts, console)
    console.print(f"Results: {output}", highlight=False)
    console.print(
        f"Next: var-moe tune --validate {output / 'best_config.json'}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _from(folder: Path, max_degradation: float | None, output: Path | None) -> int:
    """Another bound, answered from the front of a finished search."""
    from var_moe.cli.tables import print_front
    from var_moe.optimization.front import answer_from
    from var_moe.optimization.saving import CONFIG_FILE, METADATA_FILE
    from var_moe.storage import atomic_write_json, check_output_folder, read_json

    if max_degradation is None:
        raise UsageError("--from needs --max_degradation: the bound to answer")
    best, points = answer_from(folder, max_degradation)
    place = output or folder / f"bound_{100 * max_degradation:g}pct"
    check_output_folder(place)
    metadata = read_json(folder / METADATA_FILE, what="metadata of a search")
    metadata["settings"] = {**metadata.get("settings", {}), "max_degradation": max_degradation}
    profile = metadata.get("profile", {})
    if (folder / "profile").is_dir():
        profile["path"] = str(folder / "profile")
    atomic_write_json(place / METADATA_FILE, {**metadata, "answered_from": str(folder)})
    atomic_write_json(place / CONFIG_FILE, best["config"])
    print_front(points, best, max_degradation=max_degradation)
    print(f"Saved: {place / CONFIG_FILE}")
    print(f"Next: var-moe tune --validate {place / CONFIG_FILE}")
    return 0


def _policy(
    name: str | None, mode: Literal["verified", "plain"] | None
) -> tuple[str | None, Literal["verified", "plain"] | None]:
    """The policy to tune, None for VAR, and VAR's mode: ``var_plain`` is VAR in that mode."""
    from var_moe.routing.registry import policy_spec

    if name is None:
        return None, mode
    own = policy_spec(name).settings.get("mode")
    if mode is not None and own != mode:
        raise UsageError(f"--mode {mode} does not belong to --policy {name}: leave one out")
    if own is not None:
        return None, own
    if not policy_spec(name).search_space(2):
        raise UsageError(f"--policy {name} has nothing to tune")
    return name, None


def _default_method(policy: str | None) -> Literal["replay", "bayesian"]:
    """Replay, wherever a trace tells what decisions cost."""
    from var_moe.routing.registry import policy_spec

    return "replay" if policy is None or policy_spec(policy).cuts_only else "bayesian"


def _space(policy: str | None, *, top_k: int) -> SearchSpace:
    from var_moe.optimization.search_space import SEARCH_SPACE
    from var_moe.routing.registry import policy_spec

    return SEARCH_SPACE if policy is None else policy_spec(policy).search_space(top_k)


def _confirm_grid(size: int) -> None:
    from var_moe.optimization.grid import CONFIRM_ABOVE

    print(f"grid: {size:,} evaluations", file=sys.stderr)
    if size <= CONFIRM_ABOVE:
        return
    if not sys.stdin.isatty():
        raise UsageError(
            f"a grid of {size:,} evaluations needs a confirmation: add --yes, or lower --n_points"
        )
    answer = input(f"{size:,} evaluations take long. Go on? [y/N] ")
    if answer.strip().lower() not in ("y", "yes"):
        raise UsageError("not confirmed; lower --n_points or choose --method bayesian")


def _validate(
    config: Path,
    *,
    compensation: str | None,
    model: str | None,
    dataset: str | None,
    split: str,
    max_degradation: float | None,
    output: Path | None,
    profile: Path | None,
    mode: str | None,
    max_samples: int | None,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    quiet: bool,
) -> int:
    from var_moe.evaluation.text import check_dataset
    from var_moe.models.loading import check_name
    from var_moe.optimization.candidate import load_candidate
    from var_moe.optimization.objective_protocol import check_bound
    from var_moe.storage import check_output_folder

    load_candidate(config)
    name, place = parse_compensation(compensation)
    if name is not None and place is None:
        raise UsageError(f"--compensation {name}: the configuration names it; expected a folder")
    searched = search_of(config)
    model = model or searched.get("model", "demo")
    dataset = dataset or searched.get("dataset", "demo")
    if max_degradation is None:
        max_degradation = searched.get("max_degradation", DEFAULT_BOUND)
    bound = check_bound(max_degradation)
    if output:
        check_output_folder(output)
    check_name(model)
    check_dataset(dataset)
    if not quiet:
        print(f"validating {config} of {model} on {dataset} ({split}) ...", file=sys.stderr)
    from var_moe.cli.progress import StageProgress
    from var_moe.cli.tables import print_validation
    from var_moe.models.loading import load_model
    from var_moe.optimization.validation import find_profile
    from var_moe.optimization.validation import validate as run_validate

    find_profile(config, profile)
    with StageProgress() as progress:
        loaded = load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        result = run_validate(
            loaded,
            config,
            dataset=dataset,
            split=split,
            max_degradation=bound,
            output=output,
            profile_path=profile,
            compensation=place,
            mode=mode,
            max_samples=max_samples,
            progress=None if quiet else progress,
        )
    print_validation(result, folder=output or config.parent)
    return 0


def search_of(config: Path) -> dict[str, Any]:
    """Model, dataset and bound of the search that left a configuration, where it says so."""
    from var_moe.optimization.saving import METADATA_FILE
    from var_moe.storage import read_json

    beside = config.parent / METADATA_FILE
    if not beside.is_file():
        return {}
    metadata = read_json(beside, what="metadata of a search")
    known = {**metadata.get("identity", {}), **metadata.get("settings", {})}
    return {key: known[key] for key in ("model", "dataset", "max_degradation") if key in known}
