"""Damages, the damage policy and a compensation, from calibration to use, family by family.

Nothing in them is made for a family: they must work with any K, with weights that sum to one or
not, with softmax and sigmoid routers, with biases, and where experts work in a smaller space.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from contract import Failing, differences, eager, logits, snapshot, watched

from damages import compensation_of, damage_model
from families import find_families, tiny_ids, tiny_model
from var_moe.calibration.calibrate import calibration_trace
from var_moe.calibration.collect import collect_profile
from var_moe.calibration.fit_compensation import FitSettings, fit_compensation
from var_moe.calibration.fit_damage import fit_damage, predicted, tau_for
from var_moe.config import VARConfig
from var_moe.data.documents import TextDocument
from var_moe.data.encoding import encode
from var_moe.errors import UsageError
from var_moe.execution.session import routed
from var_moe.models.loading import LoadedModel
from var_moe.models.moe_layers import experts_shape
from var_moe.routing.compensation import Compensation
from var_moe.routing.damage import DamageModel, DamagePolicy
from var_moe.routing.simple import NativePolicy
from var_moe.routing.var import VARPolicy

DATA = {"dataset": "tiny", "data_hash": "h"}
QUICK = FitSettings(rank=4, regress_tokens=4000, tokens=1500, tokens_per_batch=400, rate=1e-2)
SHARE = 0.75

# By name: the modeling module, K, changes of its configuration, whether weights sum to one.
ROWS: dict[str, tuple[str, int, dict[str, Any], bool]] = {
    "mixtral": ("mixtral", 2, {}, True),
    "olmoe, top 8": ("olmoe", 8, {"experts": 16, "norm_topk_prob": False}, False),
    "qwen3_moe": ("qwen3_moe", 4, {"norm_topk_prob": True}, True),
    "qwen2_moe": ("qwen2_moe", 2, {"norm_topk_prob": False}, False),
    "deepseek_v3, sigmoid": ("deepseek_v3", 4, {"topk_group": 4}, False),
    "gpt_oss, biases": ("gpt_oss", 4, {}, True),
    "nemotron_h, latent experts": ("nemotron_h", 2, {}, True),
}
FAST = ("mixtral", "nemotron_h, latent experts")


@dataclass
class Fitted:
    """A tiny model of a family with everything that was fitted to it."""

    loaded: LoadedModel
    damage: DamageModel
    tau: float
    start: Compensation


@pytest.fixture(scope="module")
def documents(tiny_texts, tiny_tokenizer):
    """Without the first id: the padding of some families, whose embedding is zero.

    All experts are equal to it, and the least that a compensation adds decides between them.
    """
    texts = [TextDocument(str(i), "s", text) for i, text in enumerate(tiny_texts[:14])]
    return [replace(one, ids=one.ids[1:]) for one in encode(texts, tiny_tokenizer)]


def _rows() -> list[Any]:
    marks = {name: [] if name in FAST else [pytest.mark.slow] for name in ROWS}
    return [pytest.param(ROWS[name], id=name, marks=marks[name]) for name in ROWS]


@pytest.fixture(scope="module", params=_rows())
def fitted(request, documents, tiny_tokenizer):
    module, top_k, changes, normalised = request.param
    family = next(one for one in find_families() if one.module == module)
    model = tiny_model(family, top_k=top_k, **changes)
    loaded = LoadedModel.of(model, tiny_tokenizer, name=module)
    assert loaded.top_k == top_k
    with watched(model) as calls:
        logits(model, tiny_ids())
    sums = torch.cat([call.weight.sum(1) for call in calls])
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-3) == normalised
    trace = calibration_trace(loaded, documents, data=DATA, compensation=None)
    damage = fit_damage(trace, vocabulary=300)
    tau = tau_for(predicted(trace, damage), SHARE * top_k)
    shape = experts_shape(model)
    means = compensation_of(**shape, top_k=top_k, rank=0)
    start = means if top_k == 2 else Compensation.empty(**shape)
    zeros = tuple(part.mapped(torch.zeros_like) for part in start.layers)
    start = Compensation(layers=zeros, by_pair=start.by_pair, experts=start.experts)
    return Fitted(loaded, damage, tau, start)


def test_the_damage_policy_runs_as_many_pairs_as_asked_for(fitted):
    model, ids = fitted.loaded.model, tiny_ids()
    before, untouched = snapshot(model), logits(model, ids)
    with routed(model, DamagePolicy(fitted.tau, damage=fitted.damage)) as session:
        found = logits(model, ids)
        kept = session.report().experts_per_token / fitted.loaded.top_k
    assert found.isfinite().all()
    assert not torch.equal(found, untouched)
    # Other text than was calibrated on, and later layers see what cuts left.
    assert 0.5 < kept < 0.95
    assert differences(before, snapshot(model)) == []
    assert torch.equal(logits(model, ids), untouched)


@pytest.mark.slow
def test_a_compensation_is_fitted_and_used(fitted, documents):
    loaded, ids = fitted.loaded, tiny_ids()
    before = snapshot(loaded.model)
    compensation, fit = fit_compensation(
        loaded,
        documents,
        damage=fitted.damage,
        taus=[fitted.tau / 3, fitted.tau * 3],
        start=fitted.start,
        settings=QUICK,
    )
    held_out = fit["held_out_divergence_nats"]
    assert held_out["fitted"] < min(held_out["start"], held_out["nothing"])
    assert differences(before, snapshot(loaded.model)) == []
    trace = calibration_trace(loaded, documents, data=DATA, compensation=compensation)
    damage = fit_damage(trace, vocabulary=300, compensation=compensation)
    tau = tau_for(predicted(trace, damage), SHARE * loaded.top_k)
    with routed(loaded.model, DamagePolicy(tau, damage=damage)) as session:
        assert logits(loaded.model, ids).isfinite().all()
        assert 0.5 < session.report().experts_per_token / loaded.top_k < 0.95
    assert differences(before, snapshot(loaded.model)) == []


@pytest.mark.parametrize("rank", [0, 3])
def test_keeping_all_with_a_compensation_changes_nothing(fitted, rank):
    model, ids = fitted.loaded.model, tiny_ids()
    shape = experts_shape(model)
    compensation = compensation_of(**shape, top_k=fitted.loaded.top_k, rank=rank)
    own = model.get_experts_implementation()
    expected = logits(model, ids, "grouped_mm")
    model.set_experts_implementation(own)
    for policy in (NativePolicy(), DamagePolicy(0.0, damage=fitted.damage)):
        policy.compensation = compensation
        with routed(model, policy, backend="sorted") as session:
            assert torch.equal(logits(model, ids), expected)
            assert session.report().experts_per_token == fitted.loaded.top_k


class Noting(DamagePolicy):
    """Notes what it decides."""

    def __init__(self, tau, *, damage):
        super().__init__(tau, damage=damage)
        self.decided = []

    def route(self, context, layer, index, weight):
        self.decided.append(super().route(context, layer, index, weight))
        return self.decided[-1]


def test_a_compensation_is_in_place_where_pairs_are_dropped(fitted):
    """A layer's output against the words: kept pairs as the router weighs them, and a stand-in."""
    model = fitted.loaded.model
    compensation = compensation_of(**experts_shape(model), top_k=fitted.loaded.top_k, rank=3)
    policy = Noting(fitted.tau, damage=fitted.damage)
    policy.compensation = compensation
    with watched(model) as calls, routed(model, policy):
        logits(model, tiny_ids())
    seen = 0
    for part, call, routing in zip(compensation.layers, calls, policy.decided, strict=True):
        cut = (routing.index < 0).any(1).nonzero()[:3, 0].tolist()
        for token in cut:
            expected = eager(call, routing.index, call.weight)[token]
            pairs = list(zip(call.index[token].tolist(), call.weight[token].tolist(), strict=True))
            first = min(pairs, key=lambda pair: (-pair[1], pair[0]))[0]
            inner = torch.nn.functional.silu(part.down @ call.hidden[token] + part.bias)
            for slot in (routing.index[token] < 0).nonzero()[:, 0].tolist():
                expert, weight = pairs[slot]
                row = first * compensation.experts + expert if compensation.by_pair else expert
                expected = expected + weight * (part.vectors[row] + part.up @ inner)
            torch.testing.assert_close(call.output[token], expected, rtol=1e-4, atol=1e-5)
        seen += len(cut)
    assert seen > 3


def test_another_models_compensation_is_refused(fitted):
    model = fitted.loaded.model
    shape = experts_shape(model)
    policy = NativePolicy()
    for name in shape:
        other = {**shape, name: shape[name] + 1}
        policy.compensation = compensation_of(**other, top_k=fitted.loaded.top_k)
        with (
            pytest.raises(UsageError, match=r"compensation for .* does not fit a model of"),
            routed(model, policy),
        ):
            pass
        assert "var_moe" not in str(model.get_experts_implementation())


def test_after_an_exception_the_model_is_as_before(fitted):
    model, ids = fitted.loaded.model, tiny_ids()
    before, untouched = snapshot(model), logits(model, ids)
    policy = Failing()
    policy.compensation = compensation_of(**experts_shape(model), top_k=fitted.loaded.top_k, rank=2)
    with pytest.raises(RuntimeError, match="policy failed"), routed(model, policy):
        logits(model, ids)
    assert differences(before, snapshot(model)) == []
    assert torch.equal(logits(model, ids), untouched)


@pytest.fixture(scope="module")
def mixtral(make_tiny_mixtral, tiny_tokenizer):
    return LoadedModel.of(make_tiny_mixtral(), tiny_tokenizer, name="tiny")


def test_residual_means_are_verified_vars_own(mixtral, documents):
    """The same decisions, and outputs that differ by rounding."""
    profile = collect_profile(mixtral, documents, **DATA, max_tokens=None)
    config = VARConfig(confidence_threshold=0.6, context_window_size=1, frequency_threshold=2)
    means = Compensation.of_residual_means(profile.residuals)
    own, same = (VARPolicy(config, profile.table(), residuals=profile.residuals) for _ in range(2))
    found, reports = [], []
    for policy in (own, same.compensated(means)):
        with routed(mixtral.model, policy) as session:
            found.append(logits(mixtral.model, tiny_ids()))
            reports.append(session.report())
    assert reports[0] == reports[1]
    assert 1.05 < reports[0].experts_per_token < 1.95
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
    rescaled = VARPolicy(config, profile.table(), residuals=profile.residuals)
    rescaled.residuals = None
    with routed(mixtral.model, rescaled):
        assert (logits(mixtral.model, tiny_ids()) - found[0]).abs().max() > 0.05


def test_generation_goes_on_from_a_cache_as_scoring_would(mixtral):
    """Token by token, through the path of one token, with pairs dropped and stood in for."""
    shape = experts_shape(mixtral.model)
    damage = damage_model(
        layers=shape["layers"],
        experts=shape["experts"],
        top_k=2,
        vocabulary=300,
        hidden=shape["hidden"],
        compensation=compensation_of(**shape, top_k=2, rank=2),
    )
    policy, ids = DamagePolicy(2e-4, damage=damage), tiny_ids(rows=1, length=12)
    with torch.inference_mode(), routed(mixtral.model, policy) as session:
        whole = mixtral.model(ids, use_cache=False).logits[0]
        kept = session.report().experts_per_token
        cache, steps = None, []
        for token in ids[0].split(1):
            out = mixtral.model(token[None], cache=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits[0, 0])
    assert 1.05 < kept < 1.95
    torch.testing.assert_close(torch.stack(steps), whole, rtol=1e-3, atol=1e-3)
