"""The systems analysis: one configuration beside the unmodified model, measured and explained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from var_moe.analysis.bottlenecks import Bottleneck, Facts, find_bottlenecks
from var_moe.analysis.components import (
    ComponentTimings,
    Ran,
    profile_components,
    run_baseline,
    run_policy,
)
from var_moe.analysis.performance import PerformanceModel
from var_moe.analysis.roofline import (
    active_parameters,
    count_work,
    measure_machine,
    roofline_arm,
)
from var_moe.analysis.scaling import BATCH_SIZES, SEQUENCES, measure_scaling
from var_moe.config import check_number
from var_moe.evaluation.cost import CostModel, fit_cost_model
from var_moe.evaluation.evaluator import Evaluator, Progress, Speed
from var_moe.execution.session import automatic
from var_moe.growing import GrowingResult
from var_moe.optimization.candidate import Candidate
from var_moe.optimization.results import jsonable
from var_moe.storage import SCHEMA_VERSION, atomic_write_json, check_output_folder, provenance

if TYPE_CHECKING:
    from var_moe.calibration.profile import RoutingProfile
    from var_moe.routing.base import RoutingPolicy

SYSTEMS_FILE, PROFILE_FILE = "systems_analysis.json", "profile_report.json"


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
    sequences: Sequence[int] = SEQUENCES
    batch_sizes: Sequence[int] = BATCH_SIZES

    def __post_init__(self) -> None:
        counts = {
            name: getattr(self, name)
            for name in ("blocks", "rounds", "scaling_blocks", "cost_blocks")
        }
        counts |= {f"sequences[{i}]": value for i, value in enumerate(self.sequences)}
        counts |= {f"batch_sizes[{i}]": value for i, value in enumerate(self.batch_sizes)}
        for name, value in counts.items():
            check_number(f"AnalysisSettings.{name}", value, integer=True, low=1)

    @classmethod
    def quick(cls) -> AnalysisSettings:
        """Enough to see the picture, not to publish it."""
        return cls(blocks=3, rounds=2, scaling_blocks=2, cost_blocks=2)


@dataclass(frozen=True, kw_only=True)
class SystemsAnalysis:
    """The two result files, as JSON values."""

    systems: dict[str, Any]
    components: dict[str, Any]

    def save(self, folder: str | Path) -> None:
        """Write ``systems_analysis.json`` and ``profile_report.json``.

        Raises:
            UsageError: the folder is a file or cannot be written.
        """
        place = check_output_folder(folder)
        atomic_write_json(place / PROFILE_FILE, self.components)
        atomic_write_json(place / SYSTEMS_FILE, self.systems)


def analyse(
    evaluator: Evaluator,
    profile: RoutingProfile | None,
    candidate: Candidate,
    settings: AnalysisSettings | None = None,
    *,
    kept: GrowingResult | None = None,
    progress: Progress | None = None,
) -> SystemsAnalysis:
    """Measure where time goes, how it scales, what bounds it; compare with the cost model.

    Args:
        evaluator: model, text and the batch that speed is measured on.
        profile: of the same model; None where the candidate needs nothing of one.
        candidate: what is compared with the unmodified model.
        settings: how much is measured.
        kept: of ``systems_analysis.json``: parts are saved as soon as they are known.
        progress: called with a stage's name, steps done and in all.
    """
    settings = settings or AnalysisSettings()
    report = progress or (lambda _stage, _done, _total: None)
    # Cost policies are those of the candidate, not of whatever was measured here before.
    cost_policies = candidate.cost_policies(profile, evaluator.top_k)
    evaluator = replace(evaluator, cost_policies=cost_policies, progress=progress)
    policy = candidate.make(profile)
    geometry, batches = evaluator.geometry(), evaluator.timing_batches
    speed = evaluator.speed(policy, blocks=settings.blocks)
    compared: dict[str, Any] = {
        "actual_speedup": speed.speedup.median,
        "actual_speedup_95": [speed.speedup.low, speed.speedup.high],
        "backend_factor": speed.backend_factor and speed.backend_factor.to_dict(),
        "skipping_factor": speed.skipping_factor and speed.skipping_factor.to_dict(),
    }
    systems: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "comparison": compared,
        "notes": evaluator.timing_notes(),
        "profile_hash": None if profile is None else profile.hash,
        **_origin(evaluator),
    }

    def known(missing: str, **further: Any) -> None:
        systems.update(further)
        if kept is not None:
            kept.save(jsonable(systems), missing=missing)

    known("parts of a forward, scaling, roofline, cost model")
    report("parts of a forward", 0, 2)
    parts = _components(evaluator, policy, settings.rounds, report)
    components: dict[str, Any] = jsonable(
        {
            "schema_version": SCHEMA_VERSION,
            "what": "milliseconds per forward; marks and hooks add a few percent of their own",
            **{name: timed.to_dict() for name, timed in parts.items()},
            **_origin(evaluator),
        }
    )
    if kept is not None:
        atomic_write_json(kept.path.with_name(PROFILE_FILE), components)
    baseline_memory = run_baseline(evaluator.model, batches, backend=evaluator.baseline_backend)
    ran = run_policy(
        evaluator.model,
        batches,
        policy,
        backend=evaluator.backend,
        layers=geometry["layers"],
        experts=geometry["experts"],
    )
    arms = {
        "baseline": {
            **_measured(evaluator, speed.baseline_tps, baseline_memory),
            "backend": speed.baseline_backend,
            "experts_per_token": float(evaluator.top_k),
        },
        "var": {
            **_measured(evaluator, speed.tps, ran.memory),
            "backend": automatic(evaluator.model, evaluator.backend),
            "var_stats": {**ran.report.to_dict(), "expert_imbalance": ran.imbalance},
            "config": candidate.to_dict(),
            "kind": candidate.kind,
        },
    }
    known("scaling, roofline, cost model", **arms)
    scaling = measure_scaling(
        evaluator,
        policy,
        sequences=settings.sequences,
        batch_sizes=settings.batch_sizes,
        blocks=settings.scaling_blocks,
        progress=progress,
    )
    known("roofline, cost model", scaling=scaling)
    report("fitting the cost model", 0, 1)
    cost = fitted_cost(evaluator, blocks=settings.cost_blocks)
    report("fitting the cost model", 1, 1)
    model = PerformanceModel(cost, residual=policy.adds_residual)
    predicted = model.predict_speedup(ran.report)
    compared |= {
        "predicted_speedup": predicted,
        "prediction_error_pct": 100 * abs(predicted / speed.speedup.median - 1),
        "largest_speedup": model.largest_speedup(),
        "time_by_term": model.analyze_bottleneck(ran.report),
        "cost_model": cost.to_dict(),
    }
    known("roofline")
    facts = _facts(evaluator, candidate, policy, speed, ran, parts, scaling, model)
    systems |= {
        "roofline": _roofline(evaluator, policy, arms),
        "bottlenecks": [one.to_dict() for one in find_bottlenecks(facts)],
    }
    return SystemsAnalysis(systems=jsonable(systems), components=components)


def fitted_cost(evaluator: Evaluator, *, blocks: int) -> CostModel:
    """The cost model of the evaluator's machine, model and policies."""
    var_all, var_leading = evaluator.cost_policies or (None, None)
    return fit_cost_model(evaluator, var_all=var_all, var_leading=var_leading, blocks=blocks)


def _components(
    evaluator: Evaluator, policy: RoutingPolicy, rounds: int, report: Progress
) -> dict[str, ComponentTimings]:
    """Baseline and policy."""
    model, batches = evaluator.model, evaluator.timing_batches
    baseline = profile_components(
        model, batches, policy=None, backend=evaluator.baseline_backend, rounds=rounds
    )
    report("parts of a forward", 1, 2)
    var = profile_components(
        model, batches, policy=policy, backend=evaluator.backend, rounds=rounds
    )
    report("parts of a forward", 2, 2)
    return {"baseline": baseline, "var": var}


def _measured(evaluator: Evaluator, tps: float, memory: dict[str, Any]) -> dict[str, Any]:
    tokens = evaluator.timing_batches[0].numel()
    return {"avg_time_ms": 1000 * tokens / tps, "throughput_tps": tps, "memory": memory}


def _roofline(evaluator: Evaluator, policy: RoutingPolicy, arms: dict[str, Any]) -> dict[str, Any]:
    model, ids = evaluator.model, evaluator.timing_batches[0]
    weight = next(model.parameters())
    machine = measure_machine(torch.device(weight.device), weight.dtype)
    kept = {"baseline": float(evaluator.top_k)}
    kept["var"] = arms["var"]["var_stats"]["experts_per_token"]
    return {
        "counted": "multiply-adds and bytes of matrix products and attention, as torch counts them "
        "(no causal mask); not norms, activations, softmax",
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "active_parameters": active_parameters(model, kept["baseline"]),
        "machine": machine.to_dict(),
        "setting": {"batch_size": ids.shape[0], "sequence": ids.shape[1]},
        **{
            name: roofline_arm(
                model,
                machine,
                count_work(model, ids, chosen),
                seconds=arms[name]["avg_time_ms"] / 1000,
                experts_per_token=kept[name],
                peak_bytes=arms[name]["memory"]["peak_bytes"],
            )
            for name, chosen in (("baseline", None), ("var", policy))
        },
    }


def _facts(
    evaluator: Evaluator,
    candidate: Candidate,
    policy: RoutingPolicy,
    speed: Speed,
    ran: Ran,
    parts: dict[str, ComponentTimings],
    scaling: list[dict[str, Any]],
    model: PerformanceModel,
) -> Facts:
    assert speed.backend_factor is not None
    return Facts(
        speedup=speed.speedup.median,
        speedup_low=speed.speedup.low,
        speedup_high=speed.speedup.high,
        backend_factor=speed.backend_factor.median,
        backend_used=automatic(evaluator.model, evaluator.backend),
        learned_pct=ran.report.learned_pct,
        cached_pct=ran.report.cached_pct,
        cache_hit_rate=ran.report.cache_hit_rate,
        experts_per_token=ran.report.experts_per_token,
        top_k=evaluator.top_k,
        router_always_asked=policy.drops_only,
        uses_cache=candidate.settings.get("cache_size", 0) > 0,
        scaling=scaling,
        imbalance=ran.imbalance,
        routing_share=parts["var"].share("policy"),
        experts_share=parts["baseline"].share("experts"),
        bound=model.largest_speedup(),
    )


def _origin(evaluator: Evaluator) -> dict[str, Any]:
    loaded = evaluator.loaded
    return {
        "documents": len(evaluator.documents),
        "setting": evaluator.setting.to_dict(),
        "model": {"name": loaded.name, "revision": loaded.revision, "dtype": loaded.dtype},
        "provenance": provenance(),
    }


__all__ = [
    "AnalysisSettings",
    "Bottleneck",
    "SystemsAnalysis",
    "analyse",
    "fitted_cost",
]
