"""``var-moe tune``: the main job, once or for several seeds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from var_moe.cli.options import (
    Mode,
    QuietOptions,
    Repeated,
    SearchedModelOptions,
    SearchedTextOptions,
    check_names,
    parse_compensation,
    settings_of,
)
from var_moe.cli.output import Answer, finish, make_report
from var_moe.cli.validate import answer
from var_moe.cli.validate import validate as run_validation
from var_moe.errors import UsageError

if TYPE_CHECKING:
    from var_moe.optimization.settings import TuneSettings


def tune(
    *,
    method: Literal["replay", "bayesian", "grid", "random"] | None = None,
    model: SearchedModelOptions = SearchedModelOptions(),
    text: SearchedTextOptions = SearchedTextOptions(),
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
    yes: bool = False,
    run: QuietOptions = QuietOptions(),
) -> Answer:
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
        yes: do not ask before a long grid.
    """
    options = dict(locals())
    if seeds is not None and (validate is not None or from_ is not None):
        raise UsageError("--seeds belongs to a search, not to --validate or --from")
    if validate is not None:
        if policy is not None:
            raise UsageError("--policy does not belong to --validate: the configuration names it")
        return run_validation(
            validate,
            model=model,
            text=text,
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
        return answer(from_, max_degradation, output)
    from var_moe.optimization.seeds import STABILITY_FILE, parse_seeds, seeds_table, tune_seeds
    from var_moe.optimization.settings import TuneSettings
    from var_moe.optimization.trial_log import check_storage
    from var_moe.storage import read_json

    # Everything that can be wrong is looked at before the model is loaded.
    if seeds is not None and seed is not None:
        raise UsageError("--seeds and --seed do not belong together: give one of them")
    several = parse_seeds(seeds) if seeds is not None else ()
    name, place = parse_compensation(compensation)
    options |= {"dataset": text.named(), "compensation": name, "compensation_folder": place}
    check_names(model.model or "demo", options["dataset"])
    settings = settings_of(TuneSettings, options)
    output = settings.output
    check_storage(settings.trial_log, resume=settings.resume)
    if settings.method == "grid" and settings.exhaustive and not yes:
        _confirm_grid(settings)
    run.say(f"loading model {model.model or 'demo'} ...")
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
    return Answer(read_json(output / RESULTS_FILE, what="results of a search"))


def _confirm_grid(settings: TuneSettings) -> None:
    from var_moe.optimization.methods import CONFIRM_ABOVE
    from var_moe.optimization.search_space import grid_size

    size = grid_size(settings.space_for(2), settings.points)
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
