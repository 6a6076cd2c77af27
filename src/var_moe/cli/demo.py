"""``var-moe demo``: a tour of two minutes on the bundled model, from profile to report."""

from __future__ import annotations

import json
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from var_moe.cli.options import QuietOptions
from var_moe.cli.output import Answer, StageProgress, make_report

if TYPE_CHECKING:
    from var_moe.calibration.profile import RoutingProfile
    from var_moe.models.loading import LoadedModel
    from var_moe.optimization.measure_again import TuneOutcome

CALIBRATION_TOKENS, DAMAGE_TOKENS = 30_000, 15_000
SEARCH_DOCUMENTS, FINAL_DOCUMENTS = 30, 60
BOUND = 0.02  # wide, as little text gives wide intervals
SEED = 1


def demo(*, output: Path = Path("results/demo"), run: QuietOptions = QuietOptions()) -> Answer:
    """Tour in about two minutes: profile, search, measure again, export, on the bundled model.

    The texts are small ones, so that it is short: `var-moe tune` does the same at full size.

    Args:
        output: folder for what the tour writes.
    """
    from var_moe.models.loading import load_model
    from var_moe.optimization.results import RESULTS_FILE
    from var_moe.storage import check_output_folder, read_json
    from var_moe.terminal import show

    check_output_folder(output)
    _say(
        "1/4  The model",
        "A small Mixtral-style language model comes with var_moe. In each of its layers a router "
        "picks 2 of 8 experts for every token. Where the second one adds little, it need not run.",
    )
    with run.progress() as progress:
        loaded = load_model("demo")
        profile = _profile(loaded, output, progress)
        outcome = _search(loaded, output, progress, quiet=run.quiet)
    show(
        *outcome.parts,
        "Speedups are of this machine, for scoring 4 x 128 tokens. The profile has "
        f"{profile.head['tokens']:,} tokens; `var-moe tune` takes 400,000 and more text "
        "throughout.",
    )
    _end(output)
    return Answer(read_json(output / RESULTS_FILE, what="results of a search"))


def _profile(loaded: LoadedModel, output: Path, progress: StageProgress) -> RoutingProfile:
    from var_moe.calibration.calibrate import with_damages
    from var_moe.calibration.collect import collect_profile
    from var_moe.optimization.preparation import DAMAGE_FOLDER, PROFILE_FOLDER, read_text

    _say(
        "2/4  The profile",
        f"The model reads {CALIBRATION_TOKENS:,} tokens of calibration text. Kept are the router's "
        "habits, what dropped experts would have added on average, and how much a cut is expected "
        "to raise the loss (one backward pass).",
    )
    text = read_text("demo", "calibration", loaded)
    data: dict[str, Any] = {"dataset": "demo", "data_hash": text.data_hash}
    profile = collect_profile(
        loaded,
        text.documents,
        **data,
        max_tokens=CALIBRATION_TOKENS,
        seed=SEED,
        progress=partial(progress, "profiling the routing"),
    )
    place = output / PROFILE_FOLDER
    profile = with_damages(
        loaded,
        profile,
        text.documents,
        data=data,
        tokens=DAMAGE_TOKENS,
        folder=place / DAMAGE_FOLDER,
        progress=progress,
    )
    profile.save(place)
    return profile


def _search(
    loaded: LoadedModel, output: Path, progress: StageProgress, *, quiet: bool
) -> TuneOutcome:
    from var_moe.evaluation.evaluator import SpeedSetting
    from var_moe.optimization.preparation import PROFILE_FOLDER
    from var_moe.optimization.run import tune
    from var_moe.optimization.settings import TuneSettings

    _say(
        "3/4  The search",
        f"The router's decisions on {SEARCH_DOCUMENTS} other documents are recorded once and "
        "replayed for hundreds of thresholds. The model itself runs for the most promising ones, "
        f"and the best are measured again on {FINAL_DOCUMENTS} documents that chose nothing. "
        f"Perplexity may rise by {100 * BOUND:g}% at the most, counted by the upper end of the "
        "interval.",
    )
    settings = TuneSettings(
        profile=output / PROFILE_FOLDER,
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
    return tune(
        loaded,
        settings,
        progress=progress,
        say=progress.say,
        verbose=not quiet,
    )


def _end(output: Path) -> None:
    from var_moe.certification.exporting import export

    _say(
        "4/4  To take along",
        "The winner, with the parts of the profile that it needs, becomes one folder. It is not "
        "certified: a certificate needs text that nothing was chosen on (`var-moe certify`).",
    )
    export(output, output / "export")
    make_report(output)  # which names it
    print("Written:")
    for path in sorted(output.iterdir()):
        print(f"  {path}{'/' if path.is_dir() else ''}")
    print("Next:")
    presets = shlex.join(["var-moe", "evaluate", "--profile", str(output / "profile")])
    for command, what in (
        ("var-moe tune", "the same at full size, within 1%, in some ten minutes"),
        ("var-moe certify results/phase3", "then: a statement with a known error rate"),
        (presets, "VAR's presets beside the baseline"),
    ):
        print(f"  {command:42}  {what}")
    print(f"  In Python: with routed(loaded, {json.dumps(str(output / 'export'))}): ...")


def _say(title: str, text: str) -> None:
    from rich.text import Text

    from var_moe.terminal import show

    show("", Text(title, style="bold"), Text(text))
