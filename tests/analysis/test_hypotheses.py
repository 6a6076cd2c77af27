"""The routing analysis of made-up statistics whose answers are plain."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from var_moe.analysis.hypotheses import (
    ENTROPIES,
    FREQUENCIES,
    analyse_routing,
    hypotheses,
)


class Profile:
    """What the analysis reads of a profile."""

    hash = "abc"

    def __init__(self, stats):
        self.head = {"model": "m", "dataset": "d", "tokens": 1000, "entropy_max_nats": 2.0}
        self.stats = stats


def profile(*, falling=True, consistency=0.9):
    """Two layers, tokens seen 100, 99, ..., 1 times, entropies in order of rarity."""
    frequency = np.arange(100, 0, -1)
    entropy = np.linspace(0.1, 1.9, 100)
    rows = pd.DataFrame(
        {
            "token_id": np.arange(100),
            "frequency": frequency,
            "mean_entropy": entropy if falling else entropy[::-1],
            "routing_consistency": consistency,
        }
    )
    return Profile(pd.concat([rows.assign(layer=0), rows.assign(layer=1)]))


def verdicts(found):
    return [row["verdict"] for row in found["hypotheses"]]


def test_plain_answers():
    found = analyse_routing(profile())
    assert found["frequency_entropy"]["spearman_rho"] == pytest.approx(-1)
    assert [row["spearman_rho"] for row in found["layers"]] == pytest.approx([-1, -1])
    assert found["consistency"]["mean"] == pytest.approx(0.9)
    # Entropy is at most 0.5 for the 23 tokens from 0.1 in steps of 1.8/99: seen 100..78 times.
    share = sum(range(78, 101)) / 5050
    assert found["coverage"]["default"]["share"] == pytest.approx(share)
    assert verdicts(found) == ["supported"] * 3
    # The 30 most frequent tokens are half of the text.
    median = found["entropy"]["quantiles_nats"]["0.5"]
    assert median == pytest.approx(np.linspace(0.1, 1.9, 100)[29])
    grid = found["coverage"]["share"]
    assert (len(grid), len(grid[0])) == (len(FREQUENCIES), len(ENTROPIES))
    assert grid[2][4] == pytest.approx(share)  # 50 occurrences, 0.5 nats


def test_the_opposite_is_not_supported():
    found = analyse_routing(profile(falling=False, consistency=0.5))
    assert found["frequency_entropy"]["spearman_rho"] == pytest.approx(1)
    assert verdicts(found) == ["not supported"] * 3


def test_a_single_token_has_no_correlation():
    found = analyse_routing(Profile(profile().stats.iloc[:1]))
    assert found["frequency_entropy"]["spearman_rho"] is None
    assert verdicts(found)[0] == "not supported"


def test_most_layers_must_agree():
    layers = [{"spearman_rho": -0.5, "p_value": 1e-9}, {"spearman_rho": 0.1, "p_value": 0.5}]
    row = hypotheses(layers, None, 0.0)
    assert row[0]["verdict"] == "not supported"
    assert row[0]["evidence"] == "1 of 2 layers"
    assert row[1]["evidence"] == "no token seen often enough"
