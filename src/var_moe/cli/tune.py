"""``var-moe tune``: a search, once or for several seeds; ``--validate``; ``--from``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from var_moe.cli.options import (
    Mode,
    QuietOptions,
    Repeated,
    Searched,
    SearchedModelOptions,
    SearchedTextOptions,
    SpeedOptions,
    parse_compensation,
    settings_of,
)
from var_moe.cli.output import (
    CHANGE,
    SPEEDUP,
    CommandResult,
    finish,
    make_report,
    show_section,
    table,
)
from var_moe.errors import UsageError


def tune(
    *,
    method: Literal["replay", "bayesian", "grid", "random"] | None = None,
    model: SearchedModelOptions = SearchedModelOptions(),
    text: SearchedTextOptions = SearchedTextOptions(),
    speed: SpeedOptions = SpeedOptions(),
    n_calls: int | None = None,
    n_points: int | None = None,
    exhaustive: bool = False,
    max_degradation: float | None = None,
    output: Path | None = None,
    validate: Path | None = None,
    from_: Annotated[Path | None, Parameter(name="--from")] = None,
    seed: int | None = None,
    seeds: str | None = None,
    robust: bool = False,
    mode: Mode = None,
    policy: str | None = None,
    compensation: str | None = None,
    engine: Literal["optuna", "skopt"] | None = None,
    max_samples: int | None = None,
    final_samples: int | None = None,
    bounds: Repeated = None,
    storage: str | None = None,
    resume: bool = False,
    profile: Path | None = None,
    calibration_tokens: int | None = None,
    split: str = "test",
    run: QuietOptions = QuietOptions(),
) -> CommandResult:
    """Find the configuration with the most throughput within a perplexity bound.

    Args:
        method: how points are chosen: replay (default) runs the model for ten configurations that
            thousands of forecasts choose; grid chooses among n_points^6 forecasts (with --policy,
            it runs the model for each point of its grid); bayesian and random run the model for
            each point.
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
        seeds: as 1,2,3: one search for each, into --output/run_1 and so on, and one table of
            their winners (stability.json).
        robust: hold the bound against the worst of several data sets.
        mode: verified (default) asks the router and lets table and cache only license a cut.
        policy: damage (default) cuts what is predicted to cost least; var has the six thresholds,
            and is the default where --mode, --method or --bounds is given; or another one (naee,
            ser, top_p, ...).
        compensation: what stands in for dropped experts: none, means, learned, or the folder of a
            fitted one; by default all that the profile has are searched.
        engine: of the bayesian method: optuna (default) or skopt.
        max_samples: documents that each evaluation (or --validate) scores.
        final_samples: documents of the last measurement; by default half of validation.
        bounds: name=low:high, expands or narrows the search space; may be repeated.
        storage: keep the trials in this file or database (as sqlite:///trials.db), which several
            processes can share; by default optuna_study.log in --output.
        resume: go on with the interrupted search in --output, or join the one in --storage.
        profile: a ready profile folder; by default the routing is profiled first.
        calibration_tokens: size of a fresh profile.
        split: text for --validate.
    """
    options = dict(locals())
    if seeds is not None and (validate is not None or from_ is not None):
        raise UsageError("--seeds belongs to a search, not to --validate or --from")
    if validate is not None:
        if policy is not None:
            raise UsageError("--policy does not belong to --validate: the configuration names it")
        return _validate(
            validate,
            model=model,
            text=text,
            speed=speed,
            run=run,
            compensation=compensation,
            max_degradation=max_degradation,
            robust=robust,
            output=output,
            profile=profile,
            split=split,
            mode=mode,
            max_samples=max_samples,
        )
    if from_ is not None:
        return _answer(from_, max_degradation, output)
    from var_moe.optimization.run import STABILITY_FILE, parse_seeds, seeds_table, tune_seeds
    from var_moe.optimization.settings import TuneSettings
    from var_moe.optimization.trial_log import check_storage
    from var_moe.storage import read_json

    # Everything that can be wrong is looked at before the model is loaded.
    if seeds is not None and seed is not None:
        raise UsageError("--seeds and --seed do not belong together: give one of them")
    several = parse_seeds(seeds) if seeds is not None else ()
    name, place = parse_compensation(compensation)
    options |= {"dataset": text.named(), "compensation": name, "compensation_folder": place}
    options["setting"] = speed.setting()
    settings = settings_of(TuneSettings, options)
    output = settings.output
    check_storage(settings.trial_log, resume=settings.resume)
    run.begin(model.model or "demo", settings.dataset, output=output)
    from var_moe.optimization.measure_again import NothingFitsError
    from var_moe.optimization.results import RESULTS_FILE
    from var_moe.optimization.run import tune as run_tune
    from var_moe.terminal import show, show_next

    with run.progress() as progress:
        loaded = model.load()
        shown: dict[str, Any] = {"verbose": not run.quiet}
        shown |= {"progress": progress, "say": progress.say}
        if several:
            report = tune_seeds(loaded, settings, several, **shown)
            show(seeds_table(report))
            return finish({**report}, output / STABILITY_FILE, report=output)
        try:
            outcome = run_tune(loaded, settings, **shown)
        except NothingFitsError as error:
            show(*error.parts[1:])  # the first part is the error's own line
            make_report(output)
            error.result = read_json(output / RESULTS_FILE, what="results of a search")
            raise
    show(*outcome.parts, f"Results: {output}")
    make_report(output)
    show_next("tune", "--validate", output / "best_config.json")
    return CommandResult(read_json(output / RESULTS_FILE, what="results of a search"))


def _validate(
    config: Path,
    *,
    model: SearchedModelOptions,
    text: SearchedTextOptions,
    speed: SpeedOptions,
    run: QuietOptions,
    compensation: str | None,
    max_degradation: float | None,
    robust: bool,
    output: Path | None,
    profile: Path | None,
    **others: Any,
) -> CommandResult:
    """Measure one configuration on held-out text; for the arguments see `tune`."""
    from var_moe.config import check_bound
    from var_moe.data.text import check_robust, names_of
    from var_moe.optimization.candidate import load_candidate

    load_candidate(config)
    _, place = parse_compensation(compensation, folder_only=True)
    searched = Searched.beside(config)
    name, dataset = model.model or searched.model, text.named(searched.dataset)
    bound = check_bound(searched.max_degradation if max_degradation is None else max_degradation)
    if robust:
        check_robust(robust, dataset)
    else:  # as its search did, where the text is of several data sets again
        robust = searched.robust and len(names_of(dataset)) > 1
    doing = f"validating {config} of {name} on {dataset} ({others['split']}) ..."
    run.begin(name, dataset, output=output, doing=doing)
    from var_moe.optimization.validation import VALIDATION_FILE, find_profile
    from var_moe.optimization.validation import validate as run_validate
    from var_moe.report.measured import held_out_section

    find_profile(config, profile)
    with run.progress() as progress:
        result = run_validate(
            model.load(name),
            config,
            dataset=dataset,
            max_degradation=bound,
            robust=robust,
            output=output,
            profile_path=profile,
            compensation=place,
            setting=speed.setting(searched.setting),
            progress=progress,
            **others,
        )
    show_section(held_out_section, validation=result)
    if result.get("worst_dataset"):
        worst = "{worst_dataset}, upper bound {worst_degradation_upper_95:+.2%}".format_map(result)
        print(f"Judged on the worst data set: {worst}")
    folder = output or config.parent
    return finish(result, folder / VALIDATION_FILE, report=folder)


def _answer(folder: Path, max_degradation: float | None, output: Path | None) -> CommandResult:
    """Another bound, answered from the front of a finished search."""
    from var_moe.optimization.results import CONFIG_FILE, METADATA_FILE
    from var_moe.optimization.selection import PARETO_FILE, answer_from
    from var_moe.storage import (
        SCHEMA_VERSION,
        atomic_write_json,
        check_output_folder,
        entries_of,
        provenance,
        read_json,
    )
    from var_moe.terminal import show, show_next

    if max_degradation is None:
        raise UsageError("--from needs --max_degradation: the bound to answer")
    best, points = answer_from(folder, max_degradation)
    limit = f"{100 * max_degradation:g}%"
    place = output or folder / f"bound_{100 * max_degradation:g}pct"
    check_output_folder(place)
    with entries_of(folder / PARETO_FILE):
        timed = f"{SPEEDUP.format_map(best)} times as fast" if best["speedup_95"] else "not timed"
        answer = (
            f"Fastest verified configuration with degradation below {limit}: {timed} at "
            f"{CHANGE.format_map(best)} perplexity, {best['experts_per_token']:.2f} experts per "
            "token"
        )
        columns = {
            "": "{name}",
            "change (95% upper)": CHANGE,
            "speedup [95%]": SPEEDUP,
            "experts per token": "{experts_per_token:.3f}",
            f"keeps {limit}": "{keeps}",
        }
        verified = [
            {**one, "keeps": "yes" if one["degradation_upper_95"] < max_degradation else "no"}
            for one in points
            if one["verified"]
        ]
        front = table("Verified points, the safest first", columns, verified)
    metadata = read_json(folder / METADATA_FILE, what="metadata of a search")
    with entries_of(folder / METADATA_FILE):
        metadata["settings"] = {**metadata.get("settings", {}), "max_degradation": max_degradation}
        profile = metadata.get("profile", {})
        if (folder / "profile").is_dir():
            profile["path"] = str(folder / "profile")
    metadata |= {"max_degradation": max_degradation, "answer": answer, "answered_from": str(folder)}
    atomic_write_json(place / METADATA_FILE, metadata)
    atomic_write_json(place / CONFIG_FILE, best["config"])
    show(answer, front, f"Saved: {place / CONFIG_FILE}")
    make_report(place)
    show_next("tune", "--validate", place / CONFIG_FILE)
    return CommandResult(
        {
            "schema_version": SCHEMA_VERSION,
            "max_degradation": max_degradation,
            "best": best,
            "points": points,
            "provenance": provenance(),
        }
    )
