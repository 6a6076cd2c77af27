"""The two invariants: keep-all is the unmodified model, and leaving restores everything."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from contract import DropLastPair, Failing, logits

from var_moe.config import VARConfig
from var_moe.errors import UsageError
from var_moe.execution.session import routed
from var_moe.models.moe_layers import experts_modules
from var_moe.routing.compensation import ResidualMeans
from var_moe.routing.decision import Tier
from var_moe.routing.simple import NativePolicy
from var_moe.routing.var import RoutingTable, VARPolicy


@pytest.fixture(params=[1, 2, 8], ids=lambda k: f"top{k}")
def model(request, make_tiny_mixtral):
    return make_tiny_mixtral(top_k=request.param)


@pytest.fixture
def ids():
    return torch.randint(0, 300, (3, 40), generator=torch.Generator().manual_seed(1))


# Relative to the logits' norm: below float32 a rounding can turn a near-tie between experts.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.05}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["sorted", "grouped_mm"])
def test_keep_all_is_grouped_mm_bit_for_bit(model, ids, dtype, backend):
    model.to(dtype)
    eager = logits(model, ids, "eager")
    expected = logits(model, ids, "grouped_mm")
    with routed(model, NativePolicy(), backend=backend):
        kept = logits(model, ids)
    assert torch.equal(kept, expected)
    assert (kept - eager).float().norm() <= TOLERANCE[dtype] * eager.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["sorted", "grouped_mm", "eager"])
def test_compaction_leaves_the_other_tokens_bit_identical(model, ids, dtype, backend):
    """One pair elsewhere is dropped, so the rest goes through compaction for certain."""
    model.to(dtype)
    expected = logits(model, ids, "grouped_mm")
    with routed(model, DropLastPair(layer=2), backend=backend) as session:
        got = logits(model, ids)
    assert torch.equal(got.flatten(0, 1)[:-1], expected.flatten(0, 1)[:-1])
    assert not torch.equal(got[-1, -1], expected[-1, -1])
    assert sum(session.report().executed_pairs) == 3 * 3 * 40 * session.report().top_k - 1


@pytest.mark.parametrize("failing", [False, True])
def test_leaving_restores_the_model(model, ids, failing):
    before = logits(model, ids, "grouped_mm")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modules = {name: dict(vars(module)) for name, module in experts_modules(model)}
    hooks = len(model._forward_pre_hooks)
    policy = Failing() if failing else DropLastPair(layer=0)
    expectation = pytest.raises(RuntimeError, match="policy failed") if failing else nullcontext()
    with expectation, routed(model, policy):
        logits(model, ids)
    assert torch.equal(logits(model, ids), before)
    assert model.get_experts_implementation() == {"": "grouped_mm"}
    assert len(model._forward_pre_hooks) == hooks
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    for name, module in experts_modules(model):
        assert {k: v for k, v in vars(module).items() if k != "_parameters"}.keys() == {
            k for k in modules[name] if k != "_parameters"
        }


def test_nesting_is_refused_and_the_outer_session_goes_on(model, ids):
    expected = logits(model, ids, "grouped_mm")
    with routed(model, NativePolicy(), backend="sorted"):
        with pytest.raises(UsageError, match="routed already"), routed(model, NativePolicy()):
            pass
        assert torch.equal(logits(model, ids), expected)


def test_a_dense_model_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    dense = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    with (
        pytest.raises(UsageError, match="'llama' has no experts module"),
        routed(dense, NativePolicy()),
    ):
        pass


def test_an_unknown_backend_is_refused(model):
    with (
        pytest.raises(
            UsageError, match="'bogus': expected one of sorted, packed, fused, grouped, eager"
        ),
        routed(model, NativePolicy(), backend="bogus"),
    ):
        pass


@pytest.mark.slow  # importing the compiler takes seconds
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_refused(make_tiny_mixtral, in_place):
    model = make_tiny_mixtral()
    if in_place:
        model.compile()
    else:
        model = torch.compile(model)
    with pytest.raises(UsageError, match="compiled"), routed(model, NativePolicy()):
        pass


def test_counts_leave_padding_out(model, ids):
    mask = torch.ones_like(ids)
    mask[0, 30:] = 0
    with routed(model, NativePolicy()) as session, torch.inference_mode():
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    report = session.report()
    assert report.tokens == 110
    assert report.learned_pct == 100.0
    assert report.tier_counts == ((0, 0, 110),) * 3
    assert report.experts_per_token == report.top_k
    assert int(Tier.LEARNED) == 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["sorted", "grouped_mm"])
def test_keep_all_on_the_demo_at_the_size_that_is_timed(dtype, backend):
    """Matrix products may depend on their shapes: here the real ones, one pair dropped."""
    from var_moe.models.loading import load_model

    model = load_model("demo").model.to(dtype)
    ids = torch.randint(0, 4096, (8, 256), generator=torch.Generator().manual_seed(1))
    expected = logits(model, ids, "grouped_mm")
    with routed(model, NativePolicy(), backend=backend):
        assert torch.equal(logits(model, ids), expected)
    with routed(model, DropLastPair(layer=4), backend=backend):
        got = logits(model, ids)
    assert torch.equal(got.flatten(0, 1)[:-1], expected.flatten(0, 1)[:-1])
    assert not torch.equal(got[-1, -1], expected[-1, -1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_residual_means_keep_the_models_dtype(model, ids, dtype):
    model.to(dtype)
    means = ResidualMeans(table=(torch.randn(9, 64),) * 3, by_pair=False, experts=8)
    config = VARConfig(frequency_threshold=10**9, confidence_threshold=0.3, cache_size=0)
    table = RoutingTable(
        count=torch.zeros(3, 300, dtype=torch.float64),
        entropy=torch.zeros(3, 300, dtype=torch.float64),
        index=torch.zeros(3, 300, (model.config.num_experts_per_tok + 1) // 2, dtype=torch.int64),
        weight=torch.ones(3, 300, (model.config.num_experts_per_tok + 1) // 2),
    )
    with routed(model, VARPolicy(config, table, residuals=means)) as session:
        found = logits(model, ids)
    assert found.dtype == dtype
    assert found.isfinite().all()
    if model.config.num_experts_per_tok > 1:
        assert session.report().experts_per_token < model.config.num_experts_per_tok
