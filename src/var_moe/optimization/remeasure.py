"""The large measurement after the search: who wins is decided here, on text not searched on.

Candidates are taken fastest first. On the ordering half of validation each must keep the
bound with the one-sided 95% upper bound of its degradation, not with its point estimate;
those that do are timed with more blocks. The fastest of them wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from var_moe.config import VARConfig
from var_moe.evaluation.compare import Evaluator, Quality, Speed
from var_moe.optimization.objective import VARObjective
from var_moe.optimization.objective_protocol import documented_score
from var_moe.optimization.results import Evaluation
from var_moe.optimization.selection import pace

ENOUGH_PASSED = 2


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A configuration measured again, on more text and with more blocks."""

    name: str
    config: VARConfig
    quality: Quality
    speed: Speed | None  # None where the bound is broken: it can't win
    max_degradation: float

    @property
    def passed(self) -> bool:
        """Whether the upper bound of the degradation is below the limit."""
        return self.quality.change.upper < self.max_degradation

    @property
    def score(self) -> float:
        """The documented score of this measurement."""
        return documented_score(
            degradation=self.quality.change.value,
            max_degradation=self.max_degradation,
            speedup=self.speed.speedup.median if self.speed else 0.0,
            learned_pct=self.quality.report.learned_pct,
        )

    def to_dict(self) -> dict[str, Any]:
        """For result files."""
        return {
            "name": self.name,
            "config": self.config.to_dict(),
            "passed": self.passed,
            **self.quality.to_dict(),
            **(self.speed.to_dict() if self.speed else {"speedup": None}),
        }


def measure(
    evaluator: Evaluator,
    objective: VARObjective,
    config: VARConfig,
    *,
    name: str,
    blocks: int,
    always_time: bool = False,
) -> Measured:
    """Measure one configuration: quality first, throughput where it keeps the bound."""
    quality = evaluator.quality(objective.policy(config), what=f"{name}: perplexity")
    passed = quality.change.upper < objective.max_degradation
    speed = None
    if passed or always_time:
        speed = evaluator.speed(objective.policy(config), blocks=blocks)
    return Measured(
        name=name,
        config=config,
        quality=quality,
        speed=speed,
        max_degradation=objective.max_degradation,
    )


def remeasure(
    evaluator: Evaluator,
    objective: VARObjective,
    candidates: Sequence[Evaluation],
    *,
    blocks: int,
    at_most: int,
    on_measured: Callable[[Measured], None] | None = None,
) -> list[Measured]:
    """Measure candidates, fastest first, until two keep the bound or `at_most` are done."""
    done: list[Measured] = []
    for candidate in sorted(candidates, key=pace, reverse=True)[:at_most]:
        found = measure(
            evaluator,
            objective,
            objective.config(candidate.params),
            name=f"candidate {len(done) + 1}",
            blocks=blocks,
        )
        done.append(found)
        if on_measured:
            on_measured(found)
        if sum(one.passed for one in done) >= ENOUGH_PASSED:
            break
    return done


def winner(measured: Sequence[Measured]) -> Measured | None:
    """The fastest that keeps the bound; None where none does."""
    passed = [one for one in measured if one.passed and one.speed]
    return max(passed, key=lambda one: one.speed.speedup.median if one.speed else 0, default=None)
