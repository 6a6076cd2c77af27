"""What a profile says of a model's routing, and whether it is what VAR hopes for.

Three hypotheses are behind the fast path: frequent tokens have lower router entropy (H1), a token
is routed alike whatever its context (H2), and so the table covers a useful share of tokens (H3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import spearmanr

from var_moe.config import VARConfig
from var_moe.storage import SCHEMA_VERSION, provenance

if TYPE_CHECKING:
    import pandas as pd

    from var_moe.calibration.profile import RoutingProfile

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
    stats, head = profile.stats, profile.head
    usual = VARConfig().frequency_threshold, VARConfig().entropy_threshold
    layers = [
        {
            "layer": int(str(layer)),
            "mean_entropy_nats": _mean(rows, "mean_entropy"),
            **_spearman(rows),
            "consistency": _consistency(rows),
            "coverage_default": _covered(rows, *usual),
        }
        for layer, rows in stats.groupby("layer")
    ]
    quantiles = np.quantile(
        stats["mean_entropy"], QUANTILES, weights=stats["frequency"], method="inverted_cdf"
    )
    by_token = stats.groupby("token_id")[["frequency", "mean_entropy"]].mean()
    consistency, covered = _consistency(stats), _covered(stats, *usual)
    return {
        "schema_version": SCHEMA_VERSION,
        "model": head["model"],
        "dataset": head["dataset"],
        "tokens": head["tokens"],
        "profile_hash": profile.hash,
        "entropy_max_nats": head["entropy_max_nats"],
        "entropy": {
            "mean_nats": _mean(stats, "mean_entropy"),
            "quantiles_nats": dict(zip(map(str, QUANTILES), quantiles.tolist(), strict=True)),
        },
        "frequency_entropy": _spearman(by_token),
        "consistency": {"at_least_occurrences": AT_LEAST, "mean": consistency},
        "coverage": {
            "entropy_thresholds": list(ENTROPIES),
            "frequency_thresholds": list(FREQUENCIES),
            # rows: frequencies, columns: entropies
            "share": [[_covered(stats, f, e) for e in ENTROPIES] for f in FREQUENCIES],
            "default": {
                "frequency_threshold": usual[0],
                "entropy_threshold": usual[1],
                "share": covered,
            },
        },
        "layers": layers,
        "hypotheses": hypotheses(layers, consistency, covered),
        "provenance": provenance(),
    }


def hypotheses(
    layers: Sequence[Mapping[str, Any]], consistency: float | None, coverage: float
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


def _mean(rows: pd.DataFrame, name: str) -> float:
    """Of a column, weighted by frequency."""
    return float(np.average(rows[name].to_numpy(), weights=rows["frequency"].to_numpy()))


def _spearman(rows: pd.DataFrame) -> dict[str, float | None]:
    """Of frequency and entropy; None where there is no correlation of so few, or of constants."""
    if len(rows) < 3 or min(rows["frequency"].nunique(), rows["mean_entropy"].nunique()) == 1:
        return {"spearman_rho": None, "p_value": None}
    test = spearmanr(rows["frequency"], rows["mean_entropy"])
    return {"spearman_rho": float(test.statistic), "p_value": float(test.pvalue)}


def _consistency(rows: pd.DataFrame) -> float | None:
    """Mean share of occurrences that go to a token's usual first expert; None where none counts."""
    often = rows[rows["frequency"] >= AT_LEAST]
    return None if often.empty else _mean(often, "routing_consistency")


def _covered(rows: pd.DataFrame, frequency: float, entropy: float) -> float:
    """Share of (layer, token) on the fast path at these thresholds."""
    on = (rows["frequency"] >= frequency) & (rows["mean_entropy"] <= entropy)
    return float(rows["frequency"][on].sum() / rows["frequency"].sum())
