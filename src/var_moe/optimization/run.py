"""The main job: profile, search, measure again, choose, save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from var_moe.config import PRESETS, VARConfig
from var_moe.errors import UsageError
from var_moe.evaluation.compare import Evaluator, Progress, SpeedSetting
from var_moe.optimization.bayesian import bayesian_optimization
from var_moe.optimization.conclusion import TuneOutcome, conclude, profile_notes, search_notes
from var_moe.optimization.grid import grid_search
from var_moe.optimization.journal import JOURNAL_NAME, STUDY_NAME
from var_moe.optimization.objective import VARObjective, make_objective
from var_moe.optimization.objective_protocol import check_bound
from var_moe.optimization.policy_forecast import not_replayable
from var_moe.optimization.policy_objective import PolicyObjective
from var_moe.optimization.preparation import halves, obtain_profile, read_text
from var_moe.optimization.random_points import random_search
from var_moe.optimization.remeasure import Measured, measure, remeasure
from var_moe.optimization.replay_run import (
    ReplaySearch,
    replay_metadata,
    save_front,
    search_by_replay,
    sensitivity_note,
    verify_front,
)
from var_moe.optimization.results import OptimizationResult, jsonable
from var_moe.optimization.search_space import SEARCH_SPACE, SearchSpace, check_seed
from var_moe.profiling.collect import DEFAULT_TOKENS
from var_moe.profiling.fitted_files import load_compensation
from var_moe.routing.registry import policy_spec
from var_moe.storage import check_output_folder

if TYPE_CHECKING:
    from var_moe.models.loading import LoadedModel

METHODS = ("replay", "bayesian", "grid", "random")
DEFAULT_SAMPLES = 200
_AT_LEAST = {
    **dict.fromkeys(("n_calls", "n_points", "final_blocks", "candidates"), 1),
    **dict.fromkeys(("max_samples", "final_samples"), 2),  # an error needs two documents
    "calibration_tokens": 1,
}


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """What `tune` is asked to do; the defaults are the documented ones.

    Args:
        method, engine: how points are chosen; the engine is for the bayesian method.
        exhaustive: the grid runs the model for each of its points; else their forecasts choose
            `n_calls` of them, as for the method replay.
        dataset: name or path; its calibration split is profiled, its validation split judges.
        n_calls: full evaluations; of the exhaustive grid all points are.
        n_points: values per dimension of the grid.
        max_degradation: bound on the relative perplexity change.
        output: folder for the results.
        seed: of the search; None draws a fresh one, which is recorded.
        mode: ``"verified"`` or ``"plain"``.
        policy: another policy's name, to tune that one in place of VAR, in its own `space`.
        compensation: name of what stands in for the experts that the policy drops.
        compensation_folder: where a learned one lies, if not with the profile.
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
    exhaustive: bool = True
    dataset: str = "demo"
    n_calls: int = 50
    n_points: int = 3
    max_degradation: float = 0.01
    output: Path = Path("results/phase3")
    seed: int | None = None
    mode: str = "verified"
    policy: str | None = None
    compensation: str | None = None
    compensation_folder: Path | None = None
    max_samples: int = DEFAULT_SAMPLES
    final_samples: int | None = None
    space: SearchSpace = field(default_factory=lambda: dict(SEARCH_SPACE))
    resume: bool = False
    profile: Path | None = None
    calibration_tokens: int = DEFAULT_TOKENS
    final_blocks: int = 10
    candidates: int = 8
    setting: SpeedSetting = field(default_factory=SpeedSetting)

    @property
    def by_replay(self) -> bool:
        """Whether forecasts from a trace choose what is evaluated."""
        return self.method == "replay" or (self.method == "grid" and not self.exhaustive)

    def __post_init__(self) -> None:
        check_bound(self.max_degradation)
        if self.method not in METHODS:
            raise UsageError(f"method {self.method!r}: expected one of {', '.join(METHODS)}")
        if self.by_replay and self.policy and not policy_spec(self.policy).cuts_only:
            raise UsageError(not_replayable(self.policy))
        check_seed(self.seed)
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} = {value}: expected at least {least}")
        check_output_folder(self.output)


FASTER = (
    "these are VAR's six thresholds; where it was measured, the damage policy runs fewer experts "
    "at the same degradation: `var-moe tune --policy damage`"
)


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
    if settings.compensation_folder is not None:
        learned = load_compensation(settings.compensation_folder, loaded)
        profile = profile.with_compensation(learned)
    kept = [settings.output / name for name in (JOURNAL_NAME, STUDY_NAME)]
    if settings.resume and not any(path.is_file() for path in kept):
        say(f"nothing to resume in {settings.output}: a new search begins")
    search_half, ordering_half = halves(validation.documents)
    searched = search_half[: settings.max_samples]
    evaluator = Evaluator(loaded, searched, setting=settings.setting, progress=progress)
    objective = make_objective(
        evaluator,
        profile,
        policy=settings.policy,
        compensation=settings.compensation,
        mode=settings.mode,
        max_degradation=settings.max_degradation,
    )
    say(_baseline_line(evaluator))
    identity = {
        "model": loaded.name,
        "revision": loaded.revision,
        "dtype": loaded.dtype,
        "device": str(loaded.device.type),
        "dataset": settings.dataset,
        "data_hash": validation.data_hash,
        "profile_hash": profile.hash,
        "search_documents": len(searched),
        "setting": settings.setting.to_dict(),
    }
    evaluator.predicted_speedup(evaluator.top_k)  # measured before the search's clock starts
    evaluator.progress = None  # the search shows its own
    if settings.policy:
        identity["policy"] = settings.policy
    if objective.compensation is not None:
        identity["compensation_hash"] = objective.compensation.hash
    options: dict[str, Any] = {
        "seed": settings.seed,
        "mode": None if settings.policy else settings.mode,
        "resume": settings.resume,
        "confirm": False,  # `tune` measures the best again on text of its own
        "settings": identity,
        "verbose": verbose,
    }
    replayed: ReplaySearch | None = None
    if settings.by_replay:
        replayed = search_by_replay(
            objective,
            settings.space,
            n_calls=settings.n_calls,
            n_points=settings.n_points if settings.method == "grid" else None,
            data={"dataset": settings.dataset, "data_hash": validation.data_hash},
            folder=settings.output,
            progress=progress,
            options=options,
        )
        result = replayed.result
    else:
        result = _search(objective, settings, options)

    ordering = ordering_half[: settings.final_samples]
    final = evaluator.with_documents(ordering)
    final.progress = progress
    measured = remeasure(
        final,
        objective,
        result.evaluations,
        blocks=settings.final_blocks,
        at_most=settings.candidates,
        closer=replayed.plan.closer if replayed is not None else None,
    )
    presets = []
    if isinstance(objective, VARObjective):
        presets = [_preset(name, measured, final, objective, settings) for name in PRESETS]
    measured = [one for one in measured if all(one.config != p.config for p in presets)]
    if replayed is not None:
        measured += verify_front(
            replayed, final, objective, [*measured, *presets], blocks=settings.final_blocks
        )
        save_front(
            settings.output,
            replayed.front,
            [*measured, *presets],
            config=objective.config,
            max_degradation=settings.max_degradation,
            identity=identity,
        )
    notes = [
        *([] if settings.policy else [*profile_notes(profile, settings.space), FASTER]),
        *search_notes(result, validation.independent),
        *([sensitivity_note(replayed)] if replayed and replayed.sensitivity else []),
        *final.timing_notes(),
    ]
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
        **({"replay": replay_metadata(replayed)} if replayed else {}),
    }
    return conclude(
        result,
        measured=measured,
        presets=presets,
        output=settings.output,
        max_degradation=settings.max_degradation,
        notes=notes,
        metadata=metadata,
        top_k=evaluator.top_k,
    )


def _preset(
    name: str,
    measured: Sequence[Measured],
    final: Evaluator,
    objective: VARObjective,
    settings: TuneSettings,
) -> Measured:
    """A preset's measurement: the candidate's, where the search proposed the same."""
    config = VARConfig.preset(name, mode=settings.mode)
    for one in measured:
        if one.config == config:
            return replace(one, name=name)
    return measure(
        final, objective, config, name=name, blocks=settings.final_blocks, always_time=True
    )


def _search(
    objective: PolicyObjective, settings: TuneSettings, options: dict[str, Any]
) -> OptimizationResult:
    folder = settings.output
    if settings.method == "grid":
        journal = folder / JOURNAL_NAME
        return grid_search(objective, settings.space, settings.n_points, journal=journal, **options)
    if settings.method == "random":
        journal = folder / JOURNAL_NAME
        return random_search(
            objective, settings.space, settings.n_calls, journal=journal, **options
        )
    return bayesian_optimization(
        objective,
        settings.space,
        settings.n_calls,
        engine=settings.engine,
        storage_path=folder,
        **options,
    )


def _baseline_line(evaluator: Evaluator) -> str:
    speeds = ", ".join(
        f"{name} {speed:,.0f}" for name, speed in evaluator.backend_throughputs.items()
    )
    return (
        f"baseline: perplexity {evaluator.baseline_losses.perplexity:.3f} on "
        f"{len(evaluator.documents)} documents; tokens/s by experts backend: {speeds}"
    )


def _settings_dict(settings: TuneSettings) -> dict[str, Any]:
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    values["setting"] = settings.setting.to_dict()
    found: dict[str, Any] = jsonable(values)
    return found


__all__ = ["TuneOutcome", "TuneSettings", "tune"]
