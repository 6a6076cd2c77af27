"""Testing candidates on the certify part, on all text or on each data set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from var_moe.certification.inference import Interval, QualityClaim, below_zero
from var_moe.certification.scoring import Measured, Unit, UnitScorer
from var_moe.errors import UsageError
from var_moe.evaluation.perplexity import LEAST, Groups, datasets_of, groups_of
from var_moe.routing.base import RoutingPolicy

ALL_TEXT = ""
"""Key for all text together, where data sets are not tested separately."""
LEAST_UNITS = 10


@dataclass(frozen=True, kw_only=True)
class GroupTest:
    """One data set, or all text, tested: is the mean excess below zero?"""

    dataset: str
    units: int
    interval: Interval
    p_t: float
    p_bootstrap: float

    @property
    def p(self) -> float:
        """What decides: the larger p value."""
        return max(self.p_t, self.p_bootstrap)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One candidate on the certify part; of several data sets, the worst test decides."""

    name: str
    measured: Measured
    tests: Sequence[GroupTest]  # of each judged data set, or of all text
    alpha: float

    @property
    def worst(self) -> GroupTest:
        """The test that decides; of equal ones the highest degradation's."""
        return max(self.tests, key=lambda one: (one.p, one.interval.upper))

    @property
    def p(self) -> float:
        """P value of the test that decides."""
        return self.worst.p

    @property
    def passed(self) -> bool:
        """Whether the claim is shown."""
        return self.p <= self.alpha

    def to_dict(self) -> dict[str, Any]:
        """For the certificate."""
        worst, measured = self.worst, self.measured
        row = {
            "name": self.name,
            "passed": self.passed,
            **worst.interval.to_dict(),
            "units": len(measured.tokens),
            "documents": int(measured.documents.sum()),
            "scored_tokens": int(measured.tokens.sum()),
            "experts_per_token": measured.experts_per_token,
            "learned_pct": measured.learned_pct,
            "p": worst.p,
            "p_t": worst.p_t,
            "p_bootstrap": worst.p_bootstrap,
        }
        if worst.dataset != ALL_TEXT:
            row["decided_by"] = worst.dataset
            row["by_dataset"] = [
                {"dataset": one.dataset, "units": one.units, **one.interval.to_dict(), "p": one.p}
                for one in self.tests
            ]
        return row


def groups_to_test(units: Sequence[Unit], *, robust: bool, step: str) -> Groups:
    """Positions of the units that are tested together: of each data set, or of all text.

    Args:
        units: of the text.
        robust: whether a claim is made of each data set.
        step: what the text is for, for the message.

    Raises:
        UsageError: there is too little text of any.
    """
    apart = datasets_of([unit[0] for unit in units]) if robust else {}
    judged = apart or {ALL_TEXT: np.arange(len(units))}
    for name, at in judged.items():
        if len(at) < LEAST_UNITS:
            place = f" of {name!r}" if name != ALL_TEXT else ""
            raise UsageError(
                f"too few pages{place} for {step}: {len(at)}, at least {LEAST_UNITS} needed"
            )
    return judged


def judge(name: str, measured: Measured, judged: Groups, claim: QualityClaim) -> Verdict:
    """Test one candidate on each judged data set, or on all text.

    A claim about every data set is the intersection of theirs, and holds at alpha where each
    test passes at alpha: no correction is needed (intersection-union test, Berger 1982).
    """
    tests = []
    for dataset, at in judged.items():
        units = measured.change[at], measured.tokens[at]
        p_t, p_bootstrap = below_zero(claim.excess(*units))
        tests.append(
            GroupTest(
                dataset=dataset,
                units=len(at),
                interval=claim.interval(*units),
                p_t=p_t,
                p_bootstrap=p_bootstrap,
            )
        )
    return Verdict(name=name, measured=measured, tests=tests, alpha=claim.alpha)


def judge_in_order(
    scorer: UnitScorer,
    policies: Mapping[str, RoutingPolicy | None],
    order: Sequence[str],
    judged: Groups,
    claim: QualityClaim,
) -> list[Verdict]:
    """Test the candidates in their order, each at the full level, until one fails.

    A false certificate needs the rejection of the first true null hypothesis in the order, which
    happens with probability at most alpha (Maurer, Hothorn and Lehmacher 1995).
    The order must not depend on the text that is tested on.
    """
    verdicts: list[Verdict] = []
    for name in order:
        measured = scorer.measure(policies[name], what=f"certifying: {name}")
        verdicts.append(judge(name, measured, judged, claim))
        if not verdicts[-1].passed:
            break
    return verdicts


def describe_apart(
    measured: Measured, units: Sequence[Unit], claim: QualityClaim, *, robust: bool
) -> list[dict[str, Any]]:
    """One row per data set, or source, of the certify part; with ``robust`` it is claimed."""
    rows = []
    for name, at in groups_of([unit[0] for unit in units]).items():
        if len(at) < LEAST:
            continue
        tokens = measured.tokens[at]
        interval = claim.interval(measured.change[at], tokens)
        baseline = math.exp(float(measured.baseline_nll[at].sum()) / int(tokens.sum()))
        rows.append(
            {
                "dataset": name,
                "descriptive": not robust,
                "units": len(at),
                "documents": int(measured.documents[at].sum()),
                "scored_tokens": int(tokens.sum()),
                "baseline_perplexity": baseline,
                "perplexity": baseline * (1 + interval.value),
                **interval.to_dict(),
            }
        )
    return rows


def learned_p(measured: Measured, limit_pct: float) -> float:
    """P value of H0: learned share >= limit. The sampling units are chunks of pages."""
    over = measured.learned - limit_pct / 100 * measured.decisions
    return max(below_zero(over)) if len(over) > 1 else 1.0
