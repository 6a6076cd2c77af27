"""Top-p by hand: the smallest set of first experts with a routing mass of at least p."""

from __future__ import annotations

import pytest
import torch

from var_moe.routing.decision import ForwardContext
from var_moe.routing.simple import TopPPolicy

CONTEXT = ForwardContext.of(torch.zeros((1, 1), dtype=torch.int64))  # no ids are looked at
INDEX = torch.tensor([[9, 3, 12, 0, 5, 7, 1, 30]])
WEIGHT = torch.tensor([[2.0, 8.0, 4.0, 1.0, 8.0, 3.0, 4.0, 0.5]])


def test_two_experts() -> None:
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
def test_eight_experts_in_any_order(
    p: float, kept: float, executed: list[int], scale: float
) -> None:
    routing = TopPPolicy(p).route(CONTEXT, 0, INDEX, WEIGHT * scale)
    assert routing.index.tolist() == [executed]
    runs = routing.index >= 0
    torch.testing.assert_close(routing.weight[runs], (WEIGHT * scale * 30.5 / kept)[runs])


def test_all_of_the_mass_is_all_experts() -> None:
    index, weight = torch.tensor([[4, 7]]), torch.tensor([[1.0, 1e-9]])
    assert TopPPolicy(1.0).route(CONTEXT, 0, index, weight).index.tolist() == [[4, 7]]
