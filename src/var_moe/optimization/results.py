"""What an evaluation and a finished search are, and their JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from var_moe.config import VARConfig
from var_moe.errors import UsageError
from var_moe.optimization.candidate import Candidate

COMPLETE = "complete"
FAILED = "failed"
_KINDS: dict[str, Any] = {
    "params": dict,
    **dict.fromkeys(("feasible", "complete"), bool),
    **dict.fromkeys(("state", "error"), str),
}
_NEVER_NONE = ("params", "complete", "state", "seconds", "suggestion_seconds")


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
        complete: whether the whole text was scored; an evaluation that is clearly over the bound
            may end before.
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
    complete: bool = True
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

    def replace(self, **changes: Any) -> Evaluation:
        """A copy with `changes`."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; a number that JSON has no word for becomes None."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        cleaned: dict[str, Any] = jsonable(values)
        return cleaned

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "Evaluation") -> Evaluation:
        """Read what `to_dict` wrote; an unknown key is refused by name."""
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

    def replace(self, **changes: Any) -> OptimizationResult:
        """A copy with `changes`, for example a best configuration that was re-measured."""
        return dataclasses.replace(self, **changes)


def jsonable(value: Any) -> Any:
    """`value` in JSON's own types: no NaN or infinity (None instead), no numpy scalars."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, PurePath):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return jsonable(value.to_dict() if hasattr(value, "to_dict") else dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [jsonable(item) for item in value]
    # numpy and torch: scalars have .item(), arrays .tolist(); both know .tolist().
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    raise UsageError(f"{value!r} of type {type(value).__name__} cannot be written as JSON")
