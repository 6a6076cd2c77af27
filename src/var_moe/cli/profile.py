"""``var-moe profile``: routing statistics of a model on calibration text."""

from __future__ import annotations

import sys
from pathlib import Path

from var_moe.cli.output import Answer
from var_moe.config import check_count


def profile(
    *,
    model: str = "demo",
    dataset: str = "demo",
    split: str = "calibration",
    profile: Path | None = None,
    output: Path = Path("results/profile"),
    max_tokens: int | None = None,
    damage_tokens: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> Answer:
    """Gather routing statistics per (layer, token), residual means, and predicted damages.

    Args:
        model: demo, a local folder, or a Hub id.
        dataset: demo (or demo-postgres, ...), wikitext, a Hub name[:config], or a local file.
        split: part of the text to profile.
        profile: show this ready profile instead of making one.
        output: folder for the profile; an interrupted one goes on there.
        max_tokens: calibration size, to which the last document is cut; frequency_threshold
            counts in a text of this size.
        damage_tokens: of the backward pass that predicts what a cut costs; 0 leaves it out.
        seed: draws the documents when max_tokens takes a part of them.
        device: auto, cpu, cuda, ...
        dtype: auto, float32, bfloat16, float16.
        trust_remote_code: run a Hub model's own code.
        quiet: no progress.
    """
    from var_moe.cli.report import make_report
    from var_moe.storage import check_output_folder

    if profile is not None:
        from var_moe.calibration.profile import RoutingProfile

        ready = RoutingProfile.load(profile)
        _print(ready, profile)
        return Answer(ready.head)
    check_output_folder(output)
    check_count("max_tokens", max_tokens)
    check_count("damage_tokens", damage_tokens, 0)
    from var_moe.data.text import check_dataset, load_text
    from var_moe.models.loading import check_name

    check_name(model)
    check_dataset(dataset)
    if not quiet:
        print(f"loading model {model} ...", file=sys.stderr, flush=True)
    from var_moe.calibration.calibrate import DAMAGE_TOKENS, with_damages
    from var_moe.calibration.collect import DEFAULT_TOKENS, collect_profile
    from var_moe.cli.progress import StageProgress
    from var_moe.models.loading import load_model
    from var_moe.optimization.preparation import DAMAGE_FOLDER, tokenised

    texts = load_text(dataset, split)
    with StageProgress() as progress:
        loaded = load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        text = tokenised(texts, loaded)
        output.mkdir(parents=True, exist_ok=True)
        made = collect_profile(
            loaded,
            text.documents,
            dataset=dataset,
            data_hash=text.data_hash,
            max_tokens=DEFAULT_TOKENS if max_tokens is None else max_tokens,
            seed=seed,
            checkpoint=output / "checkpoint.safetensors",
            progress=None
            if quiet
            else lambda done, total: progress("profiling the routing", done, total),
        )
        made.save(output)
        made = with_damages(
            loaded,
            made,
            text.documents,
            data={"dataset": dataset, "data_hash": text.data_hash},
            tokens=DAMAGE_TOKENS if damage_tokens is None else damage_tokens,
            folder=output / DAMAGE_FOLDER,
            progress=None if quiet else progress,
        )
        made.save(output)
    _print(made, output)
    make_report(output)
    return Answer(made.head)


def _print(profile: object, output: Path) -> None:
    from rich.table import Table

    from var_moe.calibration.profile import RoutingProfile
    from var_moe.terminal import show

    assert isinstance(profile, RoutingProfile)
    head, stats = profile.head, profile.stats
    table = Table(
        title=f"Routing of {head['model']} on {head['tokens']:,} tokens of {head['dataset']} "
        f"(weighted by frequency; entropy is at most {head['entropy_max_nats']:.2f} nats)",
        title_justify="left",
    )
    for heading in ("layer", "entropy (nats)", "confidence", "consistency", "entropy <= 0.5"):
        table.add_column(heading, justify="right")
    for layer, rows in stats.groupby("layer"):
        weight = rows["frequency"] / rows["frequency"].sum()
        reach = float(weight[rows["mean_entropy"] <= 0.5].sum())
        table.add_row(
            str(layer),
            f"{float((weight * rows['mean_entropy']).sum()):.3f}",
            f"{float((weight * rows['mean_confidence']).sum()):.3f}",
            f"{float((weight * rows['routing_consistency']).sum()):.3f}",
            f"{100 * reach:.1f}%",
        )
    show(table, f"Profile: {output}")
