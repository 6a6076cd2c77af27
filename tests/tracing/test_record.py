"""What a recording holds, against the model itself: decisions, losses, first-order damages."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from traces import OPTIONS

from var_moe.data.documents import EncodedDocument
from var_moe.errors import UsageError
from var_moe.evaluation.batching import batches
from var_moe.evaluation.perplexity import document_losses
from var_moe.execution.backends import open_backend
from var_moe.execution.backends.base import weighted_sum
from var_moe.execution.dispatch import dispatched
from var_moe.execution.session import routed
from var_moe.models.loading import LoadedModel
from var_moe.routing.keeping import leading_count, rank_slots
from var_moe.routing.simple import NativePolicy
from var_moe.tracing import record
from var_moe.tracing.record import record_trace

# Larger steps switch experts in later layers; smaller ones drown in the rounding of norms and
# router scores, which the model computes in float32 in any dtype.
STEP = 1e-3


class Native(NativePolicy):
    """Keeps all, and what the router decided about counted tokens."""

    def __init__(self, layers):
        self.seen = [[] for _ in range(layers)]

    def begin(self, context):
        self.counted = context.counted.reshape(-1)

    def route(self, context, layer, index, weight):
        rank = rank_slots(index, weight)
        pair = (index.gather(1, rank)[self.counted], weight.gather(1, rank)[self.counted])
        self.seen[layer].append(pair)
        return super().route(context, layer, index, weight)


def test_decisions_and_losses_are_those_of_scoring(recorded, loaded, documents):
    """In the order of `document_losses`, each counted token once."""
    policy = Native(recorded.layers)
    with routed(loaded.model, policy, backend="sorted") as session:
        losses = document_losses(
            loaded.model, documents, window=48, tokens_per_batch=300, session=session
        )
    for layer, seen in enumerate(policy.seen):
        index = torch.cat([index for index, _ in seen])
        weight = torch.cat([weight for _, weight in seen])
        assert torch.equal(recorded.index[layer].long(), index)
        assert torch.equal(recorded.weight[layer], weight.half())  # Mixtral's sum to one
    assert recorded.tokens == sum(len(document.ids) for document in documents)
    assert sorted(recorded.documents.tolist()) == list(range(len(documents)))
    assert max(len(document.ids) for document in documents) > 48
    for number, (start, end) in zip(
        recorded.documents.tolist(), pairwise(recorded.starts.tolist()), strict=True
    ):
        assert recorded.ids[start:end].tolist() == documents[number].ids.tolist()
        assert recorded.nll[start] == 0
        total = float(recorded.nll[start:end].double().sum())
        assert total == pytest.approx(losses.nll[number], rel=1e-6)
    assert [documents[i].id for i in recorded.documents] == recorded.head["document_ids"]
    assert recorded.places().max() == max(len(document.ids) for document in documents) - 1


def test_entropy_is_the_routers(recorded, loaded, documents):
    """The first window of the first document, by asking the model for its router logits."""
    document = documents[int(recorded.documents[0])]
    with torch.inference_mode():
        out = loaded.model(
            input_ids=torch.from_numpy(document.ids[:48])[None], output_router_logits=True
        )
    for layer, logits in enumerate(out.router_logits):
        shares = logits.softmax(-1)
        entropy = -(shares * shares.log()).sum(-1)
        torch.testing.assert_close(
            recorded.entropy[layer, :48].float(), entropy, rtol=2e-3, atol=1e-3
        )


def test_without_damage_the_decisions_are_the_same(recorded, loaded, documents):
    plain = record_trace(loaded, documents, damage=False, **OPTIONS)
    assert plain.damage == {}
    assert plain.nll is None
    for name in ("ids", "starts", "documents", "index", "weight", "entropy"):
        assert torch.equal(getattr(plain, name), getattr(recorded, name)), name


class Nudged:
    """An experts session that adds a vector to one token's output in one layer."""

    def __init__(self, layer=-1, token=0, vector=None):
        self.at = (layer, token)
        self.vector = vector
        self.calls = {}
        self._run = open_backend("sorted")

    def experts(self, layer, module, hidden, index, weight):
        outputs = self._run.pairs(module, hidden, index)
        self.calls[layer] = (module, hidden.clone(), outputs.clone(), index, weight)
        out = weighted_sum(outputs, weight, hidden.dtype)
        if layer == self.at[0]:
            out[self.at[1]] += self.vector
        return out


def nll_with(model, ids, session):
    """Summed loss of one document, in float64."""
    with dispatched(model, session), torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[0].double()
    return float(-logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None]).sum())


def changes(call, token, means, layer):
    """The changes of one token's output by each kind of damage, straight from their words."""
    _, _, outputs, index, weight = call
    rank = rank_slots(index, weight)[token]
    w, out = weight[token][rank], outputs[token][rank]
    experts, top_k = index[token][rank], len(rank)
    lead, full = leading_count(top_k), (w[:, None] * out).sum(0)

    def run(ranks):
        return w.sum() * (w[ranks, None] * out[ranks]).sum(0) / w[ranks].sum() - full

    found = {f"cut {k}": run(list(range(k))) for k in range(1, top_k)}
    found["next"] = run([rank % top_k for rank in range(lead, 2 * lead)])
    kept = (w[:lead, None] * out[:lead]).sum(0)
    row = int(experts[0])
    row = row * means.experts + int(experts[-1]) if means.by_pair else row
    found["cut_residual"] = kept + w[lead:].sum() * means.table[layer][row] - full
    return found


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_damages_are_what_the_loss_does(
    top_k, make_tiny_mixtral, tiny_tokenizer, documents, make_profile
):
    """a = g . d against a central difference of the loss itself."""
    model = make_tiny_mixtral(top_k=top_k).double()
    loaded = LoadedModel.of(model, tiny_tokenizer, name="tiny")
    profile = make_profile(loaded)
    document = replace(documents[0], ids=documents[0].ids[:30])
    trace = record_trace(loaded, [document], profile=profile, **OPTIONS)
    assert trace.damage["cut"].shape == (3, 30, top_k - 1)
    ids = torch.from_numpy(document.ids)[None]
    whole = Nudged()
    nll_with(model, ids, whole)
    for layer, token in [(0, 0), (0, 11), (1, 5), (2, 20), (2, 28)]:
        found = changes(whole.calls[layer], token, profile.residuals, layer)
        if top_k == 1:
            assert trace.damage["cut_residual"][layer, token] == 0
            assert abs(trace.damage["next"][layer, token]) < 1e-6
            continue
        for kind, vector in found.items():
            name, _, k = kind.partition(" ")
            got = trace.damage[name][layer, token]
            got = float(got[int(k) - 1] if k else got)
            up, down = (
                nll_with(model, ids, Nudged(layer, token, sign * STEP * vector)) for sign in (1, -1)
            )
            assert got == pytest.approx((up - down) / (2 * STEP), rel=1e-2, abs=4e-3), (kind, layer)


def test_foreign_experts_are_none_of_the_chosen(loaded, documents, monkeypatch):
    """Their outputs, weighted as the leading ones, make the damage of this kind."""
    from var_moe.tracing.first_order import DamageProbe

    drawn = []
    draw = DamageProbe._draw

    def spy(self, layer, index, experts):
        drawn.append((index, draw(self, layer, index, experts)))
        return drawn[-1][1]

    monkeypatch.setattr(DamageProbe, "_draw", spy)
    document = replace(documents[0], ids=documents[0].ids[:20])
    trace = record_trace(loaded, [document], **OPTIONS)
    ids = torch.from_numpy(document.ids)[None]
    whole = Nudged()
    nll_with(loaded.model, ids, whole)
    for layer, (index, foreign) in enumerate(drawn):
        assert foreign.shape == (20, 1)
        assert not (index == foreign).any()
        module, hidden, outputs, _, weight = whole.calls[layer]
        theirs = (
            open_backend("sorted").pairs(module, hidden, foreign)[:, 0] * weight.sum(1)[:, None]
        )
        change = theirs - weighted_sum(outputs, weight, hidden.dtype)
        up, down = (
            nll_with(loaded.model, ids, Nudged(layer, 7, sign * 1e-3 * change[7]))
            for sign in (1, -1)
        )
        got = float(trace.damage["foreign"][layer, 7])
        assert got == pytest.approx((up - down) / 2e-3, rel=2e-2, abs=2e-3)


def test_few_or_no_foreign_experts(make_tiny_mixtral, tiny_tokenizer, documents):
    for experts, top_k in ((4, 4), (4, 3)):
        model = make_tiny_mixtral(experts=experts, top_k=top_k, layers=2)
        trace = record_trace(
            LoadedModel.of(model, tiny_tokenizer, name="tiny"), documents[:2], **OPTIONS
        )
        same = torch.equal(trace.damage["foreign"], trace.damage["next"])
        assert same == (experts == top_k)
        assert torch.isfinite(trace.damage["foreign"]).all()


def test_the_model_is_left_as_it_was(loaded, documents):
    def state():
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in loaded.model.modules()]
        wants = [(p.requires_grad, p.grad) for p in loaded.model.parameters()]
        return hooks, wants, loaded.model.get_experts_implementation(), torch.is_grad_enabled()

    before = state()
    record_trace(loaded, documents[:2], **OPTIONS)
    assert state() == before


def test_parameters_that_want_gradients_get_none(make_tiny_mixtral, tiny_tokenizer, documents):
    model = make_tiny_mixtral(layers=2).requires_grad_(True)
    with torch.inference_mode():
        record_trace(LoadedModel.of(model, tiny_tokenizer, name="t"), documents[:2], **OPTIONS)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_without_a_backward_pass(loaded, documents, monkeypatch):
    forward = type(loaded.model).forward

    @torch.no_grad()
    def closed(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(loaded.model), "forward", closed)
    with pytest.raises(UsageError, match=r"'tiny': no backward pass .*damage=False"):
        record_trace(loaded, documents[:2], **OPTIONS)
    assert record_trace(loaded, documents[:2], damage=False, **OPTIONS).tokens > 0


def test_a_part_of_the_text_keeps_its_positions(loaded, documents):
    trace = record_trace(loaded, documents, damage=False, max_tokens=200, seed=3, **OPTIONS)
    assert trace.tokens == 200
    for number, name, start in zip(
        trace.documents.tolist(), trace.head["document_ids"], trace.starts.tolist(), strict=False
    ):
        assert documents[number].id == name
        assert documents[number].ids[0] == trace.ids[start]
        assert documents[number].ids[1] == trace.ids[start + 1]


def test_no_text(loaded):
    with pytest.raises(UsageError, match="no text to trace"):
        record_trace(loaded, [], **OPTIONS)
    empty = EncodedDocument(id="e", source="s", ids=np.zeros(0, dtype=np.int64))
    with pytest.raises(UsageError, match="no text to trace"):
        record_trace(loaded, [empty], **OPTIONS)


def test_windows_stay_in_order_and_documents_whole(recorded, documents):
    rows = [row for rows in batches(documents, 300, window=48) for row in rows]
    order = list(dict.fromkeys(row.document for row in rows))
    assert recorded.documents.tolist() == order
    assert len(rows) > len(order)


def altered(monkeypatch, change):
    """Record as if the model's routers gave ``change(index, weight)``."""
    experts = record.Recorder.experts

    def other(self, layer, module, hidden, index, weight):
        return experts(self, layer, module, hidden, *change(index, weight))

    monkeypatch.setattr(record.Recorder, "experts", other)


def test_the_order_of_slots_changes_nothing(recorded, loaded, documents, profile, monkeypatch):
    altered(monkeypatch, lambda index, weight: (index.flip(1), weight.flip(1)))
    other = record_trace(loaded, documents, profile=profile, **OPTIONS)
    assert torch.equal(other.index, recorded.index)
    assert torch.equal(other.weight, recorded.weight)
    for name, value in recorded.damage.items():
        torch.testing.assert_close(other.damage[name], value, rtol=1e-3, atol=1e-3)


def test_weights_are_shares_of_any_sum(loaded, documents, monkeypatch):
    """Large scales do not overflow; a token without weight has zeros, not nan."""

    def scaled(index, weight):
        weight = weight * 3e5
        return index, torch.cat((torch.zeros_like(weight[:1]), weight[1:]))

    altered(monkeypatch, scaled)
    document = replace(documents[0], ids=documents[0].ids[:20])
    trace = record_trace(loaded, [document], **OPTIONS)
    sums = trace.weight.double().sum(dim=2)
    assert sums[:, 1:] == pytest.approx(1.0, abs=1e-3)
    assert (sums[:, 0] == 0).all()
    assert torch.isfinite(trace.damage["cut"]).all()
