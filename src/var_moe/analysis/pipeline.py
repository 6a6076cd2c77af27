"""The systems analysis: one configuration beside the unmodified model, measured and explained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from var_moe.analysis.bottlenecks import find_bottlenecks
from var_moe.analysis.components import profile_components
from var_moe.analysis.profiler import PeakMemory
from var_moe.analysis.roofline import roofline
from var_moe.config import VARConfig, check_number
from var_moe.data.documents import require_documents
from var_moe.data.encoding import as_documents, check_documents
from var_moe.evaluation.cost import fit_cost_model
from var_moe.evaluation.evaluator import Evaluator, Progress, Speed
from var_moe.evaluation.speed_setting import SpeedSetting
from var_moe.evaluation.throughput import backend_arm
from var_moe.execution.session import routed
from var_moe.growing import GrowingResult
from var_moe.models.loading import LoadedModel
from var_moe.optimization.candidate import Candidate
from var_moe.routing.counts import RoutingReport
from var_moe.routing.keeping import leading_count
from var_moe.storage import (
    SCHEMA_VERSION,
    atomic_write_json,
    check_output_folder,
    jsonable,
    provenance,
)

if TYPE_CHECKING:
    from var_moe.calibration.profile import RoutingProfile
    from var_moe.routing.base import RoutingPolicy

log = logging.getLogger(__name__)

SYSTEMS_FILE, PROFILE_FILE = "systems_analysis.json", "profile_report.json"
FEW_TOKENS = 1024
"""Below this many tokens a forward takes a moment: more of them in a block, for the same noise."""


@dataclass(frozen=True, kw_only=True)
class AnalysisSettings:
    """How much is measured.

    Args:
        blocks: timed blocks per arm of the speedup.
        rounds: passes whose parts are timed.
        scaling_blocks: timed blocks per arm, sequence length and batch size.
        cost_blocks: timed blocks per arm and size of the cost model's fit.
        sequences, batch_sizes: settings of the scaling.

    Raises:
        UsageError: a count is below 1.
    """

    blocks: int = 10
    rounds: int = 8
    scaling_blocks: int = 5
    cost_blocks: int = 6
    sequences: Sequence[int] = (64, 128, 256, 512)
    batch_sizes: Sequence[int] = (1, 2, 4, 8)

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            for one in np.atleast_1d(value).tolist():
                check_number(f"AnalysisSettings.{name}", one, integer=True, low=1)

    @classmethod
    def quick(cls) -> AnalysisSettings:
        """Enough to see the picture, not to publish it."""
        return cls(blocks=3, rounds=2, scaling_blocks=2, cost_blocks=2)


def analyse(
    evaluator: Evaluator,
    profile: RoutingProfile | None,
    candidate: Candidate,
    settings: AnalysisSettings,
    *,
    kept: GrowingResult | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure where time goes, how it scales, what bounds it; compare with the cost model.

    Args:
        evaluator: model, text and the batch that speed is measured on.
        profile: of the same model; None where the candidate needs nothing of one.
        candidate: what is compared with the unmodified model.
        settings: how much is measured.
        kept: of ``systems_analysis.json``: parts are saved as soon as they are known, and
            ``profile_report.json`` beside it.
        progress: called with a stage's name, steps done and in all.

    Returns:
        What ``systems_analysis.json`` holds, and under ``profile`` the other file.
    """
    report = progress or (lambda _stage, _done, _total: None)
    # Cost policies are those of the candidate, not of whatever was measured here before.
    cost_policies = candidate.cost_policies(profile, evaluator.top_k)
    evaluator = replace(evaluator, cost_policies=cost_policies, progress=progress)
    policy, loaded = candidate.make(profile), evaluator.loaded
    model, batches = evaluator.model, evaluator.timing_batches(1)
    origin = {
        "schema_version": SCHEMA_VERSION,
        "documents": len(evaluator.documents),
        "setting": evaluator.setting.to_dict(),
        "model": {"name": loaded.name, "revision": loaded.revision, "dtype": loaded.dtype},
        "provenance": provenance(),
    }
    speed = evaluator.speed(policy, blocks=settings.blocks)
    measured = speed.to_dict()
    compared: dict[str, Any] = {
        "actual_speedup": measured["speedup"],
        "actual_speedup_95": measured["speedup_95"],
        **{name: measured[name] for name in ("backend_factor", "skipping_factor")},
    }
    systems: dict[str, Any] = {
        **origin,
        "comparison": compared,
        "notes": evaluator.timing_notes(),
        "profile_hash": None if profile is None else profile.hash,
    }

    def known(missing: str | None, **further: Any) -> None:
        systems.update(further)
        if kept is not None:
            kept.save(jsonable(systems), missing=missing)

    known("parts of a forward, scaling, roofline, cost model")
    arms: dict[str, tuple[RoutingPolicy | None, Any]] = {
        "baseline": (None, evaluator.baseline_backend),
        "var": (policy, evaluator.running_backend),
    }
    parts: dict[str, Any] = {}
    for name, (chosen, backend) in arms.items():
        report("parts of a forward", len(parts), len(arms))
        parts[name] = profile_components(
            model, batches, policy=chosen, backend=backend, rounds=settings.rounds
        )
    report("parts of a forward", len(arms), len(arms))
    what = "milliseconds per forward; marks and hooks add a few percent of their own"
    components: dict[str, Any] = jsonable({**origin, "what": what, **parts})
    if kept is not None:
        atomic_write_json(kept.path.with_name(PROFILE_FILE), components)
    sides, counted = _both_sides(evaluator, policy, speed)
    sides["var"] |= {"config": candidate.to_dict(), "kind": candidate.kind}
    known("scaling, roofline, cost model", **sides)
    scaling = measure_scaling(evaluator, policy, settings, progress=progress)
    known("roofline, cost model", scaling=scaling)
    report("fitting the cost model", 0, 1)
    var_all, var_leading = cost_policies or (None, None)
    cost = fit_cost_model(
        evaluator, var_all=var_all, var_leading=var_leading, blocks=settings.cost_blocks
    )
    report("fitting the cost model", 1, 1)
    predicted = cost.speedup(counted, residual=policy.adds_residual)
    leading = np.full(cost.layers, leading_count(cost.top_k))
    largest = cost.speedups(leading, tokens=1, residual=policy.adds_residual)
    compared |= {
        "predicted_speedup": predicted,
        "prediction_error_pct": 100 * abs(predicted / speed.speedup.median - 1),
        "largest_speedup": float(largest),
        "cost_model": cost.to_dict(),
    }
    known("roofline")
    bottlenecks = find_bottlenecks(
        systems,
        policy_share=parts["var"]["components"]["policy"]["share"],
        experts_share=parts["baseline"]["components"]["experts"]["share"],
        always_asked=policy.drops_only,
        uses_cache=candidate.settings.get("cache_size", 0) > 0,
    )
    known(None, roofline=roofline(model, batches[0], policy, systems), bottlenecks=bottlenecks)
    return {**jsonable(systems), "profile": components}


def _both_sides(
    evaluator: Evaluator, policy: RoutingPolicy, speed: Speed
) -> tuple[dict[str, dict[str, Any]], RoutingReport]:
    """Time and memory of the unmodified model and of a policy, and what the policy decided."""
    model, batches = evaluator.model, evaluator.timing_batches(1)

    def side(tps: float, backend: str) -> dict[str, Any]:
        memory = PeakMemory(model.device)
        with torch.inference_mode():
            for ids in batches:
                model(input_ids=ids.to(model.device), use_cache=False)
        milliseconds = 1000 * batches[0].numel() / tps
        row = {"avg_time_ms": milliseconds, "throughput_tps": tps, "memory": memory.to_dict()}
        return {**row, "backend": backend}

    with backend_arm(model, evaluator.baseline_backend)():
        baseline = side(speed.baseline_tps, speed.baseline_backend)
    with routed(model, policy, backend=evaluator.running_backend) as session:
        session.reset()
        var = side(speed.tps, speed.backend)
        counted = session.report()
    baseline["experts_per_token"] = float(evaluator.top_k)
    return {"baseline": baseline, "var": {**var, "var_stats": counted.to_dict()}}, counted


def measure_scaling(
    evaluator: Evaluator,
    policy: RoutingPolicy,
    settings: AnalysisSettings,
    *,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Time the unmodified model and a policy, interleaved, by sequence length and batch size.

    Sequence lengths are taken at the evaluator's batch size, batch sizes at its sequence length.
    The baseline is the fastest backend of each setting.

    Returns:
        A row per setting: ``varied`` (sequence or batch_size), batch_size, sequence, both
        throughputs, the backend, speedup and its interval; a length beyond the model's window
        is left out.
    """
    report = progress or (lambda _stage, _done, _total: None)
    usual, window = evaluator.setting, evaluator.loaded.window
    shapes = [
        *(("sequence", usual.batch_size, s) for s in settings.sequences if s <= window),
        *(("batch_size", b, min(usual.sequence, window)) for b in settings.batch_sizes),
    ]
    evaluator = replace(evaluator, backend=evaluator.running_backend, progress=None)

    @cache  # the usual shape is of both kinds
    def timed(batch_size: int, sequence: int) -> dict[str, Any]:
        forwards = max(1, min(8, FEW_TOKENS // (batch_size * sequence)))
        shape = SpeedSetting(batch_size=batch_size, sequence=sequence, forwards=forwards)
        speed = replace(evaluator, setting=shape).speed(
            policy, blocks=settings.scaling_blocks, factors=False
        )
        return {
            "batch_size": batch_size,
            "sequence": sequence,
            "baseline_backend": speed.baseline_backend,
            "baseline_throughput_tps": speed.baseline_tps,
            "var_throughput_tps": speed.tps,
            "speedup": speed.speedup.median,
            "speedup_95": [speed.speedup.low, speed.speedup.high],
        }

    rows: list[dict[str, Any]] = []
    for varied, batch_size, sequence in shapes:
        report("timing sequence lengths and batch sizes", len(rows), len(shapes))
        rows.append({"varied": varied, **timed(batch_size, sequence)})
    report("timing sequence lengths and batch sizes", len(shapes), len(shapes))
    return rows


def profile_full_pipeline(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str] | Any,
    *,
    config: Candidate | VARConfig | None = None,
    profile: RoutingProfile | None = None,
    settings: AnalysisSettings | None = None,
    setting: SpeedSetting | None = None,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Profile a model's parts with and without VAR, and compare measured with predicted speedup.

    Args:
        model: a transformers MoE causal language model.
        tokenizer: its tokenizer.
        texts: what `var_moe.data.encoding.as_documents` takes: texts, or token ids.
        config: a `VARConfig` or another `Candidate`; by default the balanced preset.
        profile: routing statistics of other text. Without one, half of the texts are profiled
            and speed is measured on the other half.
        settings: how much is measured; by default `AnalysisSettings.quick`.
        setting: batch and sequence of the timed forwards.
        output: folder for ``systems_analysis.json`` and ``profile_report.json``.

    Returns:
        What these files hold: the analysis, with the parts of a forward under ``profile``.

    Raises:
        UsageError: the model is no MoE, or there is too little text.
    """
    from var_moe.calibration.collect import collect_profile

    loaded = LoadedModel.of(model, tokenizer)
    documents = as_documents(texts, tokenizer)
    check_documents(documents, model, tokenizer, "texts")
    if profile is None:
        require_documents(documents, 2, "profiling one half and timing the other")
        half = len(documents) // 2
        log.warning("no profile given: %d of the %d documents are profiled", half, len(documents))
        calibration, documents = documents[:half], documents[half:]
        profile = collect_profile(
            loaded, calibration, dataset="texts", data_hash="given", max_tokens=None
        )
    else:
        profile.check_loaded(loaded)
    kept = None if output is None else GrowingResult(check_output_folder(output) / SYSTEMS_FILE)
    with kept or nullcontext():
        return analyse(
            Evaluator(loaded, documents, setting=setting or SpeedSetting()),
            profile,
            Candidate.of(config or VARConfig.preset("balanced")),
            settings or AnalysisSettings.quick(),
            kept=kept,
        )
