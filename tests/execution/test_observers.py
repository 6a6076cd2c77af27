"""What observers are told, and what they keep alive."""

from __future__ import annotations

import weakref

import pytest
import torch
from contract import Failing, logits

from var_moe.execution.backends import open_backend
from var_moe.execution.session import routed
from var_moe.routing.counts import TierCounts
from var_moe.routing.decision import ForwardContext, Observer
from var_moe.routing.keeping import all_pairs
from var_moe.routing.simple import TopPPolicy


@pytest.fixture(scope="module")
def model(make_tiny_mixtral):
    return make_tiny_mixtral()


class Remembering(TopPPolicy):
    """Notes weakly what it has decided."""

    def __init__(self) -> None:
        super().__init__(p=0.6)
        self.routings = []

    def route(self, context, layer, index, weight):
        routing = super().route(context, layer, index, weight)
        self.routings.append(weakref.ref(routing.index))
        return routing


def test_a_generations_decisions_are_not_kept(model):
    """At most those of the last forward: there may be thousands of them."""
    policy = Remembering()
    with routed(model, policy) as session:
        out = model.generate(torch.tensor([[9, 10, 11]]), max_new_tokens=20, do_sample=False)
        alive = sum(one() is not None for one in policy.routings)
        assert len(policy.routings) > 40
        assert alive <= 3  # layers
        assert session.report().tokens == out.shape[1] - 1


def test_large_forwards_are_counted_layer_by_layer():
    """So that the tensors of one layer are alive, not those of all."""
    counts, context = TierCounts(2), ForwardContext.of(torch.zeros((8, 512), dtype=torch.int64))
    index = torch.tensor([[0, 1]]).repeat(4096, 1)
    weight = torch.full(index.shape, 0.5)
    counts.begin(context)
    for layer in range(2):
        seen = all_pairs(index.clone(), weight)
        counts.see(layer, context, seen, index, weight)
        alive = weakref.ref(seen.index)
        del seen
        assert alive() is None
    counts.end()
    assert counts.report()["executed_pairs"] == (8192, 8192)


class Noting(Observer):
    def __init__(self) -> None:
        self.calls = []

    def begin(self, context):
        self.calls.append("begin")

    def see(self, layer, context, routing, index, weight):
        self.calls.append(layer)

    def end(self):
        self.calls.append("end")


def test_a_forward_that_fails_does_not_end(model):
    """The next one begins instead; nothing of the failed one is counted."""
    noting, policy = Noting(), Failing(layer=1)
    with routed(model, policy, backend=open_backend("sorted")) as session:
        session._observers += (noting,)
        with pytest.raises(RuntimeError, match="policy failed"):
            logits(model, torch.tensor([[1, 2]]))
        policy.layer = 7
        logits(model, torch.tensor([[1, 2, 3]]))
        assert session.report().tokens == 3
    assert noting.calls == ["begin", 0, "begin", 0, 1, 2, "end"]


def test_any_observer_may_end_the_policys_decisions(model):
    class Ending(Observer):
        native = False

    ending, ids = Ending(), torch.tensor([[1, 2, 3, 4]])
    expected = logits(model, ids, "grouped_mm")
    with routed(model, TopPPolicy(p=0.1), backend="packed") as session:
        session._observers += (ending,)
        assert not torch.allclose(logits(model, ids), expected, rtol=1e-2)
        ending.native = True
        assert torch.equal(logits(model, ids), expected)  # rounded as the model itself does
