"""From a choice of slots to a decision: what is dropped, and how the rest is rescaled."""

from __future__ import annotations

import torch

from var_moe.routing.decision import Tier
from var_moe.routing.keeping import all_pairs, kept_pairs, leading_slots


def test_the_kept_share_the_full_sum() -> None:
    index = torch.tensor([[4, 7, 1], [2, 0, 5]])
    weight = torch.tensor([[2.0, 1.0, 1.0], [0.25, 0.5, 0.25]])
    keep = torch.tensor([[True, False, True], [False, True, False]])
    routing = kept_pairs(index, weight, keep)
    assert routing.index.tolist() == [[4, -1, 1], [-1, 0, -1]]
    torch.testing.assert_close(routing.weight[0, [0, 2]], torch.tensor([8 / 3, 4 / 3]))
    assert routing.weight[1, 1] == 1.0
    assert routing.tier.tolist() == [Tier.LEARNED, Tier.LEARNED]


def test_a_token_that_keeps_all_is_left_exactly_alone() -> None:
    dice = torch.Generator().manual_seed(0)
    weight = torch.rand((100, 3), generator=dice).to(torch.bfloat16)  # most would be rounded
    index = torch.tensor([[4, 7, 1]]).expand(100, 3)
    for routing in (
        kept_pairs(index, weight, torch.ones_like(index).bool()),
        all_pairs(index, weight),
    ):
        assert torch.equal(routing.index, index)
        assert torch.equal(routing.weight, weight)
        assert (routing.tier == Tier.LEARNED).all()


def test_weights_of_zero_stay_zero() -> None:
    keep = torch.tensor([[True, False]])
    routing = kept_pairs(torch.tensor([[4, 7]]), torch.zeros(1, 2), keep)
    assert routing.index.tolist() == [[4, -1]]
    assert routing.weight.tolist() == [[0.0, 0.0]]


def test_leading_slots_go_by_weight_then_by_id() -> None:
    index = torch.tensor([[7, 0, 3], [7, 0, 3]])
    weight = torch.tensor([[0.25, 0.25, 0.25], [0.5, 0.1, 0.4]])
    expected = [[False, True, True], [True, False, True]]
    assert leading_slots(index, weight, 2).tolist() == expected
