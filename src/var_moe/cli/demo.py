"""``var-moe demo``: a tour of two minutes on the bundled model, from profile to report."""

from __future__ import annotations

import shlex
from pathlib import Path

from var_moe.cli.export import export
from var_moe.cli.options import QuietOptions, RunOptions
from var_moe.cli.output import CommandResult, make_report
from var_moe.cli.profile import profile

CALIBRATION_TOKENS, DAMAGE_TOKENS = 30_000, 15_000
SEARCH_DOCUMENTS, FINAL_DOCUMENTS = 30, 60
BOUND = 0.02  # wide, as little text gives wide intervals
SEED = 1


def demo(
    *, output: Path = Path("results/demo"), run: QuietOptions = QuietOptions()
) -> CommandResult:
    """Tour in about two minutes: profile, search, measure again, export, on the bundled model.

    The texts are small ones, so that it is short: `var-moe tune` does the same at full size.

    Args:
        output: folder for what the tour writes.
    """
    from var_moe.storage import check_output_folder, read_json
    from var_moe.terminal import show

    check_output_folder(output)
    _say(
        "1/4  The model",
        "A small Mixtral-style language model comes with var_moe. In each of its layers a router "
        "picks 2 of 8 experts for every token. Where the second one adds little, it need not run.",
    )
    _say(
        "2/4  The profile",
        f"The model reads {CALIBRATION_TOKENS:,} tokens of calibration text. Kept are the router's "
        "habits, what dropped experts would have added on average, and how much a cut is expected "
        "to raise the loss (one backward pass).",
    )
    profile(
        output=output / "profile",
        max_tokens=CALIBRATION_TOKENS,
        damage_tokens=DAMAGE_TOKENS,
        run=RunOptions(seed=SEED, quiet=run.quiet),
    )
    _say(
        "3/4  The search",
        f"The router's decisions on {SEARCH_DOCUMENTS} other documents are recorded once and "
        "replayed for hundreds of thresholds. The model itself runs for the most promising ones, "
        f"and the best are measured again on {FINAL_DOCUMENTS} documents that chose nothing. "
        f"Perplexity may rise by {100 * BOUND:g}% at the most, counted by the upper end of the "
        "interval.",
    )
    from var_moe.evaluation.speed_setting import SpeedSetting
    from var_moe.models.loading import load_model
    from var_moe.optimization.results import RESULTS_FILE
    from var_moe.optimization.run import tune
    from var_moe.optimization.settings import TuneSettings

    settings = TuneSettings(
        profile=output / "profile",
        output=output,
        seed=SEED,
        n_calls=3,
        candidates=2,
        max_degradation=BOUND,
        max_samples=SEARCH_DOCUMENTS,
        final_samples=FINAL_DOCUMENTS,
        final_blocks=4,
        setting=SpeedSetting(batch_size=4, sequence=128),
    )
    with run.progress() as progress:
        loaded = load_model("demo")
        outcome = tune(loaded, settings, progress=progress, say=progress.say, verbose=not run.quiet)
    show(*outcome.parts, "Speedups are of this machine, for scoring 4 x 128 tokens.")
    _say(
        "4/4  To take along",
        "The winner, with the parts of the profile that it needs, becomes one folder. It is not "
        "certified: a certificate needs text that nothing was chosen on (`var-moe certify`).",
    )
    export(output)
    make_report(output)  # which names it
    presets = shlex.join(["var-moe", "evaluate", "--profile", str(output / "profile")])
    for command, what in (
        ("var-moe tune", "the same at full size, within 1%, in some ten minutes"),
        ("var-moe certify results/phase3", "then: a statement with a known error rate"),
        (presets, "VAR's presets beside the baseline"),
    ):
        print(f"  {command:42}  {what}")
    return CommandResult(read_json(output / RESULTS_FILE, what="results of a search"))


def _say(title: str, text: str) -> None:
    from rich.text import Text

    from var_moe.terminal import show

    show("", Text(title, style="bold"), Text(text))
