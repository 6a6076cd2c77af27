"""``var-moe trace``: the router's decisions on a text, recorded once for any replay."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from var_moe.cli.options import ModelOptions, RunOptions, TextOptions
from var_moe.cli.output import CommandResult, StageProgress, table
from var_moe.config import check_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from var_moe.calibration.profile import RoutingProfile
    from var_moe.data.documents import EncodedDocument
    from var_moe.models.loading import LoadedModel
    from var_moe.tracing.trace import RoutingTrace


def trace(
    *,
    model: ModelOptions = ModelOptions(),
    text: TextOptions = TextOptions(),
    profile: Path | None = None,
    output: Path = Path("results/trace"),
    max_tokens: int | None = None,
    max_samples: int | None = None,
    decisions_only: bool = False,
    timings: bool = False,
    tokens_per_batch: int = 4096,
    run: RunOptions = RunOptions(),
) -> CommandResult:
    """Record every decision of the router on a text, for `var-moe replay`.

    Args:
        profile: profile folder; by default the calibration split is profiled first, into
            the folder `profile` of the output.
        output: folder for the trace; an interrupted one goes on there.
        max_tokens: record so many tokens; the last document is cut.
        max_samples: record at most so many documents.
        decisions_only: without the backward pass: quicker, and less memory, but a replay can't
            predict a degradation then.
        timings: also time a few forwards and fit the cost model, so that a replay predicts
            speedups; kept as cost_model.json beside the trace.
        tokens_per_batch: padded tokens per forward; fewer need less memory.
    """
    check_count("max_tokens", max_tokens)
    check_count("max_samples", max_samples)
    check_count("tokens_per_batch", tokens_per_batch)
    dataset = text.named()
    run.begin(model.model, dataset, output=output)
    from var_moe.calibration.profile import RoutingProfile
    from var_moe.data.text import load_text
    from var_moe.optimization.preparation import obtain_profile, sample_documents, tokenised
    from var_moe.tracing.record import record_trace

    texts = load_text(dataset, text.split)
    if profile is not None:
        RoutingProfile.load(profile)  # a damaged one is refused before the model is loaded
    calibration = load_text(dataset, "calibration") if profile is None else None
    with run.progress() as progress:
        loaded = model.load()
        encoded = tokenised(texts, loaded)
        documents = sample_documents(encoded.documents, max_samples, run.seed)
        means, place = obtain_profile(
            loaded,
            dataset,
            given=profile,
            folder=output,
            damages=not decisions_only,
            calibration=calibration,
            progress=progress,
        )
        progress.say(f"recording in {output} ...")
        recorded = record_trace(
            loaded,
            documents,
            dataset=dataset,
            data_hash=encoded.data_hash,
            folder=output,
            profile=means,
            damage=not decisions_only,
            max_tokens=max_tokens,
            tokens_per_batch=tokens_per_batch,
            seed=run.seed,
            progress=partial(progress, "tracing the router"),
        )
        if timings:
            _fit_cost(loaded, documents, means, output, progress)
    _print(recorded, output, place)
    return CommandResult(recorded.head)


def _fit_cost(
    loaded: LoadedModel,
    documents: Sequence[EncodedDocument],
    profile: RoutingProfile,
    output: Path,
    progress: StageProgress,
) -> None:
    """The cost model of this machine and model, VAR's own work included."""
    from var_moe.evaluation.cost import fit_cost_model
    from var_moe.evaluation.evaluator import Evaluator
    from var_moe.optimization.candidate import preset
    from var_moe.optimization.replay_run import COST_FILE
    from var_moe.storage import atomic_write_json

    progress.say("timing forwards for the cost model ...")
    evaluator = Evaluator(loaded, documents)
    most, least = preset("balanced").cost_policies(profile, loaded.top_k) or (None, None)
    cost = fit_cost_model(evaluator, var_all=most, var_leading=least)
    atomic_write_json(output / COST_FILE, cost.to_dict())
    progress.say(f"cost model: median error {100 * cost.error:.1f}% on timings left out")


def _print(trace: RoutingTrace, output: Path, profile: Path | None) -> None:
    import math

    from var_moe.terminal import show

    head, perplexity = trace.head, ""
    size = sum(path.stat().st_size for path in output.glob("trace*"))
    if trace.nll is not None:
        nll = float(trace.nll.double().sum()) / max(trace.scored, 1)
        perplexity = f", perplexity {math.exp(nll):.3f}"
    entropy = trace.entropy.float().mean(dim=1).tolist()
    mass = trace.weight[:, :, 0].float().mean(dim=1).tolist()
    rows = [
        {"layer": layer, "entropy": nats, "mass": share}
        for layer, (nats, share) in enumerate(zip(entropy, mass, strict=True))
    ]
    columns = {
        "layer": "{layer}",
        "entropy (nats)": "{entropy:.3f}",
        "first expert's mass": "{mass:.3f}",
    }
    show(
        # A line of its own: as a title it would be broken to the small table's width.
        f"{head['model']} on {head['dataset']}: {trace.tokens:,} tokens of "
        f"{len(trace.documents):,} documents, {size / 2**20:,.1f} MiB{perplexity}",
        table("", columns, rows),
        f"Trace: {output}",
        f"Profile: {profile}",
    )
