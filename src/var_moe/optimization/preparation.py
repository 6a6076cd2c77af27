"""What a search, or a validation, needs before its first evaluation: text, profile, objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from var_moe.calibration.calibrate import with_damages
from var_moe.calibration.collect import DEFAULT_TOKENS, collect_profile
from var_moe.calibration.fitted_files import load_compensation
from var_moe.calibration.profile import HEAD_FILE, RoutingProfile
from var_moe.config import check_seed
from var_moe.data.documents import by_page, ids_hash, in_turn, require_documents
from var_moe.errors import UsageError
from var_moe.evaluation.evaluator import Evaluator, Progress
from var_moe.models.checks import check_droppable
from var_moe.models.identity import difference, identity
from var_moe.optimization.candidate import Candidate
from var_moe.optimization.objective import PolicyObjective, searched_compensations
from var_moe.optimization.search_space import COMPENSATION, SearchSpace, defaults

if TYPE_CHECKING:
    from var_moe.data.documents import EncodedDocument, TextSplit
    from var_moe.models.loading import LoadedModel
    from var_moe.optimization.settings import TuneSettings

PROFILE_FOLDER = "profile"
DAMAGE_FOLDER = "damage_pass"
"""Where a profile's folder holds its running damage pass."""


@dataclass(frozen=True, kw_only=True)
class EncodedText:
    """A split, tokenised, with its identity; ``parts`` says so of each of several data sets."""

    dataset: str
    split: str
    data_hash: str
    documents: Sequence[EncodedDocument]
    independent: bool
    note: str
    parts: Sequence[Mapping[str, Any]] = ()

    def to_dict(self) -> dict[str, object]:
        """For result files."""
        parts = {"datasets": [dict(part) for part in self.parts]} if self.parts else {}
        return {
            "dataset": self.dataset,
            "split": self.split,
            "data_hash": self.data_hash,
            "documents": len(self.documents),
            "tokens": sum(len(document.ids) for document in self.documents),
            "independent_documents": self.independent,
            "note": self.note,
            **parts,
        }


def read_text(dataset: str, split: str, loaded: LoadedModel) -> EncodedText:
    """Load and tokenise one split."""
    from var_moe.data.text import load_text

    return tokenised(load_text(dataset, split), loaded)


def tokenised(text: TextSplit, loaded: LoadedModel) -> EncodedText:
    """A split that was loaded before the model, so that a wrong one was refused before it."""
    from var_moe.data.encoding import check_documents, encode

    documents = encode(text, loaded.tokenizer)
    where = f"{text.dataset} ({text.split})"
    said = check_documents(documents, loaded.model, loaded.tokenizer, where)
    parts = [
        {
            "dataset": part.dataset,
            "data_hash": part.content_hash,
            "documents": len(part.documents),
            "note": part.note,
        }
        for part in text.parts
    ]
    return EncodedText(
        dataset=text.dataset,
        split=text.split,
        data_hash=text.content_hash,
        documents=documents,
        independent=text.independent,
        note="; ".join(filter(None, [text.note, said])),
        parts=parts,
    )


def sample_documents(
    documents: Sequence[EncodedDocument], at_most: int | None, seed: int = 0
) -> list[EncodedDocument]:
    """A seeded sample in the original order; all of them where there are no more."""
    if at_most is None or at_most >= len(documents):
        return list(documents)
    chosen = np.random.default_rng(check_seed(seed)).permutation(len(documents))[:at_most]
    return [documents[i] for i in sorted(chosen)]


def halves(
    documents: Sequence[EncodedDocument], *, equal: bool = False
) -> tuple[list[EncodedDocument], ...]:
    """Validation's two halves, the same in every run: one to search on, one to order on.

    Sections of one page (ids ``page#number``) stay in one half. Of several data sets each is
    halved by itself; the first so many documents of a half hold them in the proportions of the
    whole, or with ``equal``, in equal numbers.
    """
    sets: dict[str, list[EncodedDocument]] = {}
    for document in documents:
        sets.setdefault(document.dataset, []).append(document)
    pairs = [_halves(own) for own in sets.values()]
    return tuple(in_turn([pair[half] for pair in pairs], equal=equal) for half in (0, 1))


def _halves(documents: Sequence[EncodedDocument]) -> tuple[list[EncodedDocument], ...]:
    groups = by_page(documents)
    rng = np.random.default_rng(20_26)
    both: tuple[list[EncodedDocument], list[EncodedDocument]] = ([], [])
    for at in rng.permutation(len(groups)):
        smaller = min(both, key=len)
        smaller.extend(groups[at])
    # Shuffled, because a search takes the first of its half.
    return tuple([half[i] for i in rng.permutation(len(half))] for half in both)


def obtain_profile(
    loaded: LoadedModel,
    dataset: str,
    *,
    given: Path | None,
    folder: Path | None,
    tokens: int = DEFAULT_TOKENS,
    damages: bool = True,
    calibration: TextSplit | None = None,
    keep: bool = False,
    progress: Progress | None = None,
) -> tuple[RoutingProfile, Path | None]:
    """The profile asked for, one that an earlier run left in the folder, or a fresh one.

    Args:
        loaded: the model.
        dataset: its calibration split is profiled.
        given: a profile folder to use as it is.
        folder: results folder; a fresh profile is kept in its ``profile`` subfolder, and an
            interrupted one goes on there.
        tokens: calibration size of a fresh profile.
        damages: also predict what cuts cost, in a backward pass, where the profile lacks it.
        calibration: the calibration split, where it is loaded already.
        keep: refuse to replace the folder's profile: what was found with it needs it.
        progress: called with a stage's name, tokens done and in all.

    Returns:
        The profile and where it lies.

    Raises:
        UsageError: the given profile is of another model; names both. Or the one to keep is not
            of this model, text and size.
    """
    if given is not None:
        profile = RoutingProfile.load(given)
        profile.check_loaded(loaded)
        return profile, given
    from var_moe.data.text import load_text

    text = tokenised(calibration or load_text(dataset, "calibration"), loaded)
    place = folder / PROFILE_FOLDER if folder else None
    if place and (place / HEAD_FILE).is_file():
        try:
            kept = RoutingProfile.load(place)
        except UsageError:
            kept = None
        if kept and _is_of(kept, loaded, text, tokens):
            return (_with_damages(loaded, kept, text, place, progress) if damages else kept), place
        if kept and keep:
            raise UsageError(
                f"{place}: the search to resume has this profile, which is not of {loaded.name!r} "
                f"as it is now on {dataset!r} with {tokens} tokens; resume with the same --model, "
                "--dataset and --calibration_tokens, or choose another folder"
            )
    if place:
        place.mkdir(parents=True, exist_ok=True)
    profile = collect_profile(
        loaded,
        text.documents,
        dataset=dataset,
        data_hash=text.data_hash,
        max_tokens=tokens,
        checkpoint=place / "checkpoint.safetensors" if place else None,
        progress=(lambda done, total: progress("profiling the routing", done, total))
        if progress
        else None,
    )
    if place:
        profile.save(place)
    if damages:
        profile = _with_damages(loaded, profile, text, place, progress)
    return profile, place


def _is_of(profile: RoutingProfile, loaded: LoadedModel, text: EncodedText, tokens: int) -> bool:
    """Whether a profile is of this model, text and size; also as the tokenizer reads it now."""
    head, ids = profile.head, ids_hash(text.documents)
    now, then = (text.data_hash, ids, tokens), (head.get("ids_hash", ids), head["tokens_asked"])
    return now == (head["data_hash"], *then) and difference(head, identity(loaded)) is None


def _with_damages(
    loaded: LoadedModel,
    profile: RoutingProfile,
    text: EncodedText,
    place: Path | None,
    progress: Progress | None,
) -> RoutingProfile:
    """The profile with predicted damages, which are fitted and saved where there are none."""
    if profile.damages:
        return profile
    profile = with_damages(
        loaded,
        profile,
        text.documents,
        data={"dataset": text.dataset, "data_hash": text.data_hash},
        folder=place / DAMAGE_FOLDER if place else None,
        progress=progress,
    )
    if place:
        profile.save(place)
    return profile


@dataclass(frozen=True, kw_only=True)
class PreparedSearch:
    """A model and text that can be searched on: what searches share, whatever their seeds.

    Args:
        validation, profile, profile_place: the text, and the profile with its folder.
        evaluator, final: score the search's documents, and those of the last measurement.
        objective: of the search's documents.
        space: what is searched, with the compensations where there is a choice.
        identity: what decides the results besides the search itself.
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
) -> PreparedSearch:
    """Read the text, obtain the profile, measure the unmodified model.

    Raises:
        UsageError: bad input, too little text, a model with one expert per token.
    """
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
    spec, top_k = settings.spec, loaded.top_k
    compensations = searched_compensations(profile, spec.name, settings.compensation, top_k)
    default = Candidate(
        policy=spec.name,
        settings={**defaults(spec.search_space(top_k)), **settings.fixed},
        compensation=compensations[-1],
    )
    evaluator = Evaluator(
        loaded,
        searched,
        setting=settings.setting,
        progress=progress,
        robust=settings.robust,
        cost_policies=default.cost_policies(profile, top_k),
    )
    objective = PolicyObjective(
        evaluator,
        profile,
        spec.name,
        fixed=settings.fixed,
        compensations=compensations,
        max_degradation=settings.max_degradation,
    )
    speeds = ", ".join(f"{key} {tps:,.0f}" for key, tps in evaluator.backend_throughputs.items())
    say(
        f"baseline: perplexity {evaluator.baseline_losses.perplexity:.3f} on {len(searched)} "
        f"documents; tokens/s by experts backend: {speeds}"
    )
    evaluator.predicted_speedup(evaluator.top_k)  # measured before the search's clock starts
    final = evaluator.with_documents(ordering_half[: settings.final_samples])
    evaluator.progress = None  # the search shows its own
    identity = {
        "policy": spec.name,
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
    space = dict(settings.space_for(top_k))
    if COMPENSATION in objective.space:
        space[COMPENSATION] = objective.space[COMPENSATION]
    best = objective.calibration(compensations[-1]).get("compensation")
    if best is not None:
        identity["compensation_hash"] = best.hash
    return PreparedSearch(
        validation=validation,
        profile=profile,
        profile_place=place,
        evaluator=evaluator,
        final=final,
        objective=objective,
        space=space,
        identity=identity,
    )
