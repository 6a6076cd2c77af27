"""``var-moe fit-compensation``: teach a small map to stand in for experts that do not run."""

from __future__ import annotations

from pathlib import Path

from var_moe.cli.options import CalibrationTextOptions, ModelOptions, RunOptions, settings_of
from var_moe.cli.output import CommandResult, finish
from var_moe.config import check_count
from var_moe.errors import UsageError


def fit_compensation(
    *,
    profile: Path,
    model: ModelOptions = ModelOptions(),
    text: CalibrationTextOptions = CalibrationTextOptions(),
    output: Path | None = None,
    regress_tokens: int | None = None,
    tokens: int | None = None,
    rank: int | None = None,
    rate: float | None = None,
    damage_tokens: int | None = None,
    run: RunOptions = RunOptions(),
) -> CommandResult:
    """Distil the unmodified model into what damage-aware skipping leaves of it.

    The model's weights stay as they are. What is fitted lies with the profile, and every later
    command with that profile uses it. A part of the text is held out and ends the fit.

    Args:
        profile: profile folder of the same model.
        output: folder; by default compensation/ in the profile's folder. An interrupted fit goes
            on there.
        regress_tokens: calibration tokens of the layer-wise part; 0 leaves it out.
        tokens: calibration tokens of the distillation, over as many passes as that takes.
        rank: of the map; by default the largest that costs less than 3% of what it saves.
        rate: highest learning rate of the distillation.
        damage_tokens: of the passes that predict what a cut costs, before and after.
    """
    options = dict(locals())
    check_count("damage_tokens", damage_tokens)
    if not profile.is_dir():
        raise UsageError(f"{profile}: no such profile folder; make one with `var-moe profile`")
    dataset = text.named()
    run.begin(model.model, dataset, output=output)
    from var_moe.calibration.calibrate import DAMAGE_TOKENS, learn_compensation
    from var_moe.calibration.fit_compensation import FitSettings
    from var_moe.calibration.fitted_files import FOLDER
    from var_moe.calibration.profile import RoutingProfile
    from var_moe.data.text import load_text
    from var_moe.optimization.preparation import tokenised
    from var_moe.storage import check_output_folder

    known = RoutingProfile.load(profile)
    place = check_output_folder(output or profile / FOLDER)
    settings = settings_of(FitSettings, {**options, "seed": run.seed})
    checkpoint = place.parent / f".{place.name}.checkpoint.pt"
    texts = load_text(dataset, text.split)
    with run.progress() as progress:
        loaded = model.load()
        known.check_loaded(loaded)
        encoded = tokenised(texts, loaded)
        fitted = learn_compensation(
            loaded,
            known,
            encoded.documents,
            data={"dataset": dataset, "data_hash": encoded.data_hash},
            settings=settings,
            damage_tokens=DAMAGE_TOKENS if damage_tokens is None else damage_tokens,
            checkpoint=checkpoint,
            progress=progress,
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
    finish({}, place)
    return CommandResult(fitted.head)
