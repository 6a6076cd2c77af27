"""Policies by the router's own weights, by hand."""

from __future__ import annotations

import pytest
import torch

from var_moe.routing.decision import ForwardContext
from var_moe.routing.simple import FixedKPolicy, SERPolicy, TopPPolicy

CONTEXT = ForwardContext.of(torch.zeros((1, 1), dtype=torch.int64))  # no ids are looked at
INDEX = torch.tensor([[9, 3, 12, 0, 5, 7, 1, 30]])
WEIGHT = torch.tensor([[2.0, 8.0, 4.0, 1.0, 8.0, 3.0, 4.0, 0.5]])


def test_ser_two_experts() -> None:
    index = torch.tensor([[4, 7], [4, 7], [7, 4]])
    weight = torch.tensor([[0.625, 0.375], [0.5, 0.25], [0.25, 1.0]])
    routing = SERPolicy(1, 0.5).route(CONTEXT, 0, index, weight)
    # 0.375 > 0.3125: runs; 0.25 is not above 0.25; 0.25 in the other slot is below 0.5.
    assert routing.index.tolist() == [[4, 7], [4, -1], [-1, 4]]
    assert (routing.weight[1, 0], routing.weight[2, 1]) == (0.75, 1.25)
    assert routing.weight[0].tolist() == [0.625, 0.375]


def test_ser_eight_experts_in_any_order() -> None:
    # Above half of 8 are the two eights; the third expert is a four, the one with the lower id.
    routing = SERPolicy(3, 0.5).route(CONTEXT, 0, INDEX, WEIGHT)
    assert routing.index.tolist() == [[-1, 3, -1, -1, 5, -1, 1, -1]]
    expected = torch.tensor([8.0, 8.0, 4.0]) * 30.5 / 20
    torch.testing.assert_close(routing.weight[0, [1, 4, 6]], expected)
    # With t just below a half both fours run, beside two experts that would run anyway.
    wider = SERPolicy(1, 0.49).route(CONTEXT, 0, INDEX, WEIGHT)
    assert wider.index.tolist() == [[-1, 3, 12, -1, 5, -1, 1, -1]]


@pytest.mark.parametrize("policy", [SERPolicy(1, 0.0), SERPolicy(8, 1.0), SERPolicy(20, 0.5)])
def test_ser_no_threshold_or_enough_experts_is_the_unmodified_model(policy: SERPolicy) -> None:
    weight = WEIGHT.clone()
    weight[0, 7] = 0.0  # not above 0 * w_1, and runs all the same
    routing = policy.route(CONTEXT, 0, INDEX, weight)
    assert torch.equal(routing.index, INDEX)
    assert torch.equal(routing.weight, weight)


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_ser_a_threshold_of_one_is_a_fixed_number(k: int) -> None:
    one, two = (
        SERPolicy(k, 1.0).route(CONTEXT, 0, INDEX, WEIGHT),
        FixedKPolicy(k).route(CONTEXT, 0, INDEX, WEIGHT),
    )
    assert torch.equal(one.index, two.index)
    assert torch.equal(one.weight, two.weight)


def test_top_p_two_experts() -> None:
    index = torch.tensor([[4, 7], [7, 4], [7, 4]])
    weight = torch.tensor([[0.625, 0.375], [0.25, 0.75], [0.5, 0.5]])
    three_quarters = TopPPolicy(0.75).route(CONTEXT, 0, index, weight)
    assert three_quarters.index.tolist() == [[4, 7], [-1, 4], [7, 4]]
    assert three_quarters.weight[1, 1] == 1.0
    # Of two equal experts the one with the lower id reaches a half.
    half = TopPPolicy(0.5).route(CONTEXT, 0, index, weight)
    assert half.index.tolist() == [[4, -1], [-1, 4], [-1, 4]]


@pytest.mark.parametrize(
    ("p", "kept", "executed"),
    [
        # In order: 8 (3), 8 (5), 4 (1), 4 (12), 3 (7), 2 (9), 1 (0), 0.5 (30); 30.5 in all.
        (0.1, 8.0, [-1, 3, -1, -1, -1, -1, -1, -1]),
        (0.6, 20.0, [-1, 3, -1, -1, 5, -1, 1, -1]),
        (0.9, 29.0, [9, 3, 12, -1, 5, 7, 1, -1]),
        (1.0, 30.5, [9, 3, 12, 0, 5, 7, 1, 30]),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1 / 64])
def test_top_p_eight_experts_in_any_order(
    p: float, kept: float, executed: list[int], scale: float
) -> None:
    routing = TopPPolicy(p).route(CONTEXT, 0, INDEX, WEIGHT * scale)
    assert routing.index.tolist() == [executed]
    runs = routing.index >= 0
    torch.testing.assert_close(routing.weight[runs], (WEIGHT * scale * 30.5 / kept)[runs])


def test_top_p_all_of_the_mass_is_all_experts() -> None:
    index, weight = torch.tensor([[4, 7]]), torch.tensor([[1.0, 1e-9]])
    assert TopPPolicy(1.0).route(CONTEXT, 0, index, weight).index.tolist() == [[4, 7]]
