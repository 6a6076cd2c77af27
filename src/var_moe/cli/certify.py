"""``var-moe certify``: a statement about a configuration with a known error rate."""

from __future__ import annotations

from pathlib import Path

from var_moe.cli.options import (
    RunOptions,
    Searched,
    SearchedModelOptions,
    SearchedTextOptions,
    SpeedOptions,
    settings_of,
)
from var_moe.cli.output import CommandResult, finish, make_report

_TEST = (
    "  {name}: {degradation:+.2%} [{degradation_interval[0]:.2%}, {degradation_interval[1]:.2%}], "
    "p = {p:.3g}, {experts_per_token:.3f} experts per token,"
)


def certify(
    results: Path,
    *,
    model: SearchedModelOptions = SearchedModelOptions(),
    text: SearchedTextOptions = SearchedTextOptions(),
    speed: SpeedOptions = SpeedOptions(),
    max_degradation: float | None = None,
    alpha: float | None = None,
    robust: bool = False,
    candidates: int | None = None,
    max_learned_pct: float | None = None,
    blocks: int | None = None,
    output: Path | None = None,
    profile: Path | None = None,
    compensation: Path | None = None,
    max_samples: int | None = None,
    run: RunOptions = RunOptions(),
) -> CommandResult:
    """Certify the fastest configuration of a results folder that keeps a perplexity bound.

    Args:
        results: results folder of `var-moe tune`.
        max_degradation: bound on the relative perplexity change; by default the search's.
        alpha: probability that any of the claims is wrong; 0.05 by default.
        robust: claim it of each of several data sets instead.
        candidates: how many configurations of the front are tested at the most, up to 10 (default).
        max_learned_pct: also claim that the router alone decides a smaller share than this.
        blocks: timed blocks per arm, 20 by default; 0 claims no speedup.
        output: folder for certificate.json and certificate.html; by default the results folder.
        profile: profile folder, where none lies in the results folder.
        compensation: folder of a learned compensation, where it is not the profile's own.
        max_samples: documents of the certify part; by default all.
    """
    options = dict(locals())
    searched = Searched.of(results)
    name, dataset = model.model or searched.model, text.named(searched.dataset)
    if max_degradation is None:
        options["max_degradation"] = searched.max_degradation
    options["setting"] = speed.setting(searched.setting)
    place = output or results
    run.begin(name, dataset, output=place)
    from var_moe.certification.certify import CERTIFICATE_FILE, PAGE_FILE, NotCertifiedError
    from var_moe.certification.certify import certify as run_certify
    from var_moe.certification.plan import CertifySettings, Ledger, find_candidates
    from var_moe.data.text import check_robust
    from var_moe.optimization.results import CONFIG_FILE
    from var_moe.optimization.validation import find_profile

    settings = settings_of(CertifySettings, {**options, "seed": run.seed})
    check_robust(robust, dataset)
    # What is wrong in the folder is said before the model is loaded.
    bound, at_most = settings.max_degradation, settings.candidates
    find_candidates(results, max_degradation=bound, at_most=at_most)
    find_profile(results / CONFIG_FILE, profile)
    Ledger(results).entries()
    with run.progress() as progress:
        try:
            certificate = run_certify(
                model.load(name),
                results,
                dataset=dataset,
                settings=settings,
                output=output,
                profile_path=profile,
                compensation=compensation,
                progress=progress,
                say=progress.say,
            )
        except NotCertifiedError:
            make_report(place)  # which shows the nearest miss
            raise
    print(certificate["sentence"])
    for row in certificate["tests"]:
        print(_TEST.format_map(row), "passed" if row["passed"] else "failed")
    return finish(certificate, place / CERTIFICATE_FILE, place / PAGE_FILE, report=place)
