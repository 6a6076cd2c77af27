"""Testing candidates on the certify part, on all text or on each data set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from var_moe.certification.inference import (
    Floats,
    Interval,
    MeanTest,
    QualityClaim,
    below_zero,
    fixed_sequence,
    holm,
    with_worst,
)
from var_moe.certification.scoring import Measured, Unit, UnitScorer
from var_moe.evaluation.perplexity import LEAST, Groups, datasets_of, groups_of, log_ratio
from var_moe.evaluation.sequential import anytime_p_value, lower_bound
from var_moe.routing.base import RoutingPolicy

if TYPE_CHECKING:
    from var_moe.evaluation.evaluator import Evaluator


WHOLE = ""
"""Name of all text, where data sets are not judged apart."""
FIRST_LOOK = 50
"""Units before a sequential test's first look: its validity is asymptotic."""
PROVEN, REFUTED, OPEN = "proven", "refuted", "open"


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
            **self.interval.to_dict(),
            "p": self.test.p,
        }


def judged_apart(units: Sequence[Unit], *, robust: bool) -> Groups:
    """Positions of the units of each data set that a claim must hold on; empty for the union."""
    return datasets_of([unit[0] for unit in units]) if robust else {}


def parts_of(measured: Measured, judged: Groups) -> Groups:
    """Positions of the units that are tested together: of each judged data set, else of all."""
    return judged or {WHOLE: np.arange(len(measured.tokens))}


def judge_apart(measured: Measured, judged: Groups, claim: QualityClaim) -> list[Tested]:
    """Each judged data set's test, or that of all text.

    A claim about every data set is the intersection of theirs, and holds at alpha where each
    test passes at alpha: no correction is needed (intersection-union test, Berger 1982).
    """
    tests = []
    for name, at in parts_of(measured, judged).items():
        units = measured.change[at], measured.tokens[at]
        test = below_zero(claim.excess(*units))
        tests.append(
            Tested(dataset=name, units=len(at), interval=claim.interval(*units), test=test)
        )
    return tests


def describe_apart(
    measured: Measured,
    units: Sequence[Unit],
    evaluator: Evaluator,
    policy: RoutingPolicy | None,
    claim: QualityClaim,
    *,
    judged: bool,
) -> list[dict[str, Any]]:
    """One row per data set, or source, of the units that were measured; pages are the units.

    Args:
        measured: of the first units.
        units: of the text.
        evaluator: of the text; the policy runs once more on each data set for its experts.
        policy: None is the unmodified model.
        claim: gives the levels of the intervals.
        judged: whether each row is a part of the claim; else it only describes.
    """
    reached = list(units[: len(measured.tokens)])
    rows = []
    for name, at in groups_of([unit[0] for unit in reached]).items():
        if len(at) < LEAST:
            continue
        documents = [document for i in at for document in reached[i]]
        tokens = measured.tokens[at]
        interval = claim.interval(measured.change[at], tokens)
        baseline = math.exp(float(measured.baseline_nll[at].sum()) / int(tokens.sum()))
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
                "baseline_perplexity": baseline,
                "perplexity": baseline * (1 + interval.value),
                **interval.to_dict(),
                "experts_per_token": executed,
            }
        )
    return rows


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One candidate on the certify part; of several data sets, the worst test decides."""

    name: str
    measured: Measured
    tests: Sequence[Tested]  # of each judged data set, or of all text
    p: float
    state: str  # proven, open; of a sequential test also refuted
    sequential: bool = False

    @property
    def passed(self) -> bool:
        """Whether the claim is shown."""
        return self.state == PROVEN

    @property
    def worst(self) -> Tested:
        """The test that decides."""
        return worst_test(self.tests)

    def to_dict(self) -> dict[str, Any]:
        """For the certificate; in sequential mode p is the anytime-valid one."""
        worst, measured = self.worst, self.measured
        row = {
            "name": self.name,
            "passed": self.passed,
            "state": self.state,
            **worst.interval.to_dict(),
            "units": len(measured.tokens),
            "documents": int(measured.documents.sum()),
            "scored_tokens": int(measured.tokens.sum()),
            "experts_per_token": measured.experts_per_token,
            "learned_pct": measured.learned_pct,
            **worst.test.to_dict(),
        }
        if worst.dataset != WHOLE:
            row["decided_by"] = worst.dataset
            row["by_dataset"] = [one.to_dict() for one in self.tests]
        if self.sequential:
            # The fixed tests do not hold for a sample that stopped when it looked good.
            del row["p_t"], row["p_bootstrap"]
            row["p_anytime"] = self.p
        return {**row, "p": self.p}


def worst_test(tests: Sequence[Tested]) -> Tested:
    """The test that decides a claim about all of them; of equal ones the highest degradation."""
    return max(tests, key=lambda one: (one.test.p, one.interval.upper))


def look(z: Floats, *, alpha: float, best_at: int) -> tuple[float, str]:
    """The anytime-valid p-value of E[Z] >= 0 now, and whether this look proves or refutes.

    As in the fixed tests, the worst unit so far counts once more.
    """
    p = anytime_p_value(-with_worst(z), alpha=alpha, best_at=best_at)
    if p <= alpha:
        return p, PROVEN
    over = lower_bound(z, alpha=alpha, best_at=best_at) > 0
    return p, REFUTED if over else OPEN


def judge(
    scorer: UnitScorer,
    policy: RoutingPolicy | None,
    claim: QualityClaim,
    *,
    name: str,
    best_at: int,
) -> Verdict:
    """Test one candidate.

    Args:
        scorer: of the certify part.
        policy: None is the unmodified model.
        claim: what is tested; a sequential one with a look after each chunk.
        name: the candidate's.
        best_at: number of units at which a sequential test is to be sharpest.
    """
    what = f"certifying: {name}"
    if not claim.sequential:
        measured = scorer.all(policy, what=what)
        tests = judge_apart(measured, scorer.judged, claim)
        p = worst_test(tests).test.p
        state = PROVEN if p <= claim.alpha else OPEN
        return Verdict(name=name, measured=measured, tests=tests, p=p, state=state)
    p, state = 1.0, OPEN
    for measured in scorer.growing(policy, what=what):
        z = claim.excess(measured.change, measured.tokens)
        if len(z) < min(FIRST_LOOK, len(scorer.units)):
            continue
        now, state = look(z, alpha=claim.alpha, best_at=best_at)
        p = min(p, now)
        if state != OPEN:
            break
    interval = anytime_interval(measured, claim, best_at=best_at)
    test = Tested(dataset=WHOLE, units=len(z), interval=interval, test=below_zero(z))
    return Verdict(name=name, measured=measured, tests=[test], p=p, state=state, sequential=True)


def anytime_interval(measured: Measured, claim: QualityClaim, *, best_at: int) -> Interval:
    """The degradation's confidence sequence at this look: valid though the looks decided when."""
    ratio, rest, _ = log_ratio(measured.change, measured.tokens)

    def half(level: float) -> float:
        mean = -lower_bound(rest, alpha=level, best_at=best_at)  # of residuals, whose mean is zero
        return mean * len(rest) / float(measured.tokens.sum())

    return Interval.around(ratio, half((1 - claim.confidence) / 2), half(claim.alpha))


def judge_all(
    scorer: UnitScorer,
    rows: Sequence[Mapping[str, Any]],
    policies: Mapping[str, RoutingPolicy | None],
    claim: QualityClaim,
    *,
    ordered: bool,
) -> list[Verdict]:
    """Test the candidates: in their order until one fails, or all of them by Holm.

    Args:
        rows: the candidates in their order, with the units that each needs.
    """
    verdicts: list[Verdict] = []
    most = max(len(scorer.units), 2)

    def run(row: Mapping[str, Any]) -> bool:
        name, need = row["name"], row.get("units_needed") or most
        best_at = min(max(need, FIRST_LOOK), most)
        verdicts.append(judge(scorer, policies[name], claim, name=name, best_at=best_at))
        return verdicts[-1].passed

    if ordered:
        fixed_sequence([partial(run, row) for row in rows])
        return verdicts
    for row in rows:
        run(row)
    passed = holm([verdict.p for verdict in verdicts], claim.alpha)
    return [
        replace(verdict, state=PROVEN if ok else OPEN)
        for verdict, ok in zip(verdicts, passed, strict=True)
    ]


def learned_p(measured: Measured, limit_pct: float, *, sequential: bool, alpha: float) -> float:
    """P value of a learned share at or over the limit, with chunks of units as the units."""
    over = measured.learned - limit_pct / 100 * measured.decisions
    if sequential:
        return anytime_p_value(-with_worst(over), alpha=alpha, best_at=len(over))
    return below_zero(over).p if len(over) > 1 else 1.0
