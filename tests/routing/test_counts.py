"""Agreement, cuts and dropped mass against figures computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from var_moe.routing.counts import (
    COLUMNS,
    RoutingReport,
    TierCounts,
    statistic_names,
    statistics,
    summed,
)
from var_moe.routing.decision import ForwardContext, Routing, Tier

FAST, CACHED, LEARNED = Tier.FAST, Tier.CACHED, Tier.LEARNED

# Four tokens of K = 2: the router's experts and weights.
INDEX = torch.tensor([[1, 2], [3, 0], [5, 4], [6, 7]])
WEIGHT = torch.tensor([[0.6, 0.2], [0.3, 0.9], [0.5, 0.5], [0.7, 0.3]])
COUNTED = torch.tensor([True, True, True, False])
CONTEXT = replace(ForwardContext.of(torch.zeros((1, 4), dtype=torch.int64)), counted=COUNTED[None])


def verified() -> Routing:
    """Cut by the table; by the cache, in slot 0; refused by the router; not counted."""
    return Routing(
        index=torch.tensor([[1, -1], [-1, 0], [5, 4], [6, -1]]),
        weight=WEIGHT,
        tier=torch.tensor([FAST, CACHED, LEARNED, FAST], dtype=torch.uint8),
        offer=torch.tensor([FAST, CACHED, CACHED, FAST], dtype=torch.uint8),
        agrees=torch.tensor([True, True, False, True]),
    )


def named(row: torch.Tensor) -> dict[str, float]:
    return dict(zip(statistic_names(1), statistics(row.double().numpy()), strict=True))


def test_by_hand() -> None:
    found = summed(verified(), INDEX, WEIGHT, COUNTED, drops_only=True)
    # decisions, dropped mass, cuts of fast, cached, learned; offers, agreements of two; pairs
    expected = [1, 1, 1, 0.25, 0.25, 0, 1, 1, 0, 1, 2, 1, 1, 4]
    assert found.shape == (1, COLUMNS)
    assert found[0].tolist() == pytest.approx(expected)
    seen = named(found)
    assert seen["dropped_mass"] == seen["dropped_mass.layer0"] == pytest.approx(0.5 / 3)
    assert seen["cut_share"] == seen["cut_share.layer0"] == pytest.approx(2 / 3)
    assert (seen["agreement.fast"], seen["agreement.cached"]) == (1.0, 0.5)


def test_rows_are_summed_apart() -> None:
    rows = summed(verified(), INDEX, WEIGHT, COUNTED, drops_only=True, rows=2)
    assert rows[0].tolist() == pytest.approx([1, 1, 0, 0.25, 0.25, 0, 1, 1, 0, 1, 1, 1, 1, 2])
    assert rows[1].tolist() == pytest.approx([0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 2])


def test_experts_that_were_not_chosen() -> None:
    """Plain mode: stored experts run in the first slot, whatever the router's own are."""
    routing = Routing(
        index=torch.tensor([[2, -1], [7, -1], [5, 4], [6, 7]]),
        weight=WEIGHT,
        tier=torch.tensor([FAST, CACHED, LEARNED, LEARNED], dtype=torch.uint8),
        offer=torch.tensor([FAST, CACHED, LEARNED, LEARNED], dtype=torch.uint8),
        agrees=torch.tensor([False, False, False, False]),
    )
    seen = named(summed(routing, INDEX, WEIGHT, COUNTED, drops_only=False))
    assert seen["dropped_mass.fast"] == pytest.approx(0.75)  # expert 1 did not run
    assert seen["dropped_mass.cached"] == pytest.approx(1.0)  # neither of the two did
    assert seen["dropped_mass.learned"] == 0
    assert (seen["agreement.fast"], seen["agreement.cached"]) == (0.0, 0.0)


def test_policies_without_offers_have_no_agreement() -> None:
    routing = Routing(index=INDEX, weight=WEIGHT, tier=torch.full((4,), 2, dtype=torch.uint8))
    seen = named(summed(routing, INDEX, WEIGHT, COUNTED, drops_only=True))
    assert math.isnan(seen["agreement.fast"])
    assert math.isnan(seen["dropped_mass.cached"])
    assert seen["dropped_mass"] == seen["cut_share"] == 0


def test_padding_and_tokens_without_weight_add_nothing() -> None:
    weight = WEIGHT.clone()
    weight[3] = math.nan
    weight[0] = 0
    found = summed(verified(), INDEX, weight, COUNTED, drops_only=True)
    assert found[0, 3:6].tolist() == pytest.approx([0, 0.25, 0])


def test_report_over_layers_and_forwards() -> None:
    counts = TierCounts(2)
    native = Routing(index=INDEX, weight=WEIGHT, tier=torch.full((4,), 2, dtype=torch.uint8))
    for second in (verified(), native, native):  # a guard has fallen back
        counts.begin(CONTEXT)
        counts.see(0, CONTEXT, verified(), INDEX, WEIGHT)
        counts.see(1, CONTEXT, second, INDEX, WEIGHT)
        counts.end()
    counts.begin(CONTEXT)  # of a forward that fails, nothing is counted
    counts.see(0, CONTEXT, verified(), INDEX, WEIGHT)
    counts.begin(CONTEXT)
    counts.end()
    report = RoutingReport(**counts.report())
    drift = report.drift
    assert report.tokens == 9
    assert report.executed_pairs == (12, 4 + 6 + 6)
    assert drift is not None
    assert drift["dropped_mass_by_layer"] == pytest.approx([0.5 / 3, 0.5 / 9])
    assert drift["dropped_mass_by_tier"] == pytest.approx(
        {"fast": 0.25, "cached": 0.25, "learned": 0}
    )
    assert drift["cut_share"] == pytest.approx(8 / 18)
    assert drift["agreement_by_tier"] == {"fast": 1.0, "cached": 0.5}
    assert drift["agreement_by_layer"][1] == {"fast": 1.0, "cached": 0.5}
    assert report.to_dict()["departure"] == drift


def test_statistics_are_in_the_order_of_their_names() -> None:
    sums = np.zeros((3, COLUMNS))
    sums[2, 2] = sums[2, 5] = 4.0
    found = dict(zip(statistic_names(3), statistics(sums), strict=True))
    assert found["dropped_mass.layer2"] == found["dropped_mass.learned"] == 1.0
    assert found["cut_share.layer2"] == 0.0
    assert math.isnan(found["cut_share.layer0"])
