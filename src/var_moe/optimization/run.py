"""The main job: profile, search, measure again, choose, save."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from var_moe.config import PRESETS, VARConfig
from var_moe.errors import UsageError, VarMoeError
from var_moe.evaluation.compare import Evaluator, Progress, SpeedSetting
from var_moe.optimization.bayesian import bayesian_optimization
from var_moe.optimization.grid import grid_search
from var_moe.optimization.journal import JOURNAL_NAME
from var_moe.optimization.objective import VARObjective, check_bound
from var_moe.optimization.preparation import halves, obtain_profile, read_text
from var_moe.optimization.random_points import random_search
from var_moe.optimization.remeasure import Measured, measure, remeasure, winner
from var_moe.optimization.results import OptimizationResult, jsonable
from var_moe.optimization.saving import NEAREST_MISS_FILE, save_optimization_results
from var_moe.optimization.search_space import SEARCH_SPACE, SearchSpace
from var_moe.optimization.selection import top_candidates
from var_moe.optimization.summary import as_text, summary_parts
from var_moe.profiling.collect import DEFAULT_TOKENS
from var_moe.profiling.profile import RoutingProfile
from var_moe.storage import check_output_folder

if TYPE_CHECKING:
    from var_moe.models.loading import LoadedModel

METHODS = ("bayesian", "grid", "random")
DEFAULT_SAMPLES = 200
GAIN_WORTH_NAMING = 1.005


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """What `tune` is asked to do; the defaults are the documented ones.

    Args:
        method, engine: how points are chosen; the engine is for the bayesian method.
        dataset: name or path; its calibration split is profiled, its validation split judges.
        n_calls: evaluations of the bayesian and random methods.
        n_points: values per dimension of the grid.
        max_degradation: bound on the relative perplexity change.
        output: folder for the results.
        seed: of the search; None draws a fresh one, which is recorded.
        mode: ``"verified"`` or ``"plain"``.
        max_samples: documents of the search half that each evaluation scores.
        final_samples: documents of the ordering half for the last measurement; None takes all.
        space: search space.
        resume: go on with the search in `output`.
        profile: a ready profile folder.
        calibration_tokens: size of a fresh profile.
        final_blocks: timed blocks per arm of the last measurement.
        candidates: how many candidates are measured again at the most.
        setting: batch that throughput is measured on.
    """

    method: str = "bayesian"
    engine: str = "optuna"
    dataset: str = "demo"
    n_calls: int = 50
    n_points: int = 3
    max_degradation: float = 0.01
    output: Path = Path("results/phase3")
    seed: int | None = None
    mode: str = "verified"
    max_samples: int = DEFAULT_SAMPLES
    final_samples: int | None = None
    space: SearchSpace = field(default_factory=lambda: dict(SEARCH_SPACE))
    resume: bool = False
    profile: Path | None = None
    calibration_tokens: int = DEFAULT_TOKENS
    final_blocks: int = 10
    candidates: int = 8
    setting: SpeedSetting = field(default_factory=SpeedSetting)

    def __post_init__(self) -> None:
        check_bound(self.max_degradation)
        if self.method not in METHODS:
            raise UsageError(f"method {self.method!r}: expected one of {', '.join(METHODS)}")
        for name in ("n_calls", "n_points", "max_samples", "final_blocks", "candidates"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} = {getattr(self, name)}: expected at least 1")
        check_output_folder(self.output)


@dataclass(frozen=True, kw_only=True)
class TuneOutcome:
    """What `tune` found."""

    result: OptimizationResult
    best: Measured
    others: tuple[Measured, ...]
    answer: str
    parts: tuple[Any, ...]


def tune(
    loaded: LoadedModel,
    settings: TuneSettings,
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _line: None,
    verbose: bool = True,
) -> TuneOutcome:
    """Find the fastest configuration that keeps the bound, and write the result files.

    Args:
        loaded: the model.
        settings: what to do.
        progress: called with a stage's name, steps done and in all.
        say: called with each line worth showing.
        verbose: show the search's own progress.

    Raises:
        UsageError: bad input, too little text.
        VarMoeError: no configuration keeps the bound; ``nearest_miss.json`` holds the closest.
    """
    from var_moe.evaluation.text import require_documents

    validation = read_text(settings.dataset, "validation", loaded)
    require_documents(validation.documents, 20, "searching and ordering on validation text")
    profile, place = obtain_profile(
        loaded,
        settings.dataset,
        given=settings.profile,
        folder=settings.output,
        tokens=settings.calibration_tokens,
        progress=progress,
    )
    search_half, ordering_half = halves(validation.documents)
    searched = search_half[: settings.max_samples]
    evaluator = Evaluator(loaded, searched, setting=settings.setting, progress=progress)
    objective = VARObjective(
        evaluator, profile, max_degradation=settings.max_degradation, mode=settings.mode
    )
    say(_baseline_line(evaluator))
    identity = {
        "model": loaded.name,
        "dataset": settings.dataset,
        "data_hash": validation.data_hash,
        "profile_hash": profile.hash,
        "search_documents": len(searched),
        "setting": settings.setting.to_dict(),
    }
    evaluator.predicted_speedup(evaluator.top_k)  # measured before the search's clock starts
    evaluator.progress = None  # the search shows its own
    result = _search(objective, settings, identity, verbose)

    ordering = ordering_half[: settings.final_samples]
    final = evaluator.with_documents(ordering)
    final.progress = progress
    candidates = top_candidates(result, settings.candidates)
    measured = remeasure(
        final, objective, candidates, blocks=settings.final_blocks, at_most=settings.candidates
    )
    presets = [
        measure(
            final,
            objective,
            VARConfig.preset(name, mode=settings.mode),
            name=name,
            blocks=settings.final_blocks,
            always_time=True,
        )
        for name in PRESETS
    ]
    best = winner([*measured, *presets])
    notes = [*_profile_notes(profile, settings), *_search_notes(result, validation.independent)]
    metadata = {
        "settings": _settings_dict(settings),
        "identity": identity,
        "baseline": {
            "perplexity": final.baseline_losses.perplexity,
            "search_perplexity": evaluator.baseline_losses.perplexity,
            "backend": evaluator.baseline_backend,
            "backend_throughputs_tps": evaluator.backend_throughputs,
        },
        "geometry": evaluator.geometry(),
        "profile": {"path": str(place) if place else None, **profile.head},
        "validation": validation.to_dict(),
        "ordering_documents": len(ordering),
        "remeasured": [one.to_dict() for one in (*measured, *presets)],
        "notes": notes,
    }
    return _conclude(
        result, best, measured, presets, settings, notes, metadata, top_k=evaluator.top_k
    )


def _search(
    objective: VARObjective, settings: TuneSettings, identity: dict[str, Any], verbose: bool
) -> OptimizationResult:
    folder = settings.output
    common: dict[str, Any] = {
        "seed": settings.seed,
        "mode": settings.mode,
        "resume": settings.resume,
        "settings": identity,
        "verbose": verbose,
    }
    if settings.method == "grid":
        journal = folder / JOURNAL_NAME
        return grid_search(objective, settings.space, settings.n_points, journal=journal, **common)
    if settings.method == "random":
        journal = folder / JOURNAL_NAME
        return random_search(objective, settings.space, settings.n_calls, journal=journal, **common)
    return bayesian_optimization(
        objective,
        settings.space,
        settings.n_calls,
        engine=settings.engine,
        storage_path=folder,
        **common,
    )


def _conclude(
    result: OptimizationResult,
    best: Measured | None,
    measured: Sequence[Measured],
    presets: Sequence[Measured],
    settings: TuneSettings,
    notes: Sequence[str],
    metadata: Mapping[str, Any],
    *,
    top_k: int,
) -> TuneOutcome:
    """Choose the answer, write every file, and fail where nothing keeps the bound."""
    limit = f"{100 * settings.max_degradation:g}%"
    everything = [*measured, *presets]
    if best is None:
        near = min(everything, key=lambda one: one.quality.change.upper)
        answer = (
            f"All configurations violate constraint: the smallest degradation is "
            f"{100 * near.quality.change.value:+.2f}% (95% upper bound "
            f"{100 * near.quality.change.upper:+.2f}%, bound {limit}) with "
            f"{near.config.documented()}. It is saved in {settings.output / NEAREST_MISS_FILE}; "
            "try a larger --max_degradation or wider --bounds."
        )
        result = result.replace(best_params=near.config, best_score=near.score)
        result.extra["nearest_miss"] = near.to_dict()
    else:
        assert best.speed is not None
        default = next(one for one in presets if one.name == "balanced")
        answer = (
            f"Fastest configuration with degradation below {limit}: "
            f"{best.speed.speedup.median:.3f}x at "
            f"{100 * best.quality.change.value:+.2f}% perplexity (95% upper bound "
            f"{100 * best.quality.change.upper:+.2f}%), "
            f"{best.quality.report.experts_per_token:.2f} of {top_k} experts per token."
        )
        if _no_better(best, default):
            answer = (
                "No improvement found: no configuration that keeps the bound is faster than the "
                f"default. {answer} Try a larger --max_degradation or wider --bounds."
            )
        result = result.replace(best_params=best.config, best_score=best.score)
        result.extra.pop("nearest_miss", None)
    others = tuple(one for one in everything if one is not best)
    named = [_renamed(best)] if best else []
    parts = summary_parts(
        best=named[0] if named else None,
        others=others,
        answer=answer,
        notes=notes,
        max_degradation=settings.max_degradation,
        top_k=top_k,
    )
    save_optimization_results(
        result, settings.output, metadata={**metadata, "answer": answer}, summary=as_text(parts)
    )
    if best is None:
        raise VarMoeError(answer)
    return TuneOutcome(result=result, best=best, others=others, answer=answer, parts=tuple(parts))


def _renamed(best: Measured) -> Measured:
    from dataclasses import replace

    return replace(best, name=f"best ({best.name})")


def _no_better(best: Measured, default: Measured) -> bool:
    if best is default:
        return True
    if best.speed is None or default.speed is None or not default.passed:
        return False
    return best.speed.speedup.median <= GAIN_WORTH_NAMING * default.speed.speedup.median


def _baseline_line(evaluator: Evaluator) -> str:
    speeds = ", ".join(
        f"{name} {speed:,.0f}" for name, speed in evaluator.backend_throughputs.items()
    )
    return (
        f"baseline: perplexity {evaluator.baseline_losses.perplexity:.3f} on "
        f"{len(evaluator.documents)} documents; tokens/s by experts backend: {speeds}"
    )


def _profile_notes(profile: RoutingProfile, settings: TuneSettings) -> list[str]:
    """Say plainly where thresholds can't bite on this model."""
    stats = profile.stats
    weight = stats["frequency"].to_numpy(np.float64)
    entropy = stats["mean_entropy"].to_numpy(np.float64)
    space = settings.space
    default = VARConfig()
    reach = float(weight[entropy <= default.entropy_threshold].sum() / weight.sum())
    top = float(space["entropy_threshold"]["high"]) if "entropy_threshold" in space else 1.5
    within = float(weight[entropy <= top].sum() / weight.sum())
    notes = []
    if reach < 0.001:
        share = np.quantile(np.repeat(entropy, 1), 0.1)
        notes.append(
            f"with the default entropy_threshold {default.entropy_threshold} the fast path is "
            f"never taken on this model (a tenth of its table entries lie below {share:.2f} nats, "
            f"of at most {profile.head['entropy_max_nats']:.2f}); what cuts pairs here is "
            "confidence_threshold"
            + ("" if within > 0.001 else f", also at the search's highest entropy, {top:g}")
        )
    return notes


def _search_notes(result: OptimizationResult, independent: bool) -> list[str]:
    notes = []
    failed = sum(1 for one in result.evaluations if one.failed)
    if failed:
        notes.append(f"{failed} of {result.num_evaluations} evaluations failed; see all_results")
    if not result.converged:
        notes.append("the search was still improving at its end: a larger --n_calls may find more")
    if not independent:
        notes.append("the text's documents are cut from one text: intervals are too narrow")
    return notes


def _settings_dict(settings: TuneSettings) -> dict[str, Any]:
    from dataclasses import fields

    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    values["setting"] = settings.setting.to_dict()
    found: dict[str, Any] = jsonable(values)
    return found


__all__ = ["TuneOutcome", "TuneSettings", "tune"]
