"""``var-moe profile``: routing statistics of a model on calibration text."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from var_moe.cli.options import CalibrationTextOptions, ModelOptions, RunOptions
from var_moe.cli.output import CommandResult, make_report, table
from var_moe.config import check_count

if TYPE_CHECKING:
    from var_moe.calibration.profile import RoutingProfile


def profile(
    *,
    model: ModelOptions = ModelOptions(),
    text: CalibrationTextOptions = CalibrationTextOptions(),
    profile: Path | None = None,
    output: Path = Path("results/profile"),
    max_tokens: int | None = None,
    damage_tokens: int | None = None,
    run: RunOptions = RunOptions(),
) -> CommandResult:
    """Gather routing statistics per (layer, token), residual means, and predicted damages.

    Args:
        profile: show this ready profile instead of making one.
        output: folder for the profile; an interrupted one goes on there.
        max_tokens: calibration size, to which the last document is cut; frequency_threshold
            counts in a text of this size.
        damage_tokens: of the backward pass that predicts what a cut costs; 0 leaves it out.
    """
    if profile is not None:
        from var_moe.calibration.profile import RoutingProfile

        ready = RoutingProfile.load(profile)
        _print(ready, profile)
        return CommandResult(ready.head)
    check_count("max_tokens", max_tokens)
    check_count("damage_tokens", damage_tokens, 0)
    dataset = text.named()
    run.begin(model.model, dataset, output=output)
    from var_moe.calibration.calibrate import DAMAGE_TOKENS, with_damages
    from var_moe.calibration.collect import DEFAULT_TOKENS, collect_profile
    from var_moe.data.text import load_text
    from var_moe.optimization.preparation import DAMAGE_FOLDER, tokenised

    texts = load_text(dataset, text.split)
    with run.progress() as progress:
        loaded = model.load()
        encoded = tokenised(texts, loaded)
        output.mkdir(parents=True, exist_ok=True)
        made = collect_profile(
            loaded,
            encoded.documents,
            dataset=dataset,
            data_hash=encoded.data_hash,
            max_tokens=DEFAULT_TOKENS if max_tokens is None else max_tokens,
            seed=run.seed,
            checkpoint=output / "checkpoint.safetensors",
            progress=partial(progress, "profiling the routing"),
        )
        made.save(output)
        made = with_damages(
            loaded,
            made,
            encoded.documents,
            data={"dataset": dataset, "data_hash": encoded.data_hash},
            tokens=DAMAGE_TOKENS if damage_tokens is None else damage_tokens,
            folder=output / DAMAGE_FOLDER,
            progress=progress,
        )
        made.save(output)
    _print(made, output)
    make_report(output)
    return CommandResult(made.head)


def _print(profile: RoutingProfile, output: Path) -> None:
    from var_moe.terminal import show

    head, rows = profile.head, []
    for layer, stats in profile.stats.groupby("layer"):
        weight = stats["frequency"] / stats["frequency"].sum()
        names = ("mean_entropy", "mean_confidence", "routing_consistency")
        means = {name: float((weight * stats[name]).sum()) for name in names}
        reach = float(weight[stats["mean_entropy"] <= 0.5].sum())
        rows.append({"layer": layer, "reach": reach, **means})
    columns = {
        "layer": "{layer}",
        "entropy (nats)": "{mean_entropy:.3f}",
        "confidence": "{mean_confidence:.3f}",
        "consistency": "{routing_consistency:.3f}",
        "entropy <= 0.5": "{reach:.1%}",
    }
    title = (
        f"Routing of {head['model']} on {head['tokens']:,} tokens of {head['dataset']} "
        f"(weighted by frequency; entropy is at most {head['entropy_max_nats']:.2f} nats)"
    )
    show(table(title, columns, rows), f"Profile: {output}")
