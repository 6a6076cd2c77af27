"""``var-moe guard``: calibrate the guard of a configuration, and run it on other text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from var_moe.cli.options import (
    RunOptions,
    Searched,
    SearchedModelOptions,
    SearchedTextOptions,
    Words,
)
from var_moe.cli.output import CommandResult, finish, show_section

if TYPE_CHECKING:
    from collections.abc import Sequence

    from var_moe.data.documents import EncodedDocument
    from var_moe.evaluation.evaluator import Progress
    from var_moe.models.loading import LoadedModel
    from var_moe.routing.base import RoutingPolicy
    from var_moe.routing.guard import Guard

GUARD_FILE = "guard.json"
CHECK_FILE = "guard_check.json"


def guard(
    results: Path,
    *,
    check: Words = None,
    alpha: float = 0.01,
    action: Literal["report", "warn", "fallback"] = "warn",
    tolerance: float = 0.0,
    model: SearchedModelOptions = SearchedModelOptions(),
    text: SearchedTextOptions = SearchedTextOptions(),
    profile: Path | None = None,
    output: Path | None = None,
    max_samples: int | None = None,
    run: RunOptions = RunOptions(),
) -> CommandResult:
    """Calibrate a guard for `routed(..., guard=...)` on one half of validation, one section a page.

    The other half, and the data sets of --check, are then played to it: how soon does it alarm?

    Args:
        results: results folder of `var-moe tune`, with best_config.json.
        check: other data sets whose validation text is played to the guard.
        alpha: probability of an alarm, ever, on text like the calibration's.
        action: what the guard does: report, warn, or fallback to the model's own routing.
        tolerance: how far means may leave their range, in standard deviations over documents.
        profile: profile folder, where none lies in the results folder.
        output: folder for guard.json and guard_check.json; by default the results folder.
        max_samples: calibrate on and check with at most so many documents each.
    """
    from var_moe.config import check_number
    from var_moe.data.text import load_text
    from var_moe.optimization.candidate import load_candidate
    from var_moe.optimization.results import CONFIG_FILE
    from var_moe.storage import SCHEMA_VERSION, provenance

    searched = Searched.of(results)
    name, dataset = model.model or searched.model, text.named(searched.dataset)
    place, seed = output or results, run.seed
    check_number("Guard.tolerance", tolerance, low=0)
    candidate = load_candidate(results / CONFIG_FILE)
    run.begin(name, dataset, *(check or ()), output=place)
    from var_moe.data.documents import one_per_page
    from var_moe.evaluation.guarding import calibrate_guard
    from var_moe.growing import GrowingResult
    from var_moe.optimization.preparation import halves, tokenised
    from var_moe.optimization.validation import find_profile
    from var_moe.report.measured import guard_section
    from var_moe.routing.guard import check_alpha

    check_alpha(alpha)
    known = find_profile(results / CONFIG_FILE, profile)
    calibration = load_text(dataset, "validation")
    others = {other: load_text(other, "validation") for other in check or ()}
    with run.progress() as progress:
        loaded = model.load(name)
        known.check_loaded(loaded)
        policy = candidate.make(known)
        encoded = tokenised(calibration, loaded)
        own, half = (one_per_page(part, seed)[:max_samples] for part in halves(encoded.documents))
        played = {f"{dataset}, other half": half}
        for other, its_text in others.items():
            documents = tokenised(its_text, loaded).documents
            played[other] = one_per_page(documents, seed)[:max_samples]
        progress.say(f"calibrating on {len(own)} documents ...")
        made = calibrate_guard(
            loaded,
            policy,
            own,
            alpha=alpha,
            action=action,
            tolerance=tolerance,
            seed=seed,
            data={"dataset": dataset, "split": "validation", "data_hash": encoded.data_hash},
            progress=progress,
        )
        made.save(place / GUARD_FILE)
        rows: list[dict[str, Any]] = []
        result = {
            "schema_version": SCHEMA_VERSION,
            "guard": asdict(made.expectation),
            "checks": rows,
            "seed": seed,
            "provenance": provenance(),
        }
        with GrowingResult(place / CHECK_FILE) as kept:
            for number, (other, documents) in enumerate(played.items()):
                kept.save(result, missing=", ".join(list(played)[number:]))
                rows.append(_checked(other, loaded, policy, made, documents, seed, progress))
            kept.save(result)
    show_section(guard_section, guard=result)
    return finish(result, place / GUARD_FILE, place / CHECK_FILE, report=place)


def _checked(
    name: str,
    loaded: LoadedModel,
    policy: RoutingPolicy,
    made: Guard,
    documents: Sequence[EncodedDocument],
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Play documents to the guard, from empty caches; one to a forward's row."""
    from var_moe.evaluation.guarding import run_documents
    from var_moe.execution.session import routed

    with routed(loaded.model, policy, guard=made) as session:
        session.reset()
        run_documents(
            loaded, session, documents, seed=seed, what=f"guarding {name}", progress=progress
        )
        report = session.report()
    assert report.guard is not None
    return {
        "text": name,
        "documents": len(documents),
        "tokens": report.tokens,
        "experts_per_token": report.experts_per_token,
        "departure": report.drift,
        **asdict(report.guard),
        "worst": report.guard.worst().name,
    }
