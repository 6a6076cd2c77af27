"""A model whose layers lie in several places, as `device_map="auto"` spreads them."""

from __future__ import annotations

import pytest
import torch
from contract import DropLastPair, logits

from var_moe.config import VARConfig
from var_moe.execution.session import routed
from var_moe.routing.compensation import ResidualMeans
from var_moe.routing.simple import NativePolicy
from var_moe.routing.var import RoutingTable, VARPolicy

VOCABULARY, EXPERTS, LAYERS, WIDTH = 300, 8, 3, 64


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 12, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def spread(make_tiny_mixtral, tmp_path):
    """The second layer and the head on disk, the rest on the CPU."""
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_module

    model = make_tiny_mixtral()
    places = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    }
    model = dispatch_model(
        model, device_map=places, main_device="cpu", offload_dir=str(tmp_path / "offload")
    )
    assert {p.device.type for p in model.parameters()} == {"cpu", "meta"}
    yield model
    remove_hook_from_module(model, recurse=True)


def var_policy() -> VARPolicy:
    dice = torch.Generator().manual_seed(5)
    table = RoutingTable(
        count=torch.full((LAYERS, VOCABULARY), 100.0, dtype=torch.float64),
        entropy=torch.rand((LAYERS, VOCABULARY), generator=dice, dtype=torch.float64),
        index=torch.randint(0, EXPERTS, (LAYERS, VOCABULARY, 1), generator=dice),
        weight=torch.ones((LAYERS, VOCABULARY, 1)),
    )
    means = ResidualMeans(
        table=tuple(torch.randn((EXPERTS**2 + 1, WIDTH), generator=dice) for _ in range(LAYERS)),
        by_pair=True,
        experts=EXPERTS,
    )
    return VARPolicy(VARConfig(context_window_size=2), table, residuals=means)


@pytest.mark.parametrize("make", [NativePolicy, lambda: DropLastPair(1), var_policy])
def test_layers_on_disk_change_nothing(spread, make_tiny_mixtral, ids, make) -> None:
    whole = make_tiny_mixtral()
    with routed(whole, make(), backend="sorted") as session:
        expected, decided = logits(whole, ids), session.report()
    with routed(spread, make(), backend="sorted") as session:
        assert torch.equal(logits(spread, ids), expected)
        assert session.report() == decided
    assert spread.get_experts_implementation() == whole.get_experts_implementation()


def test_state_follows_the_layers_device(ids) -> None:
    """Layers on two devices: each gets its own copy of what it needs (meta stands for a GPU)."""
    policy = var_policy()
    from var_moe.routing.decision import ForwardContext

    context = ForwardContext.of(ids)
    policy.begin(context)
    index = torch.randint(0, EXPERTS, (ids.numel(), 2))
    here = policy.route(context, 0, index, torch.rand((ids.numel(), 2)))
    there = policy.route(context, 1, index.to("meta"), torch.rand((ids.numel(), 2), device="meta"))
    assert here.index.device.type == here.tier.device.type == "cpu"
    assert there.residual is not None
    for tensor in (there.index, there.weight, there.tier, there.residual.row):
        assert tensor.device.type == "meta"
