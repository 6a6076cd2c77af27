"""The data sets of a certificate's text: each judged where all must hold, or only described."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from var_moe.certification.statistics import (
    Interval,
    MeanTest,
    below_zero,
    degradation_interval,
    excess,
)
from var_moe.certification.units import Measured, Unit
from var_moe.evaluation.perplexity import LEAST, Groups, datasets_of, groups_of
from var_moe.routing.base import RoutingPolicy

if TYPE_CHECKING:
    from var_moe.evaluation.evaluator import Evaluator

WHOLE = ""
"""Name of all text, where data sets are not judged apart."""


@dataclass(frozen=True, kw_only=True)
class Tested:
    """One data set, or all text, tested: is the mean excess below zero?"""

    dataset: str
    units: int
    interval: Interval
    test: MeanTest

    def to_dict(self) -> dict[str, Any]:
        """For the certificate."""
        return {
            "dataset": self.dataset,
            "units": self.units,
            "degradation": self.interval.value,
            "degradation_interval": [self.interval.low, self.interval.high],
            "degradation_upper": self.interval.upper,
            "p": self.test.p,
        }


def judged_apart(units: Sequence[Unit], *, robust: bool) -> Groups:
    """Positions of the units of each data set that a claim must hold on; empty for the union."""
    return datasets_of([unit[0] for unit in units]) if robust else {}


def parts_of(found: Measured, judged: Groups) -> Groups:
    """Positions of the units that are tested together: of each judged data set, else of all."""
    return judged or {WHOLE: np.arange(len(found.tokens))}


def judge_apart(
    found: Measured, judged: Groups, *, bound: float, confidence: float, alpha: float
) -> list[Tested]:
    """Each judged data set's test, or that of all text.

    A claim about every data set is the intersection of theirs, and holds at alpha where each
    test passes at alpha: no correction is needed (intersection-union test, Berger 1982).
    """
    tests = []
    for name, at in parts_of(found, judged).items():
        change, tokens = found.change[at], found.tokens[at]
        tests.append(
            Tested(
                dataset=name,
                units=len(tokens),
                interval=degradation_interval(change, tokens, confidence=confidence, alpha=alpha),
                test=below_zero(excess(change, tokens, bound)),
            )
        )
    return tests


def describe_apart(
    found: Measured,
    units: Sequence[Unit],
    evaluator: Evaluator,
    policy: RoutingPolicy | None,
    *,
    confidence: float,
    alpha: float,
    judged: bool,
) -> list[dict[str, Any]]:
    """One row per data set, or source, of the units that were measured; pages are the units.

    Args:
        found: of the first units.
        units: of the text.
        evaluator: of the text; the policy runs once more on each data set for its experts.
        policy: None is the unmodified model.
        confidence, alpha: of the interval and of the one-sided upper bound.
        judged: whether each row is a part of the claim; else it only describes.
    """
    reached = list(units[: len(found.tokens)])
    rows = []
    for name, at in groups_of([unit[0] for unit in reached]).items():
        if len(at) < LEAST:
            continue
        documents = [document for i in at for document in reached[i]]
        change, tokens = found.change[at], found.tokens[at]
        interval = degradation_interval(change, tokens, confidence=confidence, alpha=alpha)
        baseline = float(found.baseline_nll[at].sum()) / int(tokens.sum())
        executed = float(evaluator.top_k)
        if policy is not None:
            part = evaluator.with_documents(documents)
            executed = part.losses(policy, what=name)[1].experts_per_token
        rows.append(
            {
                "dataset": name,
                "descriptive": not judged,
                "units": len(at),
                "documents": len(documents),
                "scored_tokens": int(tokens.sum()),
                "baseline_perplexity": math.exp(baseline),
                "perplexity": math.exp(baseline) * (1 + interval.value),
                "degradation": interval.value,
                "degradation_interval": [interval.low, interval.high],
                "degradation_upper": interval.upper,
                "experts_per_token": executed,
            }
        )
    return rows
