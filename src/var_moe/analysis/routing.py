"""What a profile says of a model's routing, and whether it is what VAR hopes for.

Three hypotheses are behind the fast path: frequent tokens have lower router entropy (H1), a token
is routed alike whatever its context (H2), and so the table covers a useful share of tokens (H3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from var_moe.config import VARConfig
from var_moe.storage import SCHEMA_VERSION, provenance

if TYPE_CHECKING:
    import pandas as pd

    from var_moe.calibration.profile import RoutingProfile

Floats = NDArray[np.float64]

FILE = "routing_analysis.json"
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
BINS = 40
SCATTER = 2000
"""At most so many points of frequency against entropy are kept for a picture."""
AT_LEAST = 10
"""Occurrences from which a token's consistency says something."""
ENTROPIES = tuple(round(0.1 * step, 1) for step in range(1, 21))
FREQUENCIES = (10, 25, 50, 100, 200)

WEAK_RHO, ALPHA = -0.1, 0.05
CONSISTENT = 0.8
USEFUL_COVERAGE = 0.1


def analyse_routing(profile: RoutingProfile) -> dict[str, Any]:
    """Distributions, correlation, coverage and the hypotheses' verdicts, for a result file.

    Shares and means are weighted by frequency: they are of tokens of the text, not of the
    vocabulary. Spearman's correlation takes each token of a layer once.
    """
    stats, head = profile.stats, profile.head
    default = VARConfig()
    layers = [_layer(int(str(layer)), rows) for layer, rows in stats.groupby("layer")]
    coverage: dict[str, Any] = {
        "entropy_thresholds": list(ENTROPIES),
        "frequency_thresholds": list(FREQUENCIES),
        # rows: frequencies, columns: entropies
        "share": [[_covered(stats, f, e) for e in ENTROPIES] for f in FREQUENCIES],
        "default": {
            "frequency_threshold": default.frequency_threshold,
            "entropy_threshold": default.entropy_threshold,
            "share": _covered(stats, default.frequency_threshold, default.entropy_threshold),
        },
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "model": head["model"],
        "dataset": head["dataset"],
        "tokens": head["tokens"],
        "profile_hash": profile.hash,
        "entropy_max_nats": head["entropy_max_nats"],
        "entropy": _distribution(stats, float(head["entropy_max_nats"])),
        "frequency_entropy": _correlation(stats),
        "consistency": _consistency(stats),
        "coverage": coverage,
        "layers": layers,
        "hypotheses": hypotheses(layers, _consistency(stats), coverage["default"]),
        "provenance": provenance(),
    }


def hypotheses(
    layers: Sequence[Mapping[str, Any]],
    consistency: Mapping[str, Any],
    covered: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """H1 to H3 with figures and verdicts: ``supported`` or ``not supported``.

    Args:
        layers: of each layer, ``spearman_rho`` and ``p_value`` of frequency against entropy.
        consistency: ``mean``: share of occurrences that go to a token's usual first expert.
        covered: ``share`` of tokens on the fast path at the default thresholds.
    """
    # Bonferroni over the layers: each is a test of its own.
    most = ALPHA / max(len(layers), 1)
    tested = [row for row in layers if row["spearman_rho"] is not None]
    agree = sum(row["spearman_rho"] < WEAK_RHO and row["p_value"] < most for row in tested)
    mean = consistency["mean"]
    rows = (
        (
            "frequent tokens have lower router entropy",
            f"Spearman's rho below {WEAK_RHO} with p < {ALPHA} (Bonferroni over layers) in most "
            "layers",
            f"{agree} of {len(layers)} layers",
            2 * agree > len(layers),
        ),
        (
            "routing of a token is consistent across contexts",
            f"at least {CONSISTENT:.0%} of occurrences go to the token's usual first expert, of "
            f"tokens seen {AT_LEAST} times or more",
            "no token seen often enough" if mean is None else f"{mean:.1%}",
            (mean or 0.0) >= CONSISTENT,
        ),
        (
            "a useful share of tokens is covered by the fast path at the default thresholds",
            f"at least {USEFUL_COVERAGE:.0%} of (layer, token)",
            f"{covered['share']:.1%}",
            covered["share"] >= USEFUL_COVERAGE,
        ),
    )
    return [
        {
            "name": f"H{number}",
            "claim": claim,
            "test": test,
            "evidence": evidence,
            "verdict": "supported" if holds else "not supported",
        }
        for number, (claim, test, evidence, holds) in enumerate(rows, start=1)
    ]


def _column(rows: pd.DataFrame, name: str) -> Floats:
    return rows[name].to_numpy(dtype=np.float64)


def _distribution(rows: pd.DataFrame, most: float) -> dict[str, Any]:
    """Quantiles and a histogram of the mean entropy, weighted by frequency."""
    entropy, weight = _column(rows, "mean_entropy"), _column(rows, "frequency")
    counts, edges = np.histogram(entropy, bins=BINS, range=(0.0, most), weights=weight)
    return {
        "mean_nats": float(np.average(entropy, weights=weight)),
        "quantiles_nats": {
            f"{q:g}": value
            for q, value in zip(QUANTILES, weighted_quantiles(entropy, weight), strict=True)
        },
        "histogram": {"edges_nats": edges.tolist(), "share": (counts / weight.sum()).tolist()},
    }


def weighted_quantiles(values: Floats, weight: Floats) -> list[float]:
    """The smallest value at or below which each of `QUANTILES` of the weight lies."""
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weight[order]) / weight.sum()
    at = np.searchsorted(reached, np.array(QUANTILES) - 1e-12)
    return [float(v) for v in values[order][np.minimum(at, len(values) - 1)]]


def _correlation(rows: pd.DataFrame) -> dict[str, Any]:
    """Of tokens' frequency and entropy, averaged over the layers; points for a picture."""
    each = rows.groupby("token_id").agg({"frequency": "mean", "mean_entropy": "mean"})
    frequency, entropy = _column(each, "frequency"), _column(each, "mean_entropy")
    shown = np.linspace(0, len(each) - 1, min(SCATTER, len(each))).astype(int)
    order = np.argsort(-frequency, kind="stable")[shown]
    return {
        **_spearman(frequency, entropy),
        "points": {
            "frequency": frequency[order].tolist(),
            "mean_entropy_nats": entropy[order].tolist(),
        },
    }


def _spearman(frequency: Floats, entropy: Floats) -> dict[str, float | None]:
    if len(frequency) < 3 or np.ptp(frequency) == 0 or np.ptp(entropy) == 0:
        return {"spearman_rho": None, "p_value": None}
    found = spearmanr(frequency, entropy)
    return {"spearman_rho": float(found.statistic), "p_value": float(found.pvalue)}


def _consistency(rows: pd.DataFrame) -> dict[str, Any]:
    seen = rows[rows["frequency"] >= AT_LEAST]
    share, weight = _column(seen, "routing_consistency"), _column(seen, "frequency")
    counts, edges = np.histogram(share, bins=20, range=(0.0, 1.0), weights=weight)
    total = float(weight.sum())
    return {
        "at_least_occurrences": AT_LEAST,
        "mean": float(np.average(share, weights=weight)) if total else None,
        "histogram": {"edges": edges.tolist(), "share": (counts / (total or 1.0)).tolist()},
    }


def _covered(rows: pd.DataFrame, frequency: float, entropy: float) -> float:
    """Share of (layer, token) on the fast path at these thresholds."""
    weight = _column(rows, "frequency")
    on = (weight >= frequency) & (_column(rows, "mean_entropy") <= entropy)
    return float(weight[on].sum() / weight.sum())


def _layer(layer: int, rows: pd.DataFrame) -> dict[str, Any]:
    weight = _column(rows, "frequency")
    default = VARConfig()
    return {
        "layer": layer,
        "mean_entropy_nats": float(np.average(_column(rows, "mean_entropy"), weights=weight)),
        **_spearman(weight, _column(rows, "mean_entropy")),
        "consistency": _consistency(rows)["mean"],
        "coverage_default": _covered(rows, default.frequency_threshold, default.entropy_threshold),
    }
