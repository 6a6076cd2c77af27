"""What an evaluation and a finished search are, and the files of a search."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from var_moe.config import VARConfig
from var_moe.errors import UsageError
from var_moe.optimization.candidate import Candidate
from var_moe.storage import (
    SCHEMA_VERSION,
    atomic_write_json,
    atomic_write_text,
    check_output_folder,
    jsonable,
    provenance,
)
from var_moe.terminal import duration

LEARNED_TARGET_PCT = 15.0
INFEASIBLE_PENALTY = -100.0

COMPLETE = "complete"
FAILED = "failed"
# What is no number, and what is never None.
_KINDS = {"params": dict, "feasible": bool, "state": str, "error": str}
_NEVER_NONE = ("params", "state", "seconds", "suggestion_seconds")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One configuration, evaluated. What a bare callable cannot know is None.

    Args:
        params: the point, by name.
        score: the documented score; None when the evaluation failed.
        degradation: PPL(VAR) / PPL(baseline) - 1.
        degradation_se: its standard error over documents.
        speedup: measured throughput over the baseline's; None where it was not measured.
        predicted_speedup: what the executed pairs predict.
        perplexity: of the configuration, on the search's text.
        throughput_tps: tokens per second.
        fast_pct, cached_pct, learned_pct: share of each tier in percent.
        cache_hit_rate: of all look-ups.
        experts_per_token: executed pairs / (layers x tokens).
        feasible: whether the degradation is within the bound; None without a bound.
        state: ``"complete"`` or ``"failed"``.
        error: why it failed, in one line.
        seconds: wall time of the evaluation; the search fills it in.
        suggestion_seconds: the sampler's own time to choose the point.
    """

    params: dict[str, Any]
    score: float | None = None
    degradation: float | None = None
    degradation_se: float | None = None
    speedup: float | None = None
    predicted_speedup: float | None = None
    perplexity: float | None = None
    throughput_tps: float | None = None
    fast_pct: float | None = None
    cached_pct: float | None = None
    learned_pct: float | None = None
    cache_hit_rate: float | None = None
    experts_per_token: float | None = None
    feasible: bool | None = None
    state: str = COMPLETE
    error: str | None = None
    seconds: float = 0.0
    suggestion_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.state not in (COMPLETE, FAILED):
            raise UsageError(
                f"Evaluation.state = {self.state!r}: expected {COMPLETE!r} or {FAILED!r}"
            )

    @property
    def failed(self) -> bool:
        """Whether there is no usable result."""
        return self.state == FAILED

    @property
    def eligible(self) -> bool:
        """Whether it may win: complete, and not known to break the bound."""
        return not self.failed and self.score is not None and self.feasible is not False

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; a number that JSON has no word for becomes None."""
        values = {**dataclasses.asdict(self), "complete": True}  # the whole text was scored
        return dict(jsonable(values))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "Evaluation") -> Evaluation:
        """Read what `to_dict` wrote.

        Raises:
            UsageError: a key is unknown, or a value of another kind; names it.
        """
        values = {name: value for name, value in values.items() if name != "complete"}
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown or "params" not in values:
            problem = f"unknown field {unknown[0]!r}" if unknown else "no 'params'"
            raise UsageError(f"{source}: {problem}; an evaluation has {', '.join(known)}")
        for name, value in values.items():
            if not _is_of_kind(name, value):
                raise UsageError(f"{source}: {name} = {value!r} is no such entry of an evaluation")
        return cls(**values)


def _is_of_kind(name: str, value: Any) -> bool:
    if value is None:
        return name not in _NEVER_NONE
    if name in _KINDS:
        return isinstance(value, _KINDS[name])
    return isinstance(value, int | float) and type(value) is not bool and abs(value) < math.inf


@dataclass(frozen=True, kw_only=True)
class OptimizationResult:
    """A finished search.

    Args:
        best_params: the best feasible configuration, or the default one where nothing is
            feasible; a plain dict for a search space that is not VARConfig's.
        best_score: its score; where nothing is feasible the highest one seen, which is
            negative; NaN (null in JSON) where every evaluation failed.
        optimization_time: seconds, those of the runs that this one resumed included.
        evaluations: all of them, in order.
        converged: no feasible gain above 0.5% in the last 10 evaluations.
        method: ``"bayesian"``, ``"random"`` or ``"grid"``.
        seed: the one that was used.
        max_degradation: the objective's bound, if it has one.
        extra: JSON values: ``suggestion_seconds`` (the sampler's own time, summed),
            ``total`` (evaluations planned), ``failed``, ``resumed`` (evaluations taken over
            from earlier runs), ``stopped_early``, and ``nearest_miss`` (the evaluation with
            the smallest degradation) where nothing is feasible.
    """

    best_params: VARConfig | Candidate | dict[str, Any]
    best_score: float
    optimization_time: float
    evaluations: tuple[Evaluation, ...]
    converged: bool
    method: str = "bayesian"
    seed: int | None = None
    max_degradation: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def all_results(self) -> list[dict[str, Any]]:
        """Every evaluation as a dict: ``[{"params": {...}, "score": ..., ...}]``."""
        return [evaluation.to_dict() for evaluation in self.evaluations]

    @property
    def num_evaluations(self) -> int:
        """How many evaluations there are, failed ones included."""
        return len(self.evaluations)


def documented_score(
    *, degradation: float, max_degradation: float, speedup: float | None, learned_pct: float
) -> float:
    """The documented score of a configuration.

    ``-100 * (1 + degradation)`` over the bound, else ``speedup + max(0, (15 - learned_pct) /
    100)``; `speedup` is not looked at over the bound.
    """
    if not degradation <= max_degradation:
        return INFEASIBLE_PENALTY * (1 + degradation)
    if speedup is None:
        raise ValueError("documented_score: a feasible configuration needs its speedup")
    return speedup + max(0.0, (LEARNED_TARGET_PCT - learned_pct) / 100)


CONFIG_FILE = "best_config.json"
RESULTS_FILE = "optimization_results.json"
METADATA_FILE = "optimization_metadata.json"
SUMMARY_FILE = "optimization_summary.txt"
NEAREST_MISS_FILE = "nearest_miss.json"
UNFINISHED = "unfinished"
"""In a result's `extra`: why its best was not measured again, so that there is none to save."""


def save_optimization_results(
    result: OptimizationResult,
    dir: str | Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    summary: str | None = None,
) -> None:
    """Write a search's files into the folder `dir`, each whole or not at all.

    ``best_config.json``, ``optimization_results.json``, ``optimization_metadata.json`` and
    ``optimization_summary.txt``. Where nothing was feasible, ``nearest_miss.json`` takes the
    place of ``best_config.json``; where every evaluation failed there is neither. One that an
    earlier search left is removed. A number that JSON has no word for (NaN) becomes null.

    Args:
        result: the search.
        dir: folder, created if needed.
        metadata: further entries of the metadata, over those that are always there.
        summary: text of the summary; a short one by default.

    Raises:
        UsageError: `dir` is a file or cannot be written.
    """
    folder = check_output_folder(dir)
    origin = provenance()
    best = result.best_params
    config = jsonable(best) if isinstance(best, dict) else best.to_dict()
    failed = bool(result.evaluations) and all(one.failed for one in result.evaluations)
    has_best = not failed and not {"nearest_miss", UNFINISHED} & set(result.extra)
    atomic_write_json(
        folder / RESULTS_FILE,
        {
            "schema_version": SCHEMA_VERSION,
            "best_score": jsonable(result.best_score),
            "best_params": config if has_best else None,
            "optimization_time": jsonable(result.optimization_time),
            "num_evaluations": result.num_evaluations,
            "converged": result.converged,
            "method": result.method,
            "seed": result.seed,
            "all_results": result.all_results,
            "provenance": origin,
        },
    )
    atomic_write_json(
        folder / METADATA_FILE,
        jsonable(
            {
                "schema_version": SCHEMA_VERSION,
                "method": result.method,
                "seed": result.seed,
                "max_degradation": result.max_degradation,
                "search": result.extra,
                "provenance": origin,
                **(metadata or {}),
            }
        ),
    )
    atomic_write_text(folder / SUMMARY_FILE, summary or default_summary(result))
    for name, values in (
        (CONFIG_FILE, config if has_best else None),
        (NEAREST_MISS_FILE, None if has_best else result.extra.get("nearest_miss")),
    ):
        if values is None:
            (folder / name).unlink(missing_ok=True)
        else:
            atomic_write_json(folder / name, jsonable(values))


def default_summary(result: OptimizationResult) -> str:
    """A few lines for people about a search of any objective."""
    best = result.best_params
    params = best if isinstance(best, dict) else best.documented()
    failed = sum(e.failed for e in result.evaluations)
    if UNFINISHED in result.extra:
        end = f"Not finished, so no best_config.json: {result.extra[UNFINISHED]}"
    elif failed and failed == len(result.evaluations):
        end = "Every evaluation failed; no best_config.json"
    elif "nearest_miss" in result.extra:
        end = (
            "All configurations violate the constraint; no best_config.json. Smallest "
            f"degradation: {result.extra['nearest_miss']['degradation']:.2%} ({NEAREST_MISS_FILE})"
        )
    else:
        end = "\n  ".join(["best parameters:", *(f"{key} = {params[key]}" for key in params)])
    return (
        f"{result.method} search, seed {result.seed}\n"
        f"{result.num_evaluations} evaluations ({failed} failed) in "
        f"{duration(result.optimization_time)}\n"
        f"best score: {result.best_score:.6g}\n"
        f"converged: {'yes' if result.converged else 'no'}\n"
        f"{end}\n"
    )
