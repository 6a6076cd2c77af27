"""Damages with a compensation in place, sampled labels, hints, and the damage policy's replay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_record import STEP, Nudged, nll_with
from traces import OPTIONS

from damages import compensation_of, damage_model
from var_moe.calibration.fit_damage import fit_damage, predicted, tau_for
from var_moe.errors import UsageError
from var_moe.evaluation.perplexity import document_losses
from var_moe.execution.session import routed
from var_moe.models.loading import LoadedModel
from var_moe.routing.compensation import Compensation
from var_moe.routing.damage import DamagePolicy
from var_moe.routing.keeping import all_pairs, rank_slots
from var_moe.routing.simple import NativePolicy
from var_moe.tracing.first_order import loss_and_gradient
from var_moe.tracing.policies import evaluate_policy
from var_moe.tracing.record import record_trace

LAYERS, EXPERTS, HIDDEN, VOCABULARY = 3, 8, 64, 300


def made(top_k=2, *, rank=0, seed=0, scale=1.0):
    found = compensation_of(
        layers=LAYERS, experts=EXPERTS, hidden=HIDDEN, top_k=top_k, rank=rank, seed=seed
    )
    layers = tuple(part.mapped(lambda t: t * scale) for part in found.layers)
    return replace(found, layers=layers)


def changes(call, token, compensation, layer):
    """The change of one token's output by running its first k experts, k = 1..K-1."""
    _, hidden, outputs, index, weight = call
    rank = rank_slots(index, weight)[token]
    w, out, experts = weight[token][rank], outputs[token][rank], index[token][rank].tolist()
    part = compensation.layers[layer].to(hidden.device, hidden.dtype)
    correction = part.correction(hidden[token : token + 1])
    found = []
    for k in range(1, len(experts)):
        change = torch.zeros_like(out[0])
        for slot in range(k, len(experts)):
            row = experts[slot]
            if compensation.by_pair:
                row += experts[0] * compensation.experts
            instead = part.vectors[row] + (0 if correction is None else correction[0])
            change += w[slot] * (instead - out[slot])
        found.append(change)
    return found


def check_against_the_loss(model, tokenizer, document, top_k, rank):
    """a = g . d against a central difference of the loss itself."""
    loaded = LoadedModel.of(model.double(), tokenizer, name="tiny")
    compensation = made(top_k, rank=rank, scale=0.3)
    document = replace(document, ids=document.ids[:24])
    trace = record_trace(loaded, [document], compensation=compensation, **OPTIONS)
    assert trace.head["compensation_hash"] == compensation.hash
    assert trace.damage["cut_compensated"].shape == (LAYERS, 24, top_k - 1)
    ids = torch.from_numpy(document.ids)[None]
    whole = Nudged()
    nll_with(loaded.model, ids, whole)
    for layer, token in [(0, 1), (0, 11), (1, 5), (2, 20)]:
        for k, vector in enumerate(changes(whole.calls[layer], token, compensation, layer)):
            up, down = (
                nll_with(loaded.model, ids, Nudged(layer, token, sign * STEP * vector))
                for sign in (1, -1)
            )
            got = float(trace.damage["cut_compensated"][layer, token, k])
            assert got == pytest.approx((up - down) / (2 * STEP), rel=1e-2, abs=4e-3), (layer, k)
    return whole.calls[0][4].sum(1)  # of the router's weights


@pytest.mark.parametrize(("top_k", "rank"), [(2, 0), (2, 4), (3, 4)])
def test_compensated_cuts_are_what_the_loss_does(
    top_k, rank, make_tiny_mixtral, tiny_tokenizer, documents
):
    model = make_tiny_mixtral(top_k=top_k)
    check_against_the_loss(model, tiny_tokenizer, documents[0], top_k, rank)


@pytest.mark.parametrize("top_k", [2, 3])
def test_compensated_cuts_with_weights_of_any_sum(top_k, tiny_tokenizer, documents):
    """The compensation stands for the router's own weights, whatever shares a trace keeps."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=EXPERTS,
        num_experts_per_tok=top_k,
        norm_topk_prob=False,
        initializer_range=0.2,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), None),
    )
    model = OlmoeForCausalLM(config).eval().requires_grad_(False)
    sums = check_against_the_loss(model, tiny_tokenizer, documents[0], top_k, 4)
    assert sums.min() < 0.8


def test_zeros_cost_what_is_dropped(make_tiny_mixtral, tiny_tokenizer, documents):
    """Without anything in place of the dropped experts, and without rescaling.

    With e the effect of all experts on the loss, c the one of those that are kept, and m their
    share: rescaled cuts change the loss by c / m - e, and these by c - e. e is one, however many
    are kept.
    """
    loaded = LoadedModel.of(make_tiny_mixtral(top_k=3), tiny_tokenizer, name="tiny")
    zeros = made(3, scale=0.0)
    trace = record_trace(loaded, documents[:3], compensation=zeros, **OPTIONS)
    share = trace.weight.float().cumsum(dim=2)[:, :, :-1]
    bare, cut = trace.damage["cut_compensated"], trace.damage["cut"]
    everything = (cut - bare) / (1 / share - 1) - bare
    torch.testing.assert_close(everything[..., 0], everything[..., 1], rtol=2e-2, atol=2e-2)
    assert everything.abs().mean() > 0.1


def test_residual_means_cost_what_they_do_in_var(loaded, documents, profile, recorded):
    """K = 2: two ways to the same change."""
    means = Compensation.of_residual_means(profile.residuals)
    trace = record_trace(loaded, documents, compensation=means, **OPTIONS)
    found = trace.damage["cut_compensated"][:, :, 0]
    torch.testing.assert_close(found, recorded.damage["cut_residual"], rtol=1e-4, atol=1e-5)
    assert torch.equal(trace.damage["cut"], recorded.damage["cut"])
    assert "cut_compensated" not in recorded.damage


@pytest.fixture(scope="module")
def looking():
    """A damage model that looks at the layers' inputs, with a compensation."""
    found = damage_model(
        layers=LAYERS,
        experts=EXPERTS,
        top_k=2,
        vocabulary=VOCABULARY,
        hidden=HIDDEN,
        compensation=made(rank=4, scale=0.3),
    )
    return replace(found, out=0.3 * found.out)


@pytest.fixture(scope="module")
def traced(loaded, documents, looking):
    return record_trace(
        loaded,
        documents,
        compensation=looking.compensation,
        predictor=looking,
        hidden=True,
        **OPTIONS,
    )


class Shadow(NativePolicy):
    """Runs everything, and notes what another policy would drop."""

    def __init__(self, policy, layers):
        self.policy, self.kept = policy, [[] for _ in range(layers)]

    def begin(self, context):
        self.counted = context.counted.reshape(-1)
        self.policy.begin(context)

    def see(self, layer, hidden):
        self.policy.see(layer, hidden)

    def route(self, context, layer, index, weight):
        routing = self.policy.route(context, layer, index, weight)
        self.kept[layer].append((routing.index[self.counted] >= 0).sum(1))
        return all_pairs(index, weight)


def test_hints_are_what_the_policy_sees(traced, loaded, documents, looking):
    seen = [[] for _ in range(LAYERS)]

    class Spy(DamagePolicy):
        def begin(self, context):
            super().begin(context)
            self.counted = context.counted.reshape(-1)

        def see(self, layer, hidden):
            super().see(layer, hidden)
            seen[layer].append(self._hint[self.counted])

    policy = Spy(0.0, damage=looking)
    with routed(loaded.model, policy) as session:
        document_losses(loaded.model, documents, window=48, tokens_per_batch=300, session=session)
    found = torch.stack([torch.cat(row) for row in seen])
    assert found.std() > 0.1
    torch.testing.assert_close(traced.hint, found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", [1.3, 1.6])
def test_replay_decides_as_the_live_policy(wanted, traced, loaded, documents, looking):
    """With the router's own choices and the unmodified model's inputs, token by token."""
    tau = tau_for(predicted(traced, looking), wanted)
    shadow = Shadow(DamagePolicy(tau, damage=looking), LAYERS)
    with routed(loaded.model, shadow) as session:
        document_losses(loaded.model, documents, window=48, tokens_per_batch=300, session=session)
    kept = torch.stack([torch.cat(row) for row in shadow.kept])  # (L, N)
    found = evaluate_policy(traced, DamagePolicy(tau, damage=looking))
    assert found.report.experts_per_token == pytest.approx(wanted, abs=0.01)
    assert found.report.tokens == traced.tokens == kept.shape[1]
    for layer, pairs in enumerate(found.report.executed_pairs):
        # A decision may lie nearer to tau than shares in float16 tell.
        assert abs(pairs - int(kept[layer].sum())) <= 2, layer
    cut = traced.damage["cut_compensated"][:, :, 0][kept == 1].double()
    assert sum(found.first["cut"]) == pytest.approx(float(cut.sum()), rel=0.02, abs=0.5)
    # The first layer's input stays the same with pairs dropped.
    with routed(loaded.model, DamagePolicy(tau, damage=looking)) as session:
        document_losses(loaded.model, documents, window=48, tokens_per_batch=300, session=session)
        assert session.report().executed_pairs[0] == int(kept[0].sum())


def test_a_trace_of_another_predictor_is_refused(traced, looking):
    other = replace(looking, token=looking.token + 1)
    with pytest.raises(UsageError, match=r"looks at the layers' inputs.*predictor="):
        evaluate_policy(traced, DamagePolicy(0.1, damage=other))


def test_a_trace_of_another_compensation_is_refused(traced, recorded, looking):
    message = r"not the one that the trace was recorded with.*compensation="
    for trace, policy in (
        (traced, DamagePolicy(0.1, damage=replace(looking, compensation=made(seed=5)))),
        (recorded, DamagePolicy(0.1, damage=looking)),
        (recorded, NativePolicy().compensated(made())),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate_policy(trace, policy)


def test_a_policy_that_does_not_look_is_given_no_hints(traced):
    """They belong to the damage model that the trace was recorded with."""
    bare = damage_model(layers=LAYERS, experts=EXPERTS, top_k=2, vocabulary=VOCABULARY)
    tau = tau_for(predicted(replace(traced, hidden=None), bare), 1.5)
    found = evaluate_policy(traced, DamagePolicy(tau, damage=bare))
    assert found.report.experts_per_token == pytest.approx(1.5, abs=0.01)
    without = replace(traced, hint=None)
    assert found.report == evaluate_policy(without, DamagePolicy(tau, damage=bare)).report


def test_another_models_compensation_is_refused(loaded, documents):
    other = compensation_of(layers=LAYERS, experts=EXPERTS, hidden=32, top_k=2)
    with pytest.raises(UsageError, match=r"\(3, 8, 32\) does not fit a model of \(3, 8, 64\)"):
        record_trace(loaded, documents[:1], compensation=other, **OPTIONS)


def test_inputs_and_decisions_alone(traced, loaded, documents, recorded):
    plain = record_trace(loaded, documents, stored=False, hidden=True, **OPTIONS)
    assert set(plain.damage) == {"cut"}
    assert plain.hint is None
    torch.testing.assert_close(plain.damage["cut"], recorded.damage["cut"])
    assert torch.equal(plain.hidden, traced.hidden)
    assert plain.hidden.shape == (LAYERS, plain.tokens, HIDDEN)
    with torch.inference_mode():
        states = loaded.model.model.embed_tokens(plain.ids[:48])[None]
        layer = loaded.model.model.layers[0]
        place = torch.arange(48)[None]
        around = loaded.model.model.rotary_emb(states, place)
        normed = layer.input_layernorm(states)
        mask = torch.full((48, 48), -torch.inf).triu(1)[None, None]
        inner = layer.self_attn(normed, position_embeddings=around, attention_mask=mask)[0]
        expected = layer.post_attention_layernorm(states + inner)[0]
    torch.testing.assert_close(plain.hidden[0, :48].float(), expected, rtol=2e-3, atol=2e-3)


def test_sampled_labels_repeat_by_their_seed(loaded, documents, recorded):
    options = {**OPTIONS, "sampled_labels": True, "stored": False}
    one = record_trace(loaded, documents, seed=4, **options)
    two = record_trace(loaded, documents, seed=4, **options)
    other = record_trace(loaded, documents, seed=5, **options)
    assert torch.equal(one.damage["cut"], two.damage["cut"])
    assert not torch.allclose(one.damage["cut"], other.damage["cut"])
    assert torch.equal(one.nll, recorded.nll)  # of the text in any case
    assert torch.equal(one.nll, other.nll)
    assert torch.equal(one.index, recorded.index)


class KilledError(Exception):
    """The recording ends here."""


@pytest.mark.slow
def test_sampled_labels_resume(loaded, documents, tmp_path, looking, monkeypatch):
    monkeypatch.setattr("var_moe.tracing.record._FORWARDS_PER_SHARD", 2)
    options = {
        **OPTIONS,
        "sampled_labels": True,
        "stored": False,
        "hidden": True,
        "compensation": looking.compensation,
        "predictor": looking,
        "tokens_per_batch": 150,
    }
    whole = record_trace(loaded, documents, **options)
    calls = []

    def kill(done, total):
        calls.append(done)
        if len(calls) == 5:
            raise KilledError

    with pytest.raises(KilledError):
        record_trace(loaded, documents, folder=tmp_path, progress=kill, **options)
    resumed = []
    again = record_trace(
        loaded, documents, folder=tmp_path, progress=lambda *done: resumed.append(done), **options
    )
    assert 0 < len(resumed) <= whole.tokens // 100
    assert resumed[0][0] > calls[0]  # it did not begin anew
    assert again.columns().keys() == whole.columns().keys() >= {"hint", "hidden"}
    for name, value in whole.columns().items():
        assert torch.equal(again.columns()[name], value), name
    assert again.head["predictor_hash"] == looking.hash


def test_sampled_gradients_cancel():
    """Labels drawn from the model's own distribution: the expected gradient is zero.

    The mean square is that of a draw: p (1 - p) for each logit.
    """
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn((5,), generator=rng).expand(1, 20_001, 5)
    ids = torch.zeros((1, 20_001), dtype=torch.int64)
    target = torch.arange(1, 20_001)
    losses, gradient = loss_and_gradient(logits, ids, target, sample=rng)
    shares = logits[0, 0].softmax(-1)
    torch.testing.assert_close(losses, -shares[0].log().expand(20_000))
    rows = gradient[0, :-1]
    assert (gradient[0, -1] == 0).all()
    assert rows.mean(dim=0).abs().max() < 0.015
    torch.testing.assert_close(rows.square().mean(dim=0), shares * (1 - shares), rtol=0.05, atol=0)
    text = loss_and_gradient(logits, ids, target)[1][0, :-1]
    torch.testing.assert_close(text[0], shares - torch.tensor([1.0, 0, 0, 0, 0]))


@pytest.mark.parametrize("kind", ["cut", "cut_compensated"])
def test_replay_runs_as_many_experts_as_asked_for(kind, traced, looking):
    compensation = looking.compensation if kind == "cut_compensated" else None
    damage = fit_damage(traced, vocabulary=VOCABULARY, compensation=compensation, passes=2)
    sizes = predicted(traced, damage)
    again = replace(traced, hint=None, head={**traced.head, "predictor_hash": damage.hash})
    hints = [damage.layer(n, torch.device("cpu")).hint(traced.hidden[n]) for n in range(LAYERS)]
    again = replace(again, hint=torch.stack(hints))
    for wanted in (1.2, 1.5, 1.8):
        found = evaluate_policy(again, DamagePolicy(tau_for(sizes, wanted), damage=damage))
        assert found.report.experts_per_token == pytest.approx(wanted, abs=2e-3)
        assert found.degradation is not None


def test_without_damages_no_compensation_is_named(loaded, documents):
    found = record_trace(loaded, documents[:2], compensation=made(), damage=False, **OPTIONS)
    assert found.head["compensation_hash"] is None
    assert found.damage == {}
