"""What a certificate is asked to state, and how."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from var_moe.config import check_count, check_seed
from var_moe.errors import UsageError
from var_moe.evaluation.evaluator import SpeedSetting
from var_moe.optimization.objective_protocol import check_bound

AT_MOST_CANDIDATES = 10
JUDGED_ON = ("certify", "test")


@dataclass(frozen=True, kw_only=True)
class CertifySettings:
    """What is certified, and how.

    Args:
        max_degradation: the bound on the relative perplexity change.
        alpha: probability that any of the certificate's claims is wrong.
        sequential: units stream in until a claim is proven or refuted.
        ordered: candidates are ordered on the ordering part and tested in that order; else Holm.
        robust: claim it of each of several data sets, not of their union.
        candidates: how many are frozen at the most.
        max_learned_pct: also claim that the router decides a smaller share than this.
        blocks: timed blocks per arm for the speedup; 0 claims none.
        ordering_samples: documents of the ordering part that are scored.
        max_samples: documents of the certify part, a seeded sample; None takes all.
        split: the certify part.
        seed: of the units' order and of samples.
        setting: batch that throughput is measured on.

    Raises:
        UsageError: a value out of its range; names it.
    """

    max_degradation: float = 0.01
    alpha: float = 0.05
    sequential: bool = False
    ordered: bool = True
    robust: bool = False
    candidates: int = AT_MOST_CANDIDATES
    max_learned_pct: float | None = None
    blocks: int = 20
    ordering_samples: int = 300
    max_samples: int | None = None
    split: str = "certify"
    seed: int = 0
    setting: SpeedSetting = field(default_factory=SpeedSetting)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if check_bound(self.max_degradation) == 0:
            raise UsageError(
                "max_degradation = 0: expected more than 0; that a loss is not one bit higher "
                "can't be certified from a sample of text"
            )
        if not (math.isfinite(self.alpha) and 0 < self.alpha < 0.5):
            raise UsageError(f"alpha = {self.alpha}: expected a number in (0, 0.5)")
        if not 1 <= self.candidates <= AT_MOST_CANDIDATES:
            raise UsageError(
                f"candidates = {self.candidates}: expected an integer in [1, {AT_MOST_CANDIDATES}]"
            )
        share = self.max_learned_pct
        if share is not None and not 0 < share <= 100:
            raise UsageError(f"max_learned_pct = {share}: expected a number in (0, 100]")
        for name, least in (("blocks", 0), ("ordering_samples", 2), ("max_samples", 2)):
            check_count(name, getattr(self, name), least)
        if self.split not in JUDGED_ON:
            raise UsageError(
                f"split {self.split!r}: expected {' or '.join(JUDGED_ON)}; the others were tuned on"
            )
        if self.sequential and not self.ordered:
            raise UsageError("--sequential needs an order of the candidates: leave --unordered out")
        if self.sequential and self.robust:
            raise UsageError("--sequential decides on all text: leave --robust out")

    def to_dict(self) -> dict[str, Any]:
        """For result files and the frozen study's hash."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        if not self.robust:  # as before there was a choice: frozen studies keep their hash
            values.pop("robust")
        return {**values, "setting": self.setting.to_dict()}
