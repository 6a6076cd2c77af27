"""Executed experts, token by token, against routings made by hand."""

from __future__ import annotations

import pytest
import torch

from var_moe.routing.fixed_k import FixedKPolicy
from var_moe.routing.top_p import TopPPolicy
from var_moe.tracing.executed import executed_experts, share_alike
from var_moe.tracing.policies import replay_policy
from var_moe.tracing.trace import RoutingTrace


@pytest.fixture
def by_hand():
    """Two documents of two and one tokens, one layer, K = 2."""
    return RoutingTrace(
        ids=torch.tensor([5, 6, 7]),
        starts=torch.tensor([0, 2, 3]),
        documents=torch.tensor([0, 1]),
        index=torch.tensor([[[4, 1], [0, 3], [2, 7]]], dtype=torch.int16),
        weight=torch.tensor([[[0.9, 0.1], [0.6, 0.4], [0.7, 0.3]]], dtype=torch.float16),
        entropy=torch.ones(1, 3, dtype=torch.float16),
        head={},
    )


def test_all_experts_and_the_first_alone(by_hand):
    all_pairs = executed_experts(by_hand, FixedKPolicy(2))
    assert all_pairs.tolist() == [[[4, 1], [3, 0], [7, 2]]]  # ids, descending
    first = executed_experts(by_hand, FixedKPolicy(1))
    assert first.tolist() == [[[4, -1], [0, -1], [2, -1]]]


def test_a_share_is_alike(by_hand):
    """p = 0.65 cuts the first and the last token."""
    some = executed_experts(by_hand, TopPPolicy(0.65))
    assert some.tolist() == [[[4, -1], [3, 0], [2, -1]]]
    assert share_alike(some, executed_experts(by_hand, FixedKPolicy(2))) == pytest.approx(1 / 3)
    assert share_alike(some, executed_experts(by_hand, FixedKPolicy(1))) == pytest.approx(2 / 3)
    assert share_alike(some, some) == 1.0


def test_executed_pairs_are_those_of_the_replay(by_hand):
    policy = TopPPolicy(0.65)
    found = (executed_experts(by_hand, policy) >= 0).sum()
    assert int(found) == sum(replay_policy(by_hand, policy).executed_pairs)
