"""The end of `tune`: who wins, what is said about it, and the files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from var_moe.calibration.profile import RoutingProfile
from var_moe.config import VARConfig
from var_moe.errors import VarMoeError
from var_moe.evaluation.evaluator import Apart
from var_moe.optimization.candidate import kind_of
from var_moe.optimization.remeasure import Measured, best_measured, nearest
from var_moe.optimization.results import OptimizationResult
from var_moe.optimization.saving import (
    NEAREST_MISS_FILE,
    UNFINISHED,
    save_optimization_results,
)
from var_moe.optimization.search_space import SearchSpace
from var_moe.optimization.selection import CONVERGENCE_WINDOW
from var_moe.optimization.summary import as_text, summary_parts


@dataclass(frozen=True, kw_only=True)
class TuneOutcome:
    """What `tune` found."""

    result: OptimizationResult
    best: Measured
    others: tuple[Measured, ...]
    answer: str
    parts: tuple[Any, ...]


class NothingFitsError(VarMoeError):
    """No configuration keeps the bound; ``parts`` is what would have been printed."""

    def __init__(self, answer: str, parts: Sequence[Any]) -> None:
        super().__init__(answer)
        self.parts = tuple(parts)


def conclude(
    result: OptimizationResult,
    *,
    measured: Sequence[Measured],
    presets: Sequence[Measured],
    apart: Sequence[Apart] = (),
    output: Path,
    max_degradation: float,
    notes: Sequence[str],
    metadata: Mapping[str, Any],
    top_k: int,
) -> TuneOutcome:
    """Choose the answer and write every file.

    ``apart`` is the choice, or the nearest miss, on each of several data sets.

    Raises:
        NothingFitsError: nothing keeps the bound; the files are written all the same, with
            ``nearest_miss.json`` in place of ``best_config.json``.
    """
    everything = [*measured, *presets]
    best = best_measured(everything)
    limit = f"{100 * max_degradation:g}%"
    if best is None:
        near = nearest(everything)
        answer = _nothing_fits(near, limit, output)
        result = result.replace(
            best_score=near.score, extra={**result.extra, "nearest_miss": near.to_dict()}
        )
    else:
        default = next((one for one in presets if one.name == "balanced"), None)
        answer = _found(best, default, limit, top_k)
        extra = {key: value for key, value in result.extra.items() if key != "nearest_miss"}
        result = result.replace(best_params=best.config, best_score=best.score, extra=extra)
    others = tuple(one for one in everything if one is not best)
    parts = summary_parts(
        best=replace(best, name=f"best ({best.name})") if best else None,
        others=others,
        apart=apart,
        answer=answer,
        notes=notes,
        max_degradation=max_degradation,
        top_k=top_k,
    )
    save_optimization_results(
        result, output, metadata={**metadata, "answer": answer}, summary=as_text(parts)
    )
    if best is None:
        raise NothingFitsError(answer, parts)
    return TuneOutcome(result=result, best=best, others=others, answer=answer, parts=tuple(parts))


@contextmanager
def unfinished(
    result: OptimizationResult,
    *measured: Sequence[Measured],
    output: Path,
    metadata: Mapping[str, Any],
) -> Iterator[None]:
    """Around the last measurement: where it fails, the search and what was ``measured`` are saved.

    Raises:
        VarMoeError: every evaluation failed, so that there is nothing to measure; or the
            measurement did. In the latter case the search can be resumed for another one.
    """
    try:
        if all(one.failed for one in result.evaluations):
            failed = [f"{one.error}" for one in result.evaluations]
            raise VarMoeError(
                f"all {len(failed)} evaluations failed, the first with: {failed[0]}"
                if failed
                else "the search ended before its first evaluation"
            )
        yield
    except BaseException as error:
        why = str(error) or "the last measurement was interrupted"
        rows = [one.to_dict() for group in measured for one in group]
        saved = result.replace(extra={**result.extra, UNFINISHED: why})
        known = {**metadata, "remeasured": rows, "answer": f"Not finished: {why}"}
        save_optimization_results(saved, output, metadata=known)
        if isinstance(error, VarMoeError) or not isinstance(error, Exception):
            raise
        raise VarMoeError(
            f"the last measurement failed ({type(error).__name__}: {error}); the search is saved "
            f"in {output}, and --resume measures again"
        ) from error


def _nothing_fits(near: Measured, limit: str, output: Path) -> str:
    return (
        f"All configurations violate constraint: the smallest degradation is "
        f"{100 * near.quality.judged.value:+.2f}% (95% upper bound "
        f"{100 * near.quality.judged.upper:+.2f}%, bound {limit}{_judged_on(near)}) with "
        f"{near.config.documented()} ({kind_of(near.config)}). It is saved in "
        f"{output / NEAREST_MISS_FILE}; "
        "try a larger --max_degradation or wider --bounds."
    )


def _found(best: Measured, default: Measured | None, limit: str, top_k: int) -> str:
    assert best.speed is not None
    answer = (
        f"Fastest configuration with degradation below {limit}: "
        f"{best.speed.speedup.median:.3f}x at "
        f"{100 * best.quality.judged.value:+.2f}% perplexity (95% upper bound "
        f"{100 * best.quality.judged.upper:+.2f}%{_judged_on(best)}), "
        f"{best.quality.report.experts_per_token:.2f} of {top_k} experts per token."
    )
    if not _no_better(best, default):
        return answer
    return (
        "No improvement found: no configuration that keeps the bound is faster than the "
        f"{'baseline' if best.speed.speedup.median <= 1 else 'default'} beyond what the timings "
        f"tell apart. Baseline: perplexity {best.quality.change.baseline_perplexity:.3f}, "
        f"{best.speed.baseline_tps:,.0f} tokens/s. {answer} Try a larger --max_degradation or "
        "wider --bounds."
    )


def _judged_on(one: Measured) -> str:
    """Where the worst of several data sets is judged, which that is."""
    worst = one.quality.worst
    return "" if worst is None else f", on the worst data set, {worst.dataset}"


def _no_better(best: Measured, default: Measured | None) -> bool:
    """Whether the winner is the default, or within its timings, or slower than the baseline."""
    assert best.speed is not None
    if best.speed.speedup.median <= 1.0:
        return True
    if default is None or default.speed is None or not default.passed:
        return False
    return best.config == default.config or best.speed.speedup.median <= default.speed.speedup.high


def profile_notes(profile: RoutingProfile, space: SearchSpace) -> list[str]:
    """Say plainly where thresholds can't bite on this model."""
    stats = profile.stats
    weight = stats["frequency"].to_numpy(np.float64)
    entropy = stats["mean_entropy"].to_numpy(np.float64)

    def reach(threshold: float) -> float:
        return float(weight[entropy <= threshold].sum() / weight.sum())

    default = VARConfig().entropy_threshold
    top = float(space["entropy_threshold"]["high"]) if "entropy_threshold" in space else default
    if reach(default) >= 0.001:
        return []
    how = "never" if reach(default) == 0 else "hardly ever (below 0.1%)"
    note = (
        f"with the default entropy_threshold {default} the fast path is {how} taken on this model "
        f"(a tenth of its table entries lie below {np.quantile(entropy, 0.1):.2f} nats, of at "
        f"most {profile.head['entropy_max_nats']:.2f}); what cuts pairs here is "
        "confidence_threshold"
    )
    if reach(top) < 0.001:
        note += f", also at the search's highest entropy, {top:g}"
    return [note]


def search_notes(result: OptimizationResult, independent: bool) -> list[str]:
    """What limits the search's answer."""
    notes = []
    failed = sum(1 for one in result.evaluations if one.failed)
    if failed:
        notes.append(f"{failed} of {result.num_evaluations} evaluations failed; see all_results")
    # A search by replay evaluates near the bound on purpose, and does not converge in that sense.
    if result.method == "replay":
        if result.extra.get("stopped_early"):
            notes.append(
                f"the search ended after {result.num_evaluations} evaluations: every other point "
                "of the search space decides as one of them"
            )
    else:
        if result.num_evaluations <= CONVERGENCE_WINDOW:
            notes.append(f"{result.num_evaluations} evaluations are too few to tell convergence")
        elif not result.converged:
            notes.append(
                "the search was still improving at its end: a larger --n_calls may find more"
            )
    if not independent:
        notes.append("the text's documents are cut from one text: intervals are too narrow")
    return notes
