"""``var-moe analyze``: where a forward's time goes, with and without VAR, and what bounds it."""

from __future__ import annotations

from pathlib import Path

from var_moe.cli.compensation import parse_compensation
from var_moe.cli.output import Answer
from var_moe.config import check_count
from var_moe.errors import UsageError

QUICK_SAMPLES = 20


def analyze(
    *,
    model: str = "demo",
    dataset: str = "demo",
    split: str = "validation",
    var_config: Path | None = None,
    n_samples: int = 100,
    quick: bool = False,
    profile: Path | None = None,
    compensation: str | None = None,
    output: Path = Path("results/phase5"),
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> Answer:
    """Systems analysis: components, scaling, roofline, bottlenecks, predicted speedup.

    Args:
        model: demo, a local folder, or a Hub id.
        dataset: demo (or demo-postgres, ...), wikitext, a Hub name[:config], or a local file.
        split: part of the text that is timed.
        var_config: a VAR configuration, or the best_config.json or certified_config.json of a
            search; by default the balanced preset.
        n_samples: documents of the text that is timed.
        quick: fewer documents and blocks; enough to see the picture.
        profile: profile folder; by default the one beside --var_config, else the calibration split
            is profiled first, where something is needed of a profile.
        compensation: folder of a learned compensation, where it is not the profile's own.
        output: folder for systems_analysis.json and profile_report.json; parts of it are written
            as soon as they are known.
        seed: draws the documents.
        device: auto, cpu, cuda, ...
        dtype: auto, float32, bfloat16, float16.
        threads: of torch on the CPU; by default its own choice.
        trust_remote_code: run a Hub model's own code.
        quiet: no progress.
    """
    from var_moe.cli.subject import Subject
    from var_moe.optimization.candidate import load_candidate, preset

    candidate = load_candidate(var_config) if var_config else preset("balanced")
    name, place = parse_compensation(compensation)
    if name is not None and place is None:
        raise UsageError(f"--compensation {name}: the configuration names it; expected a folder")
    check_count("threads", threads)
    subject = Subject(
        model=model,
        dataset=dataset,
        split=split,
        profile=profile,
        config=var_config,
        output=output,
        compensation=place,
        max_samples=min(n_samples, QUICK_SAMPLES) if quick else n_samples,
        seed=seed,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    subject.check(blocks=1, quiet=quiet)
    import torch

    from var_moe.analysis.systems import SYSTEMS_FILE, AnalysisSettings, analyse
    from var_moe.cli.analysis_tables import print_analysis
    from var_moe.cli.progress import StageProgress
    from var_moe.cli.report import make_report
    from var_moe.growing import GrowingResult

    if threads is not None:
        torch.set_num_threads(threads)
    with StageProgress() as progress, GrowingResult(output / SYSTEMS_FILE) as kept:
        shown = None if quiet else progress
        ready = subject.ready(shown, needs=candidate.needs, stand_ins=[candidate.compensation])
        found = analyse(
            ready.evaluator,
            ready.profile,
            candidate,
            AnalysisSettings.quick() if quick else AnalysisSettings(),
            kept=kept,
            progress=shown,
        )
        found.save(output)
    print_analysis(found.systems, found.components, folder=output)
    make_report(output)
    return Answer(found.systems)
