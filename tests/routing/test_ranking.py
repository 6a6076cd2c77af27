"""First and leading experts: by weight descending, ties to the lower id, in any slot order."""

from __future__ import annotations

import random

import pytest
import torch

from var_moe.routing.keeping import leading_count, rank_slots, rescaled, routing_mass, shares


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
    dice = random.Random(top_k)
    index = [dice.sample(range(10), top_k) for _ in range(200)]
    weight = [[dice.randint(1, 4) / 8 for _ in range(top_k)] for _ in range(200)]
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
