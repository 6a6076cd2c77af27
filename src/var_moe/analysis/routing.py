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
    stats, head, consistency = profile.stats, profile.head, _consistency(profile.stats)
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
        "entropy": _distribution(stats),
        "frequency_entropy": _correlation(stats),
        "consistency": {"at_least_occurrences": AT_LEAST, "mean": consistency},
        "coverage": coverage,
        "layers": layers,
        "hypotheses": hypotheses(layers, consistency, coverage["default"]["share"]),
        "provenance": provenance(),
    }


def hypotheses(
    layers: Sequence[Mapping[str, Any]],
    consistency: float | None,
    coverage: float,
) -> list[dict[str, Any]]:
    """H1 to H3 with figures and verdicts: ``supported`` or ``not supported``.

    Args:
        layers: of each layer, ``spearman_rho`` and ``p_value`` of frequency against entropy.
        consistency: share of occurrences that go to a token's usual first expert, where known.
        coverage: share of (layer, token) on the fast path at the default thresholds.
    """
    # Bonferroni over the layers: each is a test of its own.
    most = ALPHA / max(len(layers), 1)
    tested = [row for row in layers if row["spearman_rho"] is not None]
    agree = sum(row["spearman_rho"] < WEAK_RHO and row["p_value"] < most for row in tested)
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
            "no token seen often enough" if consistency is None else f"{consistency:.1%}",
            (consistency or 0.0) >= CONSISTENT,
        ),
        (
            "a useful share of tokens is covered by the fast path at the default thresholds",
            f"at least {USEFUL_COVERAGE:.0%} of (layer, token)",
            f"{coverage:.1%}",
            coverage >= USEFUL_COVERAGE,
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


def _distribution(rows: pd.DataFrame) -> dict[str, Any]:
    """Mean and quantiles of the mean entropy, weighted by frequency."""
    entropy, weight = _column(rows, "mean_entropy"), _column(rows, "frequency")
    quantiles = np.quantile(entropy, QUANTILES, weights=weight, method="inverted_cdf")
    return {
        "mean_nats": float(np.average(entropy, weights=weight)),
        "quantiles_nats": {f"{q:g}": float(v) for q, v in zip(QUANTILES, quantiles, strict=True)},
    }


def _correlation(rows: pd.DataFrame) -> dict[str, float | None]:
    """Of tokens' frequency and entropy, averaged over the layers."""
    each = rows.groupby("token_id").agg({"frequency": "mean", "mean_entropy": "mean"})
    return _spearman(_column(each, "frequency"), _column(each, "mean_entropy"))


def _spearman(frequency: Floats, entropy: Floats) -> dict[str, float | None]:
    if len(frequency) < 3 or np.ptp(frequency) == 0 or np.ptp(entropy) == 0:
        return {"spearman_rho": None, "p_value": None}
    test = spearmanr(frequency, entropy)
    return {"spearman_rho": float(test.statistic), "p_value": float(test.pvalue)}


def _consistency(rows: pd.DataFrame) -> float | None:
    """Mean share of occurrences that go to a token's usual first expert; None where none counts."""
    seen = rows[rows["frequency"] >= AT_LEAST]
    if seen.empty:
        return None
    return float(np.average(_column(seen, "routing_consistency"), weights=seen["frequency"]))


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
        "consistency": _consistency(rows),
        "coverage_default": _covered(rows, default.frequency_threshold, default.entropy_threshold),
    }
