"""NAEE by hand: skip expert j where w_j < beta_l * w_1."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from var_moe.errors import UsageError
from var_moe.routing.decision import ForwardContext
from var_moe.routing.naee import NAEEPolicy, RatioQuantiles

CONTEXT = ForwardContext.of(torch.zeros((1, 1), dtype=torch.int64))  # no ids are looked at
INDEX = torch.tensor([[9, 3, 12, 0, 5, 7, 1, 30]])
WEIGHT = torch.tensor([[2.0, 8.0, 4.0, 1.0, 8.0, 3.0, 4.0, 0.5]])


def ratios(top_k: int) -> RatioQuantiles:
    """The medians are 1/2 and 1/4."""
    return RatioQuantiles(top_k=top_k, tokens=9, quantiles=((0.0, 0.5, 1.0), (0.0, 0.25, 1.0)))


def test_two_experts() -> None:
    policy = NAEEPolicy(0.5, ratios=ratios(2))
    assert policy.beta == (0.5, 0.25)
    index = torch.tensor([[4, 7], [4, 7], [7, 4]])
    weight = torch.tensor([[0.75, 0.25], [0.5, 0.25], [0.25, 1.0]])
    first, second = (policy.route(CONTEXT, layer, index, weight) for layer in (0, 1))
    # 0.25 < 0.375: skipped; 0.25 is not below 0.25; 0.25 < 0.5 in the other slot: skipped.
    assert first.index.tolist() == [[4, -1], [4, 7], [-1, 4]]
    assert (first.weight[0, 0], first.weight[2, 1]) == (1.0, 1.25)
    assert first.weight[1].tolist() == [0.5, 0.25]
    assert second.index.tolist() == index.tolist()


def test_eight_experts_in_any_order() -> None:
    routing = NAEEPolicy(0.5, ratios=ratios(8)).route(CONTEXT, 0, INDEX, WEIGHT)
    assert routing.index.tolist() == [[-1, 3, 12, -1, 5, -1, 1, -1]]
    expected = torch.tensor([8.0, 4.0, 8.0, 4.0]) * 30.5 / 24
    torch.testing.assert_close(routing.weight[0, [1, 2, 4, 6]], expected)


def test_the_knob_goes_from_everything_to_the_first() -> None:
    everything = NAEEPolicy(0.0, ratios=ratios(8)).route(CONTEXT, 0, INDEX, WEIGHT)
    assert torch.equal(everything.index, INDEX)
    assert torch.equal(everything.weight, WEIGHT)
    least = NAEEPolicy(1.0, ratios=ratios(8)).route(CONTEXT, 0, INDEX, WEIGHT)
    assert least.index.tolist() == [[-1, 3, -1, -1, 5, -1, -1, -1]]  # those two are equal


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_calibration_text_loses_that_share_in_every_layer(share: float) -> None:
    rng = torch.Generator().manual_seed(4)
    index = torch.arange(8).expand(1000, 8)
    weights = [(torch.randn((1000, 8), generator=rng) * spread).exp() for spread in (1.0, 3.0)]
    rows = []
    for weight in weights:
        later = (weight / weight.amax(1, keepdim=True)).sort(1).values[:, :-1].reshape(-1)
        rows.append(tuple(later.quantile(torch.linspace(0, 1, 201)).tolist()))
    calibrated = RatioQuantiles(top_k=8, tokens=1000, quantiles=tuple(rows))
    policy = NAEEPolicy(share, ratios=calibrated)
    for layer, weight in enumerate(weights):
        skipped = (policy.route(CONTEXT, layer, index, weight).index < 0).sum().item() / (1000 * 7)
        assert skipped == pytest.approx(share, abs=0.01)


def test_another_models_calibration_is_refused() -> None:
    policy = NAEEPolicy(0.5, ratios=ratios(8))
    with pytest.raises(UsageError, match="NAEEPolicy: calibrated for K = 8, the model has K = 2"):
        policy.route(CONTEXT, 0, INDEX[:, :2], WEIGHT[:, :2])


def test_a_quantile_is_a_share() -> None:
    with pytest.raises(UsageError, match=r"NAEEPolicy\.quantile = 1\.5: .* in \[0, 1\]"):
        NAEEPolicy(1.5, ratios=ratios(2))


def test_between_two_levels_a_straight_line() -> None:
    quantiles = RatioQuantiles(top_k=2, tokens=1, quantiles=((0.0, 0.5, 1.0), (0.25, 0.25, 0.75)))
    assert quantiles.at(0.25) == (0.25, 0.25)
    assert quantiles.at(0.75) == (0.75, 0.5)


def test_saved_and_read_again() -> None:
    known = RatioQuantiles(top_k=2, tokens=7, quantiles=((0.0, 0.25, 1.0), (0.0, 0.5, 1.0)))
    assert RatioQuantiles.from_dict(json.loads(json.dumps(known.to_dict()))) == known


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 0}, r"RatioQuantiles\.top_k = 0: expected an integer in \[1"),
        ({"tokens": 0}, r"RatioQuantiles\.tokens = 0"),
        ({"quantiles": ()}, r"expected a row for each layer"),
        ({"quantiles": ((0.5,),)}, r"quantiles\[0\] = \(0\.5,\): expected as many values"),
        ({"quantiles": ((0, 1), (0, 1.5))}, r"quantiles\[1\] = 1\.5: .* in \[0, 1\]"),
        ({"quantiles": ((0, 0.5, 0.4),)}, r"quantiles\[0\]: expected .* not decrease"),
    ],
)
def test_impossible_quantiles_are_refused(change: dict[str, Any], message: str) -> None:
    good = {"top_k": 2, "tokens": 5, "quantiles": ((0, 1), (0, 1))}
    assert RatioQuantiles.from_dict(good).layers == 2
    with pytest.raises(UsageError, match=message):
        RatioQuantiles.from_dict({**good, **change})
