"""Sharing a budget of experts out over layers: by hand, and against trying every way."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest

from var_moe.errors import UsageError
from var_moe.routing.per_layer_k import LayerSensitivity, allocate_experts


@pytest.mark.parametrize(
    ("loss", "total", "experts"),
    [
        ([[3.0, 1.0, 0.0], [1.0, 0.5, 0.0]], 2, (1, 1)),
        ([[3.0, 1.0, 0.0], [1.0, 0.5, 0.0]], 3, (2, 1)),  # 1 + 1 against 3 + 0.5
        ([[3.0, 1.0, 0.0], [1.0, 0.5, 0.0]], 4, (3, 1)),  # 0 + 1 against 1 + 0.5 and 3 + 0
        ([[3.0, 1.0, 0.0], [1.0, 0.5, 0.0]], 6, (3, 3)),
        # A step that gains little opens one that gains much: the greedy way would be (2, 2).
        ([[4.0, 3.9, 0.0], [4.0, 3.0, 2.9]], 4, (3, 1)),
        # Nothing to choose between: as even as can be, and what is left over goes first.
        ([[0.0] * 4] * 3, 7, (3, 2, 2)),
        ([[0.1] * 4] * 3, 8, (3, 3, 2)),
        # 0.3 + 0.2 + 0.1 in another order is another float, and no better way for that.
        ([[0.1, 0.3], [0.2, 9.0], [0.1, 0.3]], 4, (2, 1, 1)),
        ([[5.0]], 1, (1,)),
    ],
)
def test_budgets_by_hand(loss: list[list[float]], total: int, experts: tuple[int, ...]) -> None:
    assert allocate_experts(loss, total) == experts


def test_no_other_way_is_better() -> None:
    dice = random.Random(0)
    for _ in range(40):
        layers, top_k = dice.randint(1, 4), dice.randint(1, 4)
        loss = [[float(dice.randint(0, 6)) for _ in range(top_k)] for _ in range(layers)]
        for total in range(layers, layers * top_k + 1):
            ways = [
                way
                for way in itertools.product(range(1, top_k + 1), repeat=layers)
                if sum(way) == total
            ]
            best = min(
                ways,
                key=lambda way, loss=loss: (
                    sum(row[k - 1] for row, k in zip(loss, way, strict=True)),
                    sum(k * k for k in way),
                    [-k for k in way],
                ),
            )
            assert allocate_experts(loss, total) == best


@pytest.mark.parametrize("total", [1, 7, 2.5])
def test_a_budget_outside_the_model_is_refused(total: Any) -> None:
    with pytest.raises(
        UsageError, match=rf"total experts = {total}: expected an integer in \[2, 6"
    ):
        allocate_experts([[2.0, 1.0, 0.0]] * 2, total)


def test_saved_and_read_again() -> None:
    found = LayerSensitivity(measure="change of the output", loss=((0.5, 0.0), (0.25, 0.0)))
    assert LayerSensitivity.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": ()}, r"LayerSensitivity\.loss = \(\)"),
        ({"loss": ((),)}, r"LayerSensitivity\.loss = \(\)"),
        ({"loss": ((1.0, 0.0), (1.0,))}, r"loss\[1\] = \(1\.0,\): expected 2 values"),
        ({"loss": ((1.0, -0.5),)}, r"loss\[0\] = -0\.5: expected a number in \[0"),
        ({"loss": ((float("nan"), 0.0),)}, r"loss\[0\] = nan"),
        ({"losses": ()}, r"'losses' is missing or unknown"),
    ],
)
def test_impossible_sensitivities_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LayerSensitivity.from_dict({"measure": "any", "loss": ((1.0, 0.0),), **change})
