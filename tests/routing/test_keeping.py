"""A token's experts by rank, in any slot order, and the decision that keeps some of them."""

from __future__ import annotations

import random

import pytest
import torch

from var_moe.routing.decision import Tier
from var_moe.routing.keeping import (
    all_pairs,
    kept_pairs,
    leading_count,
    leading_slots,
    rank_slots,
    rescaled,
    routing_mass,
    shares,
)


@pytest.mark.parametrize(("top_k", "leading"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (8, 4)])
def test_half_of_the_experts_lead_rounded_up(top_k: int, leading: int) -> None:
    assert leading_count(top_k) == leading


@pytest.mark.parametrize(
    ("index", "weight", "slots"),
    [
        ([5], [0.3], [0]),
        ([5, 2], [0.6, 0.4], [0, 1]),
        ([5, 2], [0.4, 0.6], [1, 0]),
        ([5, 2], [0.5, 0.5], [1, 0]),
        ([2, 5], [0.5, 0.5], [0, 1]),
        ([7, 0, 3], [0.25, 0.25, 0.5], [2, 1, 0]),
        ([7, 0, 3], [0.25, 0.25, 0.25], [1, 2, 0]),
        ([9, 4, 6, 1], [0.5, 0.25, 0.5, 0.25], [2, 0, 3, 1]),
    ],
)
def test_slots_by_rank(index: list[int], weight: list[float], slots: list[int]) -> None:
    assert rank_slots(torch.tensor([index]), torch.tensor([weight])).tolist() == [slots]


@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slots_by_rank_equal_sorting_in_python(top_k: int, dtype: torch.dtype) -> None:
    rng = random.Random(top_k)
    index = [rng.sample(range(10), top_k) for _ in range(200)]
    weight = [[rng.randint(1, 4) / 8 for _ in range(top_k)] for _ in range(200)]
    expected = [
        sorted(range(top_k), key=lambda slot, e=experts, w=weights: (-w[slot], e[slot]))
        for experts, weights in zip(index, weight, strict=True)
    ]
    assert rank_slots(torch.tensor(index), torch.tensor(weight, dtype=dtype)).tolist() == expected


def test_routing_mass_is_the_share_of_the_leading_weights() -> None:
    weight = torch.tensor([[0.25, 0.5, 0.25], [1.0, 2.0, 1.0]])
    leading = torch.tensor([[0.5, 0.25], [2.0, 1.0]])
    assert routing_mass(leading, weight).tolist() == [0.75, 0.75]


def test_routing_mass_of_all_experts_is_exactly_one() -> None:
    weight = torch.tensor([[0.1], [0.7], [0.0]])
    assert routing_mass(weight, weight).tolist() == [1.0, 1.0, 1.0]


def test_shares_and_rescaled_weights_by_hand():
    weight = torch.tensor([[3.0, 1.0], [0.5, 0.0], [0.0, 0.0]])
    assert shares(weight).tolist() == [[0.75, 0.25], [1.0, 0.0], [0.0, 0.0]]
    scaled = rescaled(weight, kept=weight[:, 0], total=weight.sum(1))
    # A token without any weight, as of a router that can skip the experts, stays without.
    assert scaled[:, 0].tolist() == [4.0, 0.5, 0.0]
    assert scaled[2].tolist() == [0.0, 0.0]


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
    rng = torch.Generator().manual_seed(0)
    weight = torch.rand((100, 3), generator=rng).to(torch.bfloat16)  # most would be rounded
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
