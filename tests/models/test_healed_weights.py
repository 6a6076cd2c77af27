"""Healed weights are in place within `routed` and `record_trace`, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from var_moe.errors import UsageError
from var_moe.execution.session import routed
from var_moe.models.healed_weights import healed_weights
from var_moe.routing.compensation import Compensation
from var_moe.routing.healed import Healed
from var_moe.routing.native import NativePolicy

GATE, DOWN = "model.layers.1.mlp.gate.weight", "model.layers.0.mlp.experts.down_proj"
IDS = torch.arange(40).reshape(2, 20)


class OddError(Exception):
    """Something else went wrong."""


@pytest.fixture
def model(make_tiny_mixtral):
    return make_tiny_mixtral(layers=2)


@pytest.fixture
def changes():
    dice = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=dice) * 0.3

    return {
        GATE: (draw(8, 64),),
        "model.norm.weight": (draw(64),),
        DOWN: (draw(8, 64, 3), draw(8, 3, 96)),
    }


def policy(changes):
    healed = Healed(changes)
    empty = Compensation.empty(layers=2, experts=8, hidden=64)
    return NativePolicy().compensated(replace(empty, healed=healed))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def by_hand(model, changes):
    """The logits of a copy whose weights are changed for good."""
    from copy import deepcopy

    other = deepcopy(model)
    named = dict(other.named_parameters())
    with torch.no_grad():
        for name, change in changes.items():
            named[name] += change[0] if len(change) == 1 else torch.matmul(*change)
    return logits(other)


def state(model):
    return [
        (name, id(p), p.data_ptr(), p._version, p.requires_grad)
        for name, p in model.named_parameters()
    ]


def test_they_are_in_place_inside_and_gone_outside(model, changes):
    before, own, wanted = logits(model), state(model), by_hand(model, changes)
    with routed(model, policy(changes)):
        assert not torch.allclose(wanted, before, atol=0.1)
        torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(model), before)
    assert state(model) == own


@pytest.mark.parametrize("inference", [False, True])
def test_an_exception_takes_them_away(inference, model, changes):
    before, own = logits(model), state(model)

    def fail():
        with torch.inference_mode(inference), routed(model, policy(changes)):
            model(IDS)
            raise OddError

    with pytest.raises(OddError):
        fail()
    assert torch.equal(logits(model), before)
    assert state(model) == own


def test_refused_nesting_leaves_the_running_session_alone(model, changes):
    before, wanted = logits(model), by_hand(model, changes)
    with routed(model, policy(changes)):
        with (
            pytest.raises(UsageError, match="routed already"),
            routed(model, policy(changes)),
        ):
            pass
        torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(model), before)


def test_sessions_in_turn_do_not_add_up(model, changes):
    before, same = logits(model), policy(changes)
    found = []
    for _ in range(3):
        with routed(model, same):
            found.append(logits(model))
        assert torch.equal(logits(model), before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_entering_again_makes_nothing_anew_unless_the_model_changed(model, changes):
    healed, gate = Healed(changes), dict(model.named_parameters())[GATE]
    places = []
    for _ in range(2):
        with healed_weights(model, healed):
            places.append(gate.data_ptr())
    assert places[0] == places[1] != gate.data_ptr()
    with torch.no_grad():
        gate += 1  # such as load_state_dict does
    with healed_weights(model, healed):
        wanted = changes[GATE][0]
        inside = gate.data.clone()
    torch.testing.assert_close(inside - gate.data, wanted)


def test_half_precision_adds_in_float32(model, changes):
    model = model.to(torch.bfloat16)
    gate = dict(model.named_parameters())[GATE]
    own = gate.data.clone()
    with healed_weights(model, Healed(changes)):
        assert gate.dtype == torch.bfloat16
        assert torch.equal(gate.data, (own.float() + changes[GATE][0]).to(torch.bfloat16))
    assert torch.equal(gate.data, own)


@pytest.mark.parametrize(
    "change",
    [
        {"model.layers.7.mlp.gate.weight": (torch.zeros(8, 64),)},
        {GATE: (torch.zeros(8, 63),)},
        {DOWN: (torch.zeros(8, 64, 3), torch.zeros(8, 3, 95))},
    ],
    ids=["name", "shape", "factors"],
)
def test_those_of_another_model_are_refused(change, model):
    before = logits(model)
    with pytest.raises(UsageError, match="do not fit the model"), routed(model, policy(change)):
        pass
    assert torch.equal(logits(model), before)
    with routed(model, NativePolicy()):  # the refused session has left nothing
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_they_are_part_of_a_compensations_identity(changes):
    bare = Compensation.empty(layers=2, experts=8, hidden=64)
    healed = replace(bare, healed=Healed(changes))
    assert healed.hash != bare.hash
    other = {**changes, "model.norm.weight": (torch.zeros(64),)}
    assert replace(bare, healed=Healed(other)).hash != healed.hash
    assert healed.to(torch.device("cpu"), torch.float32).healed is healed.healed


def test_a_trace_is_of_the_healed_model(model, changes, tiny_tokenizer, tiny_texts):
    from var_moe.calibration.norms import norm_trace
    from var_moe.data.text import TextDocument, encode
    from var_moe.models.loading import LoadedModel
    from var_moe.tracing.policies import evaluate_policy
    from var_moe.tracing.record import record_trace

    loaded = LoadedModel.of(model, tiny_tokenizer, name="tiny")
    texts = [TextDocument(f"d{i}", "s", text) for i, text in enumerate(tiny_texts[:4])]
    documents = encode(texts, tiny_tokenizer)
    compensation = policy(changes).compensation
    data = {"dataset": "tiny", "data_hash": "h"}
    before = logits(model)
    trace = record_trace(loaded, documents, compensation=compensation, **data)
    assert torch.equal(logits(model), before)
    with routed(model, policy(changes)), torch.no_grad():
        wanted = 0.0
        for document in documents:
            ids = torch.from_numpy(document.ids)[None]
            shares = model(ids).logits[0, :-1].log_softmax(-1)
            wanted -= float(shares.gather(1, ids[0, 1:, None]).sum())
    assert float(trace.nll.sum()) == pytest.approx(wanted, rel=1e-4)
    evaluate_policy(trace, policy(changes))
    with_inputs = record_trace(loaded, documents, compensation=compensation, hidden=True, **data)
    without_backward = norm_trace(loaded, documents, compensation=compensation, tokens=10_000)
    assert torch.equal(logits(model), before)
    totals = [one.hidden.float().sum(dim=(1, 2)) for one in (with_inputs, without_backward)]
    torch.testing.assert_close(*totals, rtol=1e-3, atol=1e-1)
    with pytest.raises(UsageError, match="recorded with healed weights"):
        evaluate_policy(trace, NativePolicy())
