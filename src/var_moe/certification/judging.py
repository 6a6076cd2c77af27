"""Testing candidates on the certify part, on all text or on each data set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from var_moe.certification.inference import (
    Interval,
    MeanTest,
    below_zero,
    degradation_interval,
    excess,
    fixed_sequence,
    holm,
    with_worst,
)
from var_moe.certification.scoring import Measured, Unit, UnitScorer, join
from var_moe.evaluation.perplexity import LEAST, Groups, datasets_of, groups_of
from var_moe.evaluation.sequential import LEAST_DOCUMENTS, anytime_p_values, lower_boundary
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


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One candidate on the certify part.

    Where the claim is about each of several data sets, ``test`` and ``interval`` are those of the
    data set with the largest p.
    """

    name: str
    passed: bool
    p: float
    measured: Measured
    interval: Interval
    test: MeanTest
    by_dataset: tuple[Tested, ...] = ()  # where a claim is about each; the worst p decides
    state: str  # of a sequential test: proven, refuted, open
    sequential: bool

    def to_dict(self) -> dict[str, Any]:
        """For the certificate; in sequential mode p is the anytime-valid one."""
        found = {
            "name": self.name,
            "passed": self.passed,
            "state": self.state,
            "degradation": self.interval.value,
            "degradation_interval": [self.interval.low, self.interval.high],
            "degradation_upper": self.interval.upper,
            "units": len(self.measured.tokens),
            "documents": self.measured.documents,
            "scored_tokens": int(self.measured.tokens.sum()),
            "experts_per_token": self.measured.experts_per_token,
            "learned_pct": self.measured.learned_pct,
            **self.test.to_dict(),
        }
        if self.by_dataset:
            found["decided_by"] = worst_test(self.by_dataset).dataset
            found["by_dataset"] = [one.to_dict() for one in self.by_dataset]
        if self.sequential:
            # The fixed tests do not hold for a sample that stopped when it looked good.
            for name in ("p_t", "p_bootstrap", "p_t_plain", "normal_enough"):
                found.pop(name)
            found["p_anytime"] = self.p
        return {**found, "p": self.p}


def worst_test(tests: Sequence[Tested]) -> Tested:
    """The test that decides a claim about all of them; of equal ones the highest degradation."""
    return max(tests, key=lambda one: (one.test.p, one.interval.upper))


def look(z: NDArray[np.float64], *, alpha: float, best_at: int) -> tuple[float, str]:
    """The anytime-valid p-value of E[Z] >= 0 now, and whether this look proves or refutes.

    As in the fixed tests, the worst unit so far counts once more.
    """
    p = float(anytime_p_values(-with_worst(z), alpha=alpha, best_at=best_at)[-1])
    if p <= alpha:
        return p, PROVEN
    over = lower_boundary(z, alpha=alpha, best_at=best_at)[-1] > 0
    return p, REFUTED if over else OPEN


def judge(
    scorer: UnitScorer,
    policy: RoutingPolicy | None,
    *,
    name: str,
    bound: float,
    alpha: float,
    confidence: float,
    best_at: int | None,
) -> Verdict:
    """Test one candidate; with ``best_at``, sequentially, with looks after each chunk."""
    if best_at is None:
        found = scorer.all(policy, what=f"certifying: {name}")
        tests = judge_apart(found, scorer.judged, bound=bound, confidence=confidence, alpha=alpha)
        worst = worst_test(tests)
        p = worst.test.p
        return Verdict(
            name=name,
            passed=p <= alpha,
            p=p,
            measured=found,
            interval=worst.interval,
            test=worst.test,
            by_dataset=tuple(tests) if scorer.judged else (),
            state=PROVEN if p <= alpha else OPEN,
            sequential=False,
        )
    parts: list[Measured] = []
    p, state = 1.0, OPEN
    for number in range(scorer.chunks):
        parts.append(scorer.chunk(policy, number))
        found = join(parts)
        if scorer.evaluator.progress:
            scorer.evaluator.progress(f"certifying: {name}", number + 1, scorer.chunks)
        if len(found.tokens) < min(FIRST_LOOK, len(scorer.units)):
            continue
        now, state = look(excess(found.change, found.tokens, bound), alpha=alpha, best_at=best_at)
        p = min(p, now)
        if state != OPEN:
            break
    return Verdict(
        name=name,
        passed=state == PROVEN,
        p=p,
        measured=found,
        interval=anytime_interval(found, confidence=confidence, alpha=alpha, best_at=best_at),
        test=below_zero(excess(found.change, found.tokens, bound)),
        state=state,
        sequential=True,
    )


def anytime_interval(found: Measured, *, confidence: float, alpha: float, best_at: int) -> Interval:
    """The degradation's confidence sequence at this look: valid though the looks decided when."""
    total, n = float(found.tokens.sum()), len(found.tokens)
    ratio = float(found.change.sum()) / total
    rest = found.change - ratio * found.tokens  # has mean zero

    def half(level: float) -> float:
        if n < LEAST_DOCUMENTS:
            return float("inf")
        return -float(lower_boundary(rest, alpha=level, best_at=best_at)[-1]) * n / total

    wide = half((1 - confidence) / 2)
    return Interval(
        value=float(np.expm1(ratio)),
        low=float(np.expm1(ratio - wide)),
        high=float(np.expm1(ratio + wide)),
        upper=float(np.expm1(ratio + half(alpha))),
    )


def judge_all(
    scorer: UnitScorer,
    rows: Sequence[Mapping[str, Any]],
    policies: Mapping[str, RoutingPolicy | None],
    *,
    bound: float,
    alpha: float,
    confidence: float,
    sequential: bool,
    ordered: bool,
) -> list[Verdict]:
    """Test the candidates: in their order until one fails, or all of them by Holm.

    Args:
        rows: the candidates in their order, with the units that each needs.
    """
    verdicts: list[Verdict] = []

    def run(row: Mapping[str, Any]) -> bool:
        need = row.get("units_needed") or len(scorer.units)
        best_at = min(max(need, FIRST_LOOK), max(len(scorer.units), 2)) if sequential else None
        verdict = judge(
            scorer,
            policies[row["name"]],
            name=row["name"],
            bound=bound,
            alpha=alpha,
            confidence=confidence,
            best_at=best_at,
        )
        verdicts.append(verdict)
        return verdict.passed

    if ordered:
        fixed_sequence([partial(run, row) for row in rows])
        return verdicts
    for row in rows:
        run(row)
    passed = holm([verdict.p for verdict in verdicts], alpha)
    return [
        replace(verdict, passed=ok, state=PROVEN if ok else OPEN)
        for verdict, ok in zip(verdicts, passed, strict=True)
    ]


def learned_p(found: Measured, limit_pct: float, *, best_at: int | None, alpha: float) -> float:
    """P value of a learned share at or over the limit, with chunks of units as the units."""
    over = found.learned - limit_pct / 100 * found.decisions
    if best_at is not None:
        return float(anytime_p_values(-with_worst(over), alpha=alpha, best_at=best_at)[-1])
    return below_zero(over).p if len(over) > 1 else 1.0
