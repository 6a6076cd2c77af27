"""Studies of certificates on populations whose truth is known."""

from __future__ import annotations

from collections.abc import Sequence
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

from var_moe.certification.inference import bootstrap_p_value, t_p_value, with_worst

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


def rate(certified: Any) -> dict[str, Any]:
    """A share of studies with its exact binomial 95% interval."""
    count, n = int(np.sum(certified)), len(certified)
    low, high = stats.binomtest(count, n).proportion_ci(0.95, method="exact")
    return {"rate": count / n, "low": float(low), "high": float(high)}


def false_certifications(recorded: Recorded, plan: Plan) -> list[dict[str, Any]]:
    """At exactly the bound: how often each way certifies what is not below it."""
    rng = np.random.default_rng(plan.seed)
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
                rng=rng,
            )
            row: dict[str, Any] = {"population": name, "pages": pages, "stress": name in STRESS}
            for way, p in fixed_p(z, plan.resamples).items():
                row[way] = rate(p <= plan.alpha)
            row["naive"] = rate(z.mean(axis=0) < 0)
            rows.append(row)
    return rows


def power(
    recorded: Recorded, plan: Plan, truths: Sequence[float] = (0.003, 0.005, 0.008)
) -> list[dict[str, Any]]:
    """Below the bound: how often a certificate is given."""
    rng = np.random.default_rng(plan.seed + 1)
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
                    rng=rng,
                )
                rows.append(
                    {
                        "population": name,
                        "pages": pages,
                        "truth": truth,
                        "fixed": rate(fixed_p(z, plan.resamples)["fixed"] <= plan.alpha),
                        "t": rate(t_p_value(z) <= plan.alpha),
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
    rng = np.random.default_rng(plan.seed + 2)
    tokens = recorded.by_page(recorded.tokens)
    table = np.stack([recorded.by_page(recorded.residuals(name)) for name in recorded.change])
    table /= table.std(axis=1, keepdims=True)
    rows = []
    for pages in plan.pages:
        naive, alone, certified = [], [], []
        for _ in range(plan.studies):
            mixture = rng.dirichlet(np.full(len(table), 0.3), size=tries) @ table
            first, second = (rng.integers(len(tokens), size=pages) for _ in range(2))
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
    """Whether a fixed sequence certifies any of these: its first. (candidates, pages)"""
    return bool(fixed_p(z[0], plan.resamples)["fixed"] <= plan.alpha)


def units_matter(recorded: Recorded, plan: Plan, name: str) -> dict[str, Any]:
    """Documents in place of pages as units, at exactly the bound, on whole pages."""
    rng = np.random.default_rng(plan.seed + 3)
    residual = recorded.residuals(name)
    members = [np.flatnonzero(recorded.page == page) for page in range(recorded.page.max() + 1)]
    by_document, by_page = [], []
    for _ in range(plan.studies):
        drawn = rng.integers(len(members), size=plan.pages[-1])
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
