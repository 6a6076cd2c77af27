"""What a router's logits mean, told from its decisions: against scores made here."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from var_moe.models.moe_layers import entropy, find_score

SCORES = {
    "softmax": lambda logits: logits.softmax(1),
    "sigmoid": torch.sigmoid,
    "square root of softplus": lambda logits: F.softplus(logits).sqrt(),
}


@pytest.fixture
def router_logits():
    return torch.randn(40, 16, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [None, 1.0, 2.5], ids=["as-is", "normalised", "scaled"])
@pytest.mark.parametrize("name", SCORES)
def test_a_score_is_told_from_the_weights(router_logits, name, scale, dtype):
    scores = SCORES[name](router_logits)
    weight, index = scores.topk(2, dim=1)
    if scale is not None:
        weight = scale * weight / weight.sum(1, keepdim=True)
    found = find_score(router_logits, index, weight.to(dtype))
    torch.testing.assert_close(found(router_logits), scores)


def test_a_correction_bias_or_another_order_of_slots_changes_nothing(router_logits):
    scores = router_logits.sigmoid()
    bias = torch.linspace(0.5, -0.5, 16)
    index = (scores + bias).topk(4, dim=1).indices.flip(1)
    found = find_score(router_logits, index, scores.gather(1, index))
    torch.testing.assert_close(found(router_logits), scores)


def test_recorded_probabilities_are_taken_as_they_are(router_logits):
    recorded = router_logits.softmax(1)
    weight, index = recorded.topk(2, dim=1)
    found = find_score(recorded, index, weight / weight.sum(1, keepdim=True))
    torch.testing.assert_close(found(recorded), recorded)


def test_weights_that_no_score_explains_leave_softmax(router_logits):
    index = router_logits.topk(2, dim=1).indices
    weight = torch.tensor([[0.9, 0.1]]).expand(40, 2)
    found = find_score(router_logits, index, weight)
    torch.testing.assert_close(found(router_logits), router_logits.softmax(1))


@pytest.mark.parametrize("top_k", [1, 2])
def test_tokens_without_any_weight_say_nothing(router_logits, top_k):
    index = router_logits.topk(top_k, dim=1).indices
    found = find_score(router_logits, index, torch.zeros(40, top_k))
    torch.testing.assert_close(found(router_logits), router_logits.softmax(1))


def test_entropy_by_hand():
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0], [3.0, 1.0, 0.0, 0.0], [0.0, 5.0, 0.0, 0.0]])
    second = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(entropy(scores), torch.tensor([math.log(4), second, 0.0]))
