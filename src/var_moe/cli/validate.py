"""What ``var-moe tune`` does beside a search: ``--validate`` and ``--from``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from var_moe.cli.options import (
    QuietOptions,
    Searched,
    SearchedModelOptions,
    SearchedTextOptions,
    parse_compensation,
)
from var_moe.cli.output import CHANGE, SPEEDUP, Answer, finish, make_report, table
from var_moe.errors import UsageError


def validate(
    config: Path,
    *,
    model: SearchedModelOptions,
    text: SearchedTextOptions,
    run: QuietOptions,
    compensation: str | None,
    max_degradation: float | None,
    robust: bool,
    output: Path | None,
    profile: Path | None,
    **others: Any,
) -> Answer:
    """Measure one configuration on held-out text; for the arguments see `cli.tune.tune`."""
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
            progress=progress,
            **others,
        )
    _show(result)
    folder = output or config.parent
    return finish(result, folder / VALIDATION_FILE, report=folder)


def _show(result: Mapping[str, Any]) -> None:
    """Figures, factors, criteria."""
    from var_moe.optimization.summary import MET, apart_table
    from var_moe.terminal import show

    text, control = result["text"], result["random_skip"]
    judged = (
        "{degradation:+.2%} (95% upper bound {degradation_upper_95:+.2%}, {documents} documents)"
    )
    show(
        f"{text['dataset']} ({text['split']}): perplexity {result['baseline_perplexity']:.3f} -> "
        f"{result['perplexity']:.3f}, {judged.format_map(result)}"
    )
    if result.get("worst_dataset"):
        worst = {key.removeprefix("worst_"): result[key] for key in result if "worst_" in key}
        show(f"judged on the worst data set, {result['worst_dataset']}: {judged.format_map(worst)}")
    if result["by_dataset"]:
        show(apart_table(result["by_dataset"], title="Each data set by itself"))
    back, skip = result["backend_factor"], result["skipping_factor"]
    low, high = result["speedup_95"]
    criteria = [{**row, "met": MET[row["met"]]} for row in result["criteria"]]
    show(
        f"speedup {result['speedup']:.3f}x [{low:.3f}, {high:.3f}] against "
        f"{result['baseline_backend']} ~ backend ({result['backend']}) {back['median']:.3f} x "
        f"skipping {skip['median']:.3f} "
        f"(the executed pairs predict {result['predicted_speedup']:.3f}x); "
        f"{result['baseline_throughput_tps']:,.0f} -> "
        f"{result['throughput_tps']:,.0f} tokens/s; baseline against itself "
        f"{result['noise_floor']['median']:.3f}",
        f"{result['experts_per_token']:.3f} of {result['top_k']} experts per token; fast "
        f"{result['fast_pct']:.1f}%, cached {result['cached_pct']:.1f}%, learned "
        f"{result['learned_pct']:.1f}%; speedups of {len(result['runs'])} runs: "
        + ", ".join(f"{run['speedup']:.3f}" for run in result["runs"]),
        f"control: random skipping at {control['experts_per_token']:.3f} experts per token costs "
        f"{control['degradation']:+.2%}",
        table(
            "Success criteria",
            {"criterion": "{name}", "measured": "{measured}", "met": "{met}"},
            criteria,
        ),
    )


def answer(folder: Path, max_degradation: float | None, output: Path | None) -> Answer:
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
    place = output or folder / f"bound_{100 * max_degradation:g}pct"
    check_output_folder(place)
    metadata = read_json(folder / METADATA_FILE, what="metadata of a search")
    with entries_of(folder / METADATA_FILE):
        metadata["settings"] = {**metadata.get("settings", {}), "max_degradation": max_degradation}
        profile = metadata.get("profile", {})
        if (folder / "profile").is_dir():
            profile["path"] = str(folder / "profile")
    with entries_of(folder / PARETO_FILE):
        told = _sentence(best, max_degradation)
    metadata |= {"max_degradation": max_degradation, "answer": told, "answered_from": str(folder)}
    atomic_write_json(place / METADATA_FILE, metadata)
    atomic_write_json(place / CONFIG_FILE, best["config"])
    show(told, _front(points, max_degradation), f"Saved: {place / CONFIG_FILE}")
    make_report(place)
    show_next("tune", "--validate", place / CONFIG_FILE)
    return Answer(
        {
            "schema_version": SCHEMA_VERSION,
            "max_degradation": max_degradation,
            "best": best,
            "points": points,
            "provenance": provenance(),
        }
    )


def _sentence(best: Mapping[str, Any], max_degradation: float) -> str:
    """The verified point that answers a bound."""
    speed = "not timed"
    if best["speedup_95"]:  # none where the point broke the bound of its own search
        speed = "{:.3f}x [{:.3f}, {:.3f}]".format(best["speedup"], *best["speedup_95"])
    return (
        f"Fastest verified configuration with degradation below {100 * max_degradation:g}%: "
        f"{speed} at {best['degradation']:+.2%} perplexity "
        f"(95% upper bound {best['degradation_upper_95']:+.2%}), "
        f"{best['experts_per_token']:.2f} experts per token"
    )


def _front(points: Sequence[Mapping[str, Any]], max_degradation: float) -> Any:
    """The verified points of a search's front."""
    rows = [
        {
            **point,
            "keeps": "yes" if point["degradation_upper_95"] < max_degradation else "no",
            "speed": SPEEDUP.format_map(point) if point["speedup_95"] else "not timed",
        }
        for point in points
        if point["verified"]
    ]
    columns = {
        "": "{name}",
        "change (95% upper)": CHANGE,
        "speedup [95%]": "{speed}",
        "experts/token": "{experts_per_token:.3f}",
        f"keeps {100 * max_degradation:g}%": "{keeps}",
    }
    return table("Verified points, the safest first", columns, rows)
