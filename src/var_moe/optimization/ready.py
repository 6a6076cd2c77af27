"""What searches of one model, text and policy share, whatever their seeds: made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from var_moe.calibration.fitted_files import load_compensation
from var_moe.calibration.profile import RoutingProfile
from var_moe.evaluation.evaluator import Evaluator, Progress
from var_moe.models.checks import check_droppable
from var_moe.optimization.objective import make_objective
from var_moe.optimization.policy_objective import PolicyObjective
from var_moe.optimization.preparation import EncodedText, halves, obtain_profile, read_text
from var_moe.optimization.search_space import COMPENSATION, SearchSpace
from var_moe.optimization.settings import TuneSettings

if TYPE_CHECKING:
    from var_moe.models.loading import LoadedModel


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A model and text that can be searched on.

    ``evaluator`` scores the search's documents, ``final`` those of the last measurement. ``space``
    has what stands in for dropped experts, where there is a choice. ``identity`` says what decides
    the results besides the search itself.
    """

    validation: EncodedText
    profile: RoutingProfile
    profile_place: Path | None
    evaluator: Evaluator
    final: Evaluator
    objective: PolicyObjective
    space: SearchSpace
    identity: Mapping[str, Any]


def prepare(
    loaded: LoadedModel,
    settings: TuneSettings,
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _line: None,
) -> Ready:
    """Read the text, obtain the profile, measure the unmodified model.

    Raises:
        UsageError: bad input, too little text, a model with one expert per token.
    """
    from var_moe.data.documents import require_documents

    check_droppable(loaded.name, loaded.top_k)
    validation = read_text(settings.dataset, "validation", loaded)
    require_documents(validation.documents, 20, "searching and ordering on validation text")
    profile, place = obtain_profile(
        loaded,
        settings.dataset,
        given=settings.profile,
        folder=settings.preparations,
        tokens=settings.calibration_tokens,
        keep=settings.resume,
        progress=progress,
    )
    if settings.compensation_folder is not None:
        learned = load_compensation(settings.compensation_folder, loaded)
        profile = profile.with_compensation(learned)
    # Each data set is judged by itself: of each, as many documents as of the others.
    search_half, ordering_half = halves(validation.documents, equal=settings.robust)
    for half, step in ((search_half, "searching"), (ordering_half, "the last measurement")):
        # One page may hold nearly all documents, and a page is never split.
        require_documents(half, 2, f"{step}, in its half of the pages of {settings.dataset!r}")
    searched = search_half[: settings.max_samples]
    evaluator = Evaluator(
        loaded, searched, setting=settings.setting, progress=progress, robust=settings.robust
    )
    objective = make_objective(
        evaluator,
        profile,
        policy=settings.policy,
        compensation=settings.compensation,
        mode=settings.mode or "verified",
        search=True,
        max_degradation=settings.max_degradation,
    )
    say(_baseline_line(evaluator))
    evaluator.predicted_speedup(evaluator.top_k)  # measured before the search's clock starts
    final = evaluator.with_documents(ordering_half[: settings.final_samples])
    evaluator.progress = None  # the search shows its own
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
    if settings.robust:
        identity["robust"] = True
    if settings.policy:
        identity["policy"] = settings.policy
    space, stand_ins = dict(settings.space_for(loaded.top_k)), list(objective.compensations)
    if len(stand_ins) > 1:
        known = {"type": "choice", "choices": stand_ins, "default": stand_ins[-1]}
        space[COMPENSATION] = known
    best = objective.compensations[stand_ins[-1]].compensation
    if best is not None:
        identity["compensation_hash"] = best.hash
    return Ready(
        validation=validation,
        profile=profile,
        profile_place=place,
        evaluator=evaluator,
        final=final,
        objective=objective,
        space=space,
        identity=identity,
    )


def _baseline_line(evaluator: Evaluator) -> str:
    speeds = ", ".join(
        f"{name} {speed:,.0f}" for name, speed in evaluator.backend_throughputs.items()
    )
    return (
        f"baseline: perplexity {evaluator.baseline_losses.perplexity:.3f} on "
        f"{len(evaluator.documents)} documents; tokens/s by experts backend: {speeds}"
    )
