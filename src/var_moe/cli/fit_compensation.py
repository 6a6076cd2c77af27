"""``var-moe fit-compensation``: teach a small map to stand in for experts that do not run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from var_moe.cli.output import Answer
from var_moe.config import check_count
from var_moe.errors import UsageError


def fit_compensation(
    *,
    profile: Path,
    model: str = "demo",
    dataset: str = "demo",
    split: str = "calibration",
    output: Path | None = None,
    regress_tokens: int | None = None,
    tokens: int | None = None,
    rank: int | None = None,
    rate: float | None = None,
    damage_tokens: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> Answer:
    """Distil the unmodified model into what damage-aware skipping leaves of it.

    The model's weights stay as they are. What is fitted lies with the profile, and every later
    command with that profile uses it.

    Args:
        profile: profile folder of the same model.
        model: demo, a local folder, or a Hub id.
        dataset: demo (or demo-postgres, ...), wikitext, a Hub name[:config], or a local file.
        split: part of the text to fit on; a part of it is held out and ends the fit.
        output: folder; by default compensation/ in the profile's folder. An interrupted fit goes
            on there.
        regress_tokens: calibration tokens of the layer-wise part; 0 leaves it out.
        tokens: calibration tokens of the distillation, over as many passes as that takes.
        rank: of the map; by default the largest that costs less than 3% of what it saves.
        rate: highest learning rate of the distillation.
        damage_tokens: of the passes that predict what a cut costs, before and after.
        seed: draws the order of the text and the start.
        device: auto, cpu, cuda, ...
        dtype: auto, float32, bfloat16, float16.
        trust_remote_code: run a Hub model's own code.
        quiet: no progress.
    """
    from var_moe.data.text import check_dataset, load_text
    from var_moe.models.loading import check_name
    from var_moe.storage import check_output_folder

    check_count("damage_tokens", damage_tokens)
    if not profile.is_dir():
        raise UsageError(f"{profile}: no such profile folder; make one with `var-moe profile`")
    check_name(model)
    check_dataset(dataset)
    if not quiet:
        print(f"loading model {model} ...", file=sys.stderr, flush=True)
    from var_moe.calibration.calibrate import DAMAGE_TOKENS, learn_compensation
    from var_moe.calibration.fit_compensation import FitSettings
    from var_moe.calibration.fitted_files import FOLDER
    from var_moe.calibration.profile import RoutingProfile
    from var_moe.cli.progress import StageProgress
    from var_moe.models.loading import load_model
    from var_moe.optimization.preparation import tokenised

    known = RoutingProfile.load(profile)
    place = output or profile / FOLDER
    check_output_folder(place)
    given: dict[str, Any] = {
        "rank": rank,
        "regress_tokens": regress_tokens,
        "tokens": tokens,
        "rate": rate,
    }
    settings = FitSettings(seed=seed, **{k: v for k, v in given.items() if v is not None})
    checkpoint = place.parent / f".{place.name}.checkpoint.pt"
    texts = load_text(dataset, split)
    with StageProgress() as progress:
        loaded = load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        known.check_loaded(loaded)
        text = tokenised(texts, loaded)
        fitted = learn_compensation(
            loaded,
            known,
            text.documents,
            data={"dataset": dataset, "data_hash": text.data_hash},
            settings=settings,
            damage_tokens=DAMAGE_TOKENS if damage_tokens is None else damage_tokens,
            checkpoint=checkpoint,
            progress=None if quiet else progress,
        )
    fitted.save(place)
    checkpoint.unlink(missing_ok=True)
    fit, held = fitted.head["fit"], fitted.head["fit"]["held_out_divergence_nats"]
    print(
        f"Compensation of rank {fit['rank']} after {fit['fitted_tokens']:,} tokens "
        f"({fit['stopped']}).\n"
        "KL from the unmodified model on held-out calibration text, nats per token: "
        f"rescaled cuts {held['nothing']:.4f}, start {held['start']:.4f}, layer by layer "
        f"{held['regressed']:.4f}, distilled {held['fitted']:.4f}"
    )
    print(f"Saved: {place}")
    return Answer(fitted.head)
