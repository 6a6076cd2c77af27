"""Studies of certificates on populations whose truth is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from benchmarks.certification.population import (
    POPULATIONS,
    POWER_OF,
    STRESS,
    Floats,
    Recorded,
    draw,
)
from scipy import stats

from var_moe.certification.inference import bootstrap_p_value, fixed_sequence, t_p_value, with_worst
from var_moe.certification.judging import FIRST_LOOK
from var_moe.certification.scoring import CHUNK_UNITS
from var_moe.evaluation.sequential import margin

BOUND = 0.01


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is simulated.

    Args:
        studies: per row.
        pages: certify parts' sizes.
        resamples: of each bootstrap.
        alpha: promised error rate.
        seed: of everything.
    """

    studies: int = 1000
    pages: tuple[int, ...] = (150, 300, 667)
    resamples: int = 999
    alpha: float = 0.05
    seed: int = 20


def fixed_p(z: Floats, resamples: int) -> dict[str, Floats]:
    """P values of each study: either test alone, and as certificates decide. (studies,)"""
    worst = with_worst(z)
    guarded = np.maximum(t_p_value(worst), bootstrap_p_value(worst, resamples=resamples))
    return {
        "t": t_p_value(z),
        "bootstrap": bootstrap_p_value(z, resamples=resamples),
        "fixed": guarded,
    }


def sequential(z: Floats, alpha: float, *, best_at: int) -> tuple[Floats, Floats]:
    """Whether each study is proven at any look, and after how many units. (studies,) each

    The looks of `judging.judge`, for all studies at once.
    """
    units, studies = z.shape
    proven, stopped = np.zeros(studies, dtype=bool), np.full(studies, float(units))
    refuted = np.zeros(studies, dtype=bool)
    sums, squares = np.cumsum(z, axis=0), np.cumsum(np.square(z), axis=0)
    worst = np.maximum.accumulate(z, axis=0)
    for n in looks(units):
        open_now = ~(proven | refuted)
        add = worst[n - 1]
        mean, deviation = _moments(sums[n - 1] + add, squares[n - 1] + add**2, n + 1)
        wide = margin(n + 1, alpha=alpha, best_at=best_at)
        now = open_now & (-mean > deviation * wide)
        mean, deviation = _moments(sums[n - 1], squares[n - 1], n)
        wide = margin(n, alpha=alpha, best_at=best_at)
        over = open_now & ~now & (mean > deviation * wide)
        stopped[now | over] = n
        proven |= now
        refuted |= over
    return proven, stopped


def looks(units: int) -> list[int]:
    """After how many units a sequential certificate looks."""
    ends = [*range(CHUNK_UNITS, units, CHUNK_UNITS), units]
    return [n for n in ends if n >= min(FIRST_LOOK, units)]


def _moments(total: Floats, squares: Floats, n: int) -> tuple[Floats, Floats]:
    mean = total / n
    return mean, np.sqrt(np.maximum(squares / n - mean**2, 0.0) * n / (n - 1))


def rate(certified: Any) -> dict[str, Any]:
    """A share of studies with its exact binomial 95% interval."""
    count, n = int(np.sum(certified)), len(certified)
    low, high = stats.binomtest(count, n).proportion_ci(0.95, method="exact")
    return {"rate": count / n, "low": float(low), "high": float(high)}


def false_certifications(recorded: Recorded, plan: Plan) -> list[dict[str, Any]]:
    """At exactly the bound: how often each way certifies what is not below it."""
    dice = np.random.default_rng(plan.seed)
    rows = []
    for name in (*POPULATIONS, *STRESS):
        for pages in plan.pages:
            z = draw(
                recorded,
                name,
                pages=pages,
                studies=plan.studies,
                truth=BOUND,
                bound=BOUND,
                dice=dice,
            )
            row: dict[str, Any] = {"population": name, "pages": pages, "stress": name in STRESS}
            for way, p in fixed_p(z, plan.resamples).items():
                row[way] = rate(p <= plan.alpha)
            row["sequential"] = rate(sequential(z, plan.alpha, best_at=_best_at(pages))[0])
            row["naive"] = rate(z.mean(axis=0) < 0)
            rows.append(row)
    return rows


def _best_at(pages: int) -> int:
    return max(FIRST_LOOK, pages // 2)


def power(
    recorded: Recorded, plan: Plan, truths: Sequence[float] = (0.003, 0.005, 0.008)
) -> list[dict[str, Any]]:
    """Below the bound: how often a certificate is given, and how early in sequential mode."""
    dice = np.random.default_rng(plan.seed + 1)
    rows = []
    for name in POWER_OF:
        for pages in plan.pages:
            for truth in truths:
                z = draw(
                    recorded,
                    name,
                    pages=pages,
                    studies=plan.studies,
                    truth=truth,
                    bound=BOUND,
                    dice=dice,
                )
                proven, stopped = sequential(z, plan.alpha, best_at=_best_at(pages))
                rows.append(
                    {
                        "population": name,
                        "pages": pages,
                        "truth": truth,
                        "fixed": rate(fixed_p(z, plan.resamples)["fixed"] <= plan.alpha),
                        "t": rate(t_p_value(z) <= plan.alpha),
                        "sequential": rate(proven),
                        "median_pages": float(np.median(stopped)),
                    }
                )
    return rows


def best_of_many(recorded: Recorded, plan: Plan, *, tries: int = 50) -> list[dict[str, Any]]:
    """Tuning and judging on one text against a certificate, with no configuration below the bound.

    All ``tries`` configurations have a ratio of exactly the bound. Their residuals are random
    mixtures of the recorded policies', so that they are as alike as configurations of one search
    are. Naive: the best of them is said to be below the bound when its measured degradation is.
    Certificate: the ten best on one text, in the order found there, by the fixed sequence on as
    much other text.
    """
    dice = np.random.default_rng(plan.seed + 2)
    tokens = recorded.by_page(recorded.tokens)
    table = np.stack([recorded.by_page(recorded.residuals(name)) for name in recorded.change])
    table /= table.std(axis=1, keepdims=True)
    rows = []
    for pages in plan.pages:
        naive, alone, certified = [], [], []
        for _ in range(plan.studies):
            mixture = dice.dirichlet(np.full(len(table), 0.3), size=tries) @ table
            first, second = (dice.integers(len(tokens), size=pages) for _ in range(2))
            tuned = mixture[:, first].mean(axis=1)  # (tries,)
            naive.append(tuned.min() < 0)
            alone.append(tuned[0] < 0)
            order = np.argsort(tuned)[:10]
            certified.append(_sequence_errs(mixture[order][:, second], plan))
        rows.append(
            {
                "pages": pages,
                "tries": tries,
                "naive_best": rate(naive),
                "naive_single": rate(alone),
                "certificate": rate(certified),
            }
        )
    return rows


def _sequence_errs(z: Floats, plan: Plan) -> bool:
    """Whether a fixed sequence certifies any of these. (candidates, pages)"""

    def test(row: Floats) -> Callable[[], bool]:
        return lambda: bool(fixed_p(row, plan.resamples)["fixed"] <= plan.alpha)

    return any(fixed_sequence([test(row) for row in z]))


def units_matter(recorded: Recorded, plan: Plan, name: str) -> dict[str, Any]:
    """Documents in place of pages as units, at exactly the bound, on whole pages."""
    dice = np.random.default_rng(plan.seed + 3)
    residual = recorded.residuals(name)
    members = [np.flatnonzero(recorded.page == page) for page in range(recorded.page.max() + 1)]
    by_document, by_page = [], []
    for _ in range(plan.studies):
        drawn = dice.integers(len(members), size=plan.pages[-1])
        z = residual[np.concatenate([members[page] for page in drawn])]
        pages = recorded.by_page(residual)[drawn]
        by_document.append(t_p_value(with_worst(z)) <= plan.alpha)
        by_page.append(t_p_value(with_worst(pages)) <= plan.alpha)
    return {
        "population": name,
        "pages": plan.pages[-1],
        "documents_as_units": rate(by_document),
        "pages_as_units": rate(by_page),
    }


def simulate(recorded: Recorded, plan: Plan) -> dict[str, Any]:
    """Everything."""
    return {
        "bound": BOUND,
        "alpha": plan.alpha,
        "studies": plan.studies,
        "false_certifications": false_certifications(recorded, plan),
        "power": power(recorded, plan),
        "best_of_many": best_of_many(recorded, plan),
        "units": [units_matter(recorded, plan, name) for name in ("top_p_0.80", "verified_0.80")],
    }
