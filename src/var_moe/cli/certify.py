"""``var-moe certify``: a statement about a configuration with a known error rate."""

from __future__ import annotations

import sys
from pathlib import Path

from var_moe.cli.output import Answer


def certify(
    results: Path,
    *,
    model: str | None = None,
    dataset: str | None = None,
    max_degradation: float | None = None,
    alpha: float = 0.05,
    sequential: bool = False,
    reuse: bool = False,
    unordered: bool = False,
    robust: bool = False,
    candidates: int = 10,
    max_learned_pct: float | None = None,
    blocks: int = 20,
    output: Path | None = None,
    profile: Path | None = None,
    compensation: Path | None = None,
    split: str = "certify",
    ordering_samples: int = 300,
    max_samples: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> Answer:
    """Certify the fastest configuration of a results folder that keeps a perplexity bound.

    Args:
        results: results folder of `var-moe tune`.
        model: demo, a local folder, or a Hub id; by default the search's.
        dataset: text with the parts validation and certify; by default the search's. The claim
            is about the union of several (a,b,c), and each is described apart.
        max_degradation: bound on the relative perplexity change; by default the search's.
        alpha: probability that any of the claims is wrong.
        sequential: let documents stream in until the claim is proven or refuted.
        reuse: allow text that was certified on before; marked as not confirmatory.
        unordered: do not order the candidates first, test all of them by Holm.
        robust: claim it of each of several data sets instead.
        candidates: how many configurations of the front are tested at the most, up to 10.
        max_learned_pct: also claim that the router alone decides a smaller share than this.
        blocks: timed blocks per arm; 0 claims no speedup.
        output: folder for certificate.json and certificate.html; by default the results folder.
        profile: profile folder, where none lies in the results folder.
        compensation: folder of a learned compensation, where it is not the profile's own.
        split: part of the text that certifies: certify, or test.
        ordering_samples: documents of the ordering half that are scored.
        max_samples: documents of the certify part; by default all.
        seed: of the documents' order.
        device: auto, cpu, cuda, ...
        dtype: auto, float32, bfloat16, float16.
        trust_remote_code: run a Hub model's own code.
        quiet: no progress.
    """
    from var_moe.cli.validate import search_of
    from var_moe.data.text import check_dataset
    from var_moe.errors import UsageError
    from var_moe.models.loading import check_name
    from var_moe.optimization.results import CONFIG_FILE
    from var_moe.storage import check_output_folder

    if not results.is_dir():
        raise UsageError(f"{results}: no such folder; expected the results of `var-moe tune`")
    searched = search_of(results / CONFIG_FILE)
    model = model or searched.model
    dataset = dataset or searched.dataset
    if max_degradation is None:
        max_degradation = searched.max_degradation
    check_output_folder(output or results)
    check_name(model)
    check_dataset(dataset)
    if not quiet:
        print(f"loading model {model} ...", file=sys.stderr, flush=True)
    from var_moe.certification.certify import (
        CERTIFICATE_FILE,
        PAGE_FILE,
        NotCertifiedError,
    )
    from var_moe.certification.certify import certify as run_certify
    from var_moe.certification.plan import CertifySettings, Ledger, find_candidates
    from var_moe.cli.progress import StageProgress
    from var_moe.cli.report import make_report
    from var_moe.cli.tables import print_described
    from var_moe.data.text import check_robust
    from var_moe.models.loading import load_model
    from var_moe.optimization.validation import find_profile

    settings = CertifySettings(
        max_degradation=max_degradation,
        alpha=alpha,
        sequential=sequential,
        ordered=not unordered,
        robust=robust,
        candidates=candidates,
        max_learned_pct=max_learned_pct,
        blocks=blocks,
        ordering_samples=ordering_samples,
        max_samples=max_samples,
        split=split,
        seed=seed,
    )
    check_robust(robust, dataset)
    # What is wrong in the folder is said before the model is loaded.
    find_candidates(results, max_degradation=max_degradation, at_most=candidates, top_k=2)
    find_profile(results / CONFIG_FILE, profile)
    Ledger(results).entries()
    with StageProgress() as progress:
        loaded = load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        place = output or results
        try:
            found = run_certify(
                loaded,
                results,
                dataset=dataset,
                settings=settings,
                reuse=reuse,
                output=output,
                profile_path=profile,
                compensation=compensation,
                progress=None if quiet else progress,
                say=(lambda _line: None) if quiet else progress.say,
            )
        except NotCertifiedError:
            make_report(place)  # which shows the nearest miss
            raise
    print(found["sentence"])
    for row in found["tests"]:
        low, high = row["degradation_interval"]
        print(
            f"  {row['name']}: {100 * row['degradation']:+.2f}% "
            f"[{100 * low:.2f}, {100 * high:.2f}], p = {row['p']:.3g}, "
            f"{row['experts_per_token']:.3f} experts per token, "
            f"{'passed' if row['passed'] else 'failed'}"
        )
    print_described(found["by_dataset"])
    print(f"Saved: {place / CERTIFICATE_FILE}, {place / PAGE_FILE}")
    make_report(place)
    return Answer(found)
