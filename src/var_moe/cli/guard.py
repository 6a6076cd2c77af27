"""``var-moe guard``: calibrate the guard of a configuration, and play other text to it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from var_moe.cli.output import Answer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from var_moe.data.documents import EncodedDocument
    from var_moe.evaluation.evaluator import Progress
    from var_moe.models.loading import LoadedModel
    from var_moe.routing.base import RoutingPolicy
    from var_moe.routing.guard import Guard
    from var_moe.routing.watch import GuardReport

GUARD_FILE = "guard.json"
CHECK_FILE = "guard_check.json"


def guard(
    results: Path,
    *,
    check: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    alpha: float = 0.01,
    action: Literal["report", "warn", "fallback"] = "warn",
    tolerance: float = 0.0,
    model: str | None = None,
    dataset: str | None = None,
    profile: Path | None = None,
    output: Path | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> Answer:
    """Calibrate a guard for `routed(..., guard=...)` on one half of validation, one section a page.

    The other half, and the data sets of --check, are then played to it: how soon does it alarm?

    Args:
        results: results folder of `var-moe tune`, with best_config.json.
        check: other data sets whose validation text is played to the guard.
        alpha: probability of an alarm, ever, on text like the calibration's.
        action: what the guard does: report, warn, or fallback to the model's own routing.
        tolerance: how far means may leave their range, in standard deviations over documents.
        model: demo, a local folder, or a Hub id; by default the search's.
        dataset: text to calibrate on; by default the search's.
        profile: profile folder, where none lies in the results folder.
        output: folder for guard.json and guard_check.json; by default the results folder.
        max_samples: calibrate on and check with at most so many documents each.
        seed: of the choice of sections and of the order of documents.
        device: auto, cpu, cuda, ...
        dtype: auto, float32, bfloat16, float16.
        trust_remote_code: run a Hub model's own code.
        quiet: no progress.
    """
    from var_moe.cli.report import make_report
    from var_moe.cli.validate import search_of
    from var_moe.config import check_number
    from var_moe.data.text import check_dataset, load_text
    from var_moe.errors import UsageError
    from var_moe.models.loading import check_name
    from var_moe.optimization.candidate import load_candidate
    from var_moe.optimization.results import CONFIG_FILE
    from var_moe.storage import SCHEMA_VERSION, check_output_folder, provenance

    if not results.is_dir():
        raise UsageError(f"{results}: no such folder; expected the results of `var-moe tune`")
    searched = search_of(results / CONFIG_FILE)
    model = model or searched.model
    dataset = dataset or searched.dataset
    place = check_output_folder(output or results)
    check_number("Guard.tolerance", tolerance, low=0)
    check_name(model)
    for name in (dataset, *(check or ())):
        check_dataset(name)
    chosen = load_candidate(results / CONFIG_FILE)
    if not quiet:
        print(f"loading model {model} ...", file=sys.stderr, flush=True)
    from var_moe.cli.progress import StageProgress
    from var_moe.data.documents import one_per_page
    from var_moe.evaluation.guarding import calibrate_guard
    from var_moe.growing import GrowingResult
    from var_moe.models.loading import load_model
    from var_moe.optimization.preparation import halves, tokenised
    from var_moe.optimization.validation import find_profile
    from var_moe.routing.guard import check_alpha

    check_alpha(alpha)
    found = find_profile(results / CONFIG_FILE, profile)
    calibration = load_text(dataset, "validation")
    others = {name: load_text(name, "validation") for name in check or ()}
    with StageProgress() as progress:
        loaded = load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        found.check_loaded(loaded)
        policy = chosen.make(found)
        text = tokenised(calibration, loaded)
        further = {
            name: one_per_page(tokenised(other, loaded).documents, seed)[:max_samples]
            for name, other in others.items()
        }
        own, other = (one_per_page(half, seed)[:max_samples] for half in halves(text.documents))
        if not quiet:
            progress.say(f"calibrating on {len(own)} documents ...")
        made = calibrate_guard(
            loaded,
            policy,
            own,
            alpha=alpha,
            action=action,
            tolerance=tolerance,
            seed=seed,
            data={"dataset": dataset, "split": "validation", "data_hash": text.data_hash},
            progress=None if quiet else progress,
        )
        made.save(place / GUARD_FILE)
        shown = None if quiet else progress
        rows: list[dict[str, Any]] = []
        result = {
            "schema_version": SCHEMA_VERSION,
            "guard": made.expectation.to_dict(),
            "checks": rows,
            "seed": seed,
            "provenance": provenance(),
        }
        played = {f"{dataset}, other half": other, **further}
        with GrowingResult(place / CHECK_FILE) as kept:
            for number, (name, documents) in enumerate(played.items()):
                kept.save(result, missing=", ".join(list(played)[number:]))
                rows.append(_checked(name, loaded, policy, made, documents, seed, shown))
            kept.save(result)
    for row in rows:
        print(_line(row))
    print(f"Saved: {place / GUARD_FILE}, {place / CHECK_FILE}")
    make_report(place)
    return Answer(result)


def _checked(
    name: str,
    loaded: LoadedModel,
    policy: RoutingPolicy,
    made: Guard,
    documents: Sequence[EncodedDocument],
    seed: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """Play documents to the guard, from empty caches; one to a forward's row."""
    from var_moe.evaluation.guarding import play
    from var_moe.execution.session import routed

    with routed(loaded.model, policy, guard=made) as session:
        session.reset()
        play(loaded, session, documents, seed=seed, what=f"playing {name}", progress=progress)
        report = session.report()
    assert report.guard is not None
    departure = report.departure
    return {
        "text": name,
        "documents": len(documents),
        "tokens": report.tokens,
        "experts_per_token": report.experts_per_token,
        "departure": None if departure is None else departure.to_dict(),
        **_state(report.guard),
    }


def _state(report: GuardReport) -> dict[str, Any]:
    return {**report.to_dict(), "worst": report.worst().name}


def _line(row: dict[str, Any]) -> str:
    """One text in one line."""
    worst = next(seen for seen in row["statistics"] if seen["name"] == row["worst"])
    said = (
        f"no alarm in {row['units']} documents"
        if row["alarm_at"] is None
        else f"alarm after {row['alarm_at']} of {row['documents']} documents"
    )
    return (
        f"{row['text']}: {said}; furthest {worst['name']} {worst['seen']:.4f}, expected "
        f"{worst['expected']:.4f} [{worst['low']:.4f}, {worst['high']:.4f}]"
    )
