"""A budget of experts per token shared out over layers, by hand."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
import torch

from var_moe.errors import UsageError
from var_moe.routing.decision import ForwardContext
from var_moe.routing.per_layer_k import LayerSensitivity, PerLayerKPolicy, allocate_experts

CONTEXT = ForwardContext.of(torch.zeros((1, 1), dtype=torch.int64))  # no ids are looked at
TWO_LAYERS = LayerSensitivity(measure="made up", loss=((3.0, 1.0, 0.0), (1.0, 0.5, 0.0)))


@pytest.mark.parametrize(
    ("budget", "experts"),
    [(1, (1, 1)), (1.5, (2, 1)), (1.7, (2, 1)), (1.99, (2, 1)), (2.0, (3, 1)), (3, (3, 3))],
)
def test_the_budget_is_a_mean_over_layers(budget: float, experts: tuple[int, ...]) -> None:
    assert PerLayerKPolicy(budget, sensitivity=TWO_LAYERS).k == experts


@pytest.mark.parametrize("layers", [3, 7, 49])
def test_thirds_lose_no_expert_to_rounding(layers: int) -> None:
    flat = LayerSensitivity(measure="made up", loss=((0.0,) * 8,) * layers)
    for total in range(layers, 8 * layers + 1, max(1, layers // 7)):
        assert sum(PerLayerKPolicy(total / layers, sensitivity=flat).k) == total


def test_each_layer_runs_its_own_number() -> None:
    policy = PerLayerKPolicy(1.5, sensitivity=TWO_LAYERS)
    index, weight = torch.tensor([[9, 2, 5]]), torch.tensor([[0.25, 0.5, 0.25]])
    first, second = (policy.route(CONTEXT, layer, index, weight) for layer in (0, 1))
    assert first.index.tolist() == [[-1, 2, 5]]  # of the equal experts the lower id
    torch.testing.assert_close(first.weight[0, 1:], torch.tensor([2 / 3, 1 / 3]))
    assert second.index.tolist() == [[-1, 2, -1]]
    assert second.weight[0, 1] == 1.0


def test_eight_experts_in_any_order() -> None:
    one_layer = LayerSensitivity(measure="made up", loss=((0.0,) * 8,))
    index = torch.tensor([[9, 3, 12, 0, 5, 7, 1, 30]])
    weight = torch.tensor([[2.0, 8.0, 4.0, 1.0, 8.0, 3.0, 4.0, 0.5]])
    routing = PerLayerKPolicy(3, sensitivity=one_layer).route(CONTEXT, 0, index, weight)
    assert routing.index.tolist() == [[-1, 3, -1, -1, 5, -1, 1, -1]]
    everything = PerLayerKPolicy(8, sensitivity=one_layer).route(CONTEXT, 0, index, weight)
    assert torch.equal(everything.index, index)
    assert torch.equal(everything.weight, weight)


@pytest.mark.parametrize("budget", [0.5, 3.1, float("nan")])
def test_a_budget_outside_the_model_is_refused(budget: float) -> None:
    with pytest.raises(UsageError, match=rf"experts_per_token = {budget}: .* in \[1, 3\]"):
        PerLayerKPolicy(budget, sensitivity=TWO_LAYERS)


def test_another_models_sensitivity_is_refused() -> None:
    policy = PerLayerKPolicy(1.5, sensitivity=TWO_LAYERS)
    with pytest.raises(UsageError, match="PerLayerKPolicy: calibrated for K = 3"):
        policy.route(CONTEXT, 0, torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]))


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
    rng = random.Random(0)
    for _ in range(40):
        layers, top_k = rng.randint(1, 4), rng.randint(1, 4)
        loss = [[float(rng.randint(0, 6)) for _ in range(top_k)] for _ in range(layers)]
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
def test_a_total_outside_the_model_is_refused(total: Any) -> None:
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
    ],
)
def test_impossible_sensitivities_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LayerSensitivity.from_dict({"measure": "any", "loss": ((1.0, 0.0),), **change})
