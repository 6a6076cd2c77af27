"""SER by hand: the first Kmin experts, of the others those with w_j > t * w_1."""

from __future__ import annotations

import pytest
import torch

from var_moe.routing.decision import ForwardContext
from var_moe.routing.simple import FixedKPolicy, SERPolicy

CONTEXT = ForwardContext.of(torch.zeros((1, 1), dtype=torch.int64))  # no ids are looked at
INDEX = torch.tensor([[9, 3, 12, 0, 5, 7, 1, 30]])
WEIGHT = torch.tensor([[2.0, 8.0, 4.0, 1.0, 8.0, 3.0, 4.0, 0.5]])


def test_two_experts() -> None:
    index = torch.tensor([[4, 7], [4, 7], [7, 4]])
    weight = torch.tensor([[0.625, 0.375], [0.5, 0.25], [0.25, 1.0]])
    routing = SERPolicy(1, 0.5).route(CONTEXT, 0, index, weight)
    # 0.375 > 0.3125: runs; 0.25 is not above 0.25; 0.25 in the other slot is below 0.5.
    assert routing.index.tolist() == [[4, 7], [4, -1], [-1, 4]]
    assert (routing.weight[1, 0], routing.weight[2, 1]) == (0.75, 1.25)
    assert routing.weight[0].tolist() == [0.625, 0.375]


def test_eight_experts_in_any_order() -> None:
    # Above half of 8 are the two eights; the third expert is a four, the one with the lower id.
    routing = SERPolicy(3, 0.5).route(CONTEXT, 0, INDEX, WEIGHT)
    assert routing.index.tolist() == [[-1, 3, -1, -1, 5, -1, 1, -1]]
    expected = torch.tensor([8.0, 8.0, 4.0]) * 30.5 / 20
    torch.testing.assert_close(routing.weight[0, [1, 4, 6]], expected)
    # With t just below a half both fours run, beside two experts that would run anyway.
    wider = SERPolicy(1, 0.49).route(CONTEXT, 0, INDEX, WEIGHT)
    assert wider.index.tolist() == [[-1, 3, 12, -1, 5, -1, 1, -1]]


@pytest.mark.parametrize("policy", [SERPolicy(1, 0.0), SERPolicy(8, 1.0), SERPolicy(20, 0.5)])
def test_no_threshold_or_enough_experts_is_the_unmodified_model(policy: SERPolicy) -> None:
    weight = WEIGHT.clone()
    weight[0, 7] = 0.0  # not above 0 * w_1, and runs all the same
    routing = policy.route(CONTEXT, 0, INDEX, weight)
    assert torch.equal(routing.index, INDEX)
    assert torch.equal(routing.weight, weight)


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_a_threshold_of_one_is_a_fixed_number(k: int) -> None:
    one, two = (
        SERPolicy(k, 1.0).route(CONTEXT, 0, INDEX, WEIGHT),
        FixedKPolicy(k).route(CONTEXT, 0, INDEX, WEIGHT),
    )
    assert torch.equal(one.index, two.index)
    assert torch.equal(one.weight, two.weight)
