"""What every routing policy must hold. A new policy is one more row in ``POLICIES``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from damages import damage_model
from var_moe.config import VARConfig
from var_moe.errors import UsageError
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.counts import TierCounts
from var_moe.routing.damage import DamagePolicy
from var_moe.routing.decision import ForwardContext, Routing, Tier
from var_moe.routing.naee import NAEEPolicy, RatioQuantiles
from var_moe.routing.per_layer_k import LayerSensitivity, PerLayerKPolicy
from var_moe.routing.simple import (
    FixedKPolicy,
    NativePolicy,
    RandomSkipPolicy,
    SERPolicy,
    TopPPolicy,
)
from var_moe.routing.var import RoutingTable, VARPolicy

LAYERS, VOCABULARY, EXPERTS = 2, 8, 10
BATCH, LENGTH, FORWARDS = 3, 9, 4
TOKENS = BATCH * LENGTH
HIDDEN = 4  # of the layers' inputs

Stream = list[tuple[ForwardContext, list[tuple[Tensor, Tensor]]]]


@dataclass(frozen=True)
class Case:
    """A policy of a model with K experts per token, and what it may do."""

    make: Callable[[int], RoutingPolicy]
    runs_unseen_experts: bool = False  # may execute experts that the router did not choose
    cuts: bool = True  # executes less than everything in the stream below, where K > 1
    stateless: bool = False  # decides each token by its own router choice alone


def table(top_k: int) -> RoutingTable:
    """About half of the tokens on the fast path, with random leading experts."""
    rng = torch.Generator().manual_seed(7)
    shape, leading = (LAYERS, VOCABULARY), (top_k + 1) // 2
    index = torch.rand((*shape, EXPERTS), generator=rng).argsort(dim=-1)[..., :leading]
    weight = torch.rand((*shape, leading), generator=rng) + 0.1
    return RoutingTable(
        count=torch.randint(0, 100, shape, generator=rng).double(),
        entropy=torch.rand(shape, generator=rng).double(),
        index=index,
        weight=weight.sort(dim=-1, descending=True).values,
    )


def var(mode: str) -> Callable[[int], RoutingPolicy]:
    config = VARConfig(
        mode=mode,
        frequency_threshold=30,
        entropy_threshold=0.7,
        confidence_threshold=0.6,
        cache_size=12,
        cache_ttl_seconds=0.05,
        context_window_size=2,
        residuals=False,
    )
    return lambda top_k: VARPolicy(config, table(top_k))


def naee(top_k: int) -> RoutingPolicy:
    rows = ((0.0, 0.4, 1.0), (0.0, 0.6, 1.0))
    return NAEEPolicy(0.5, ratios=RatioQuantiles(top_k=top_k, tokens=1, quantiles=rows))


def per_layer_k(top_k: int) -> RoutingPolicy:
    """Half of the experts after the first, as a budget; the second layer is worth more."""
    loss = tuple(
        tuple(worth * float(top_k - k) for k in range(1, top_k + 1)) for worth in (1.0, 2.0)
    )
    sensitivity = LayerSensitivity(measure="made up", loss=loss)
    return PerLayerKPolicy((1 + top_k) / 2, sensitivity=sensitivity)


def damage(*, hidden: int = 0) -> Callable[[int], RoutingPolicy]:
    def make(top_k: int) -> RoutingPolicy:
        fitted = damage_model(
            layers=LAYERS, experts=EXPERTS, top_k=top_k, vocabulary=VOCABULARY, hidden=hidden
        )
        return DamagePolicy(3e-3, damage=fitted)

    return make


POLICIES = {
    "native": Case(lambda top_k: NativePolicy(), cuts=False, stateless=True),
    "fixed_k": Case(lambda top_k: FixedKPolicy(1), stateless=True),
    "fixed_k as many": Case(lambda top_k: FixedKPolicy(8), cuts=False, stateless=True),
    "naee": Case(naee, stateless=True),
    "ser": Case(lambda top_k: SERPolicy(1, 0.4), stateless=True),
    "top_p": Case(lambda top_k: TopPPolicy(0.8), stateless=True),
    "per_layer_k": Case(per_layer_k, stateless=True),
    "random_skip": Case(lambda top_k: RandomSkipPolicy(0.5, seed=3)),
    "damage": Case(damage()),
    "damage, looking": Case(damage(hidden=HIDDEN)),
    "var plain": Case(var("plain"), runs_unseen_experts=True),
    "var verified": Case(var("verified")),
}


@pytest.fixture(params=POLICIES.values(), ids=POLICIES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(params=[name for name, case in POLICIES.items() if case.stateless])
def stateless(request: pytest.FixtureRequest) -> Case:
    return POLICIES[request.param]


@pytest.fixture(params=[1, 2, 3], ids=lambda k: f"K={k}")
def top_k(request: pytest.FixtureRequest) -> int:
    return request.param


def stream(top_k: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Stream:
    """Some forwards of a small vocabulary, with padding on the left and unsorted slots."""
    rng = torch.Generator().manual_seed(seed)
    forwards: Stream = []
    for _ in range(FORWARDS):
        ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=rng)
        mask = torch.ones_like(ids)
        mask[1, :3] = 0
        router = []
        for _ in range(LAYERS):
            score = torch.rand((TOKENS, EXPERTS), generator=rng)
            index = score.argsort(dim=1)[:, :top_k]
            weight = (torch.rand((TOKENS, top_k), generator=rng) * 6).exp() / 500
            router.append((index, weight.to(dtype)))
        forwards.append((ForwardContext.of(ids, mask), router))
    return forwards


def seen(index: Tensor, weight: Tensor) -> Tensor:
    """An input of the layer that goes with a router's decision, token by token. (T, HIDDEN)"""
    features = (index.sum(1) / 9, weight.float().sum(1), index.amax(1) - 5, weight.float().amax(1))
    return torch.stack(features, dim=1).to(weight.dtype)


def run(policy: RoutingPolicy, forwards: Stream) -> list[list[Routing]]:
    decisions = []
    for context, router in forwards:
        policy.begin(context)
        layers = []
        for layer, (index, weight) in enumerate(router):
            policy.see(layer, seen(index, weight))
            layers.append(policy.route(context, layer, index, weight))
        decisions.append(layers)
    return decisions


def pairs(forwards: Stream, decisions: list[list[Routing]]) -> list[tuple[Tensor, Tensor, Routing]]:
    """(index, weight, decision) of every layer of every forward."""
    return [
        (index, weight, routing)
        for (_, router), layers in zip(forwards, decisions, strict=True)
        for (index, weight), routing in zip(router, layers, strict=True)
    ]


def assert_equal(left: Routing, right: Routing, where: Tensor | None = None) -> None:
    """The same tiers, executed pairs and weights, at all tokens or those of ``where``."""
    where = torch.ones_like(left.tier, dtype=torch.bool) if where is None else where
    kept = left.index[where] >= 0
    assert torch.equal(left.tier[where], right.tier[where])
    assert torch.equal(left.index[where], right.index[where])
    assert torch.equal(left.weight[where][kept], right.weight[where][kept])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shapes_types_and_tiers(case: Case, top_k: int, dtype: torch.dtype) -> None:
    forwards = stream(top_k, dtype=dtype)
    for index, weight, routing in pairs(forwards, run(case.make(top_k), forwards)):
        assert (routing.index.shape, routing.index.dtype) == (index.shape, torch.int64)
        assert (routing.weight.shape, routing.weight.dtype) == (weight.shape, dtype)
        assert (routing.tier.shape, routing.tier.dtype) == (index.shape[:1], torch.uint8)
        assert set(routing.tier.tolist()) <= {int(tier) for tier in Tier}


def test_executed_experts_exist_and_run_once_per_token(case: Case, top_k: int) -> None:
    forwards = stream(top_k)
    executed = 0
    for _, _, routing in pairs(forwards, run(case.make(top_k), forwards)):
        assert ((routing.index >= -1) & (routing.index < EXPERTS)).all()
        for row in routing.index.tolist():
            kept = [expert for expert in row if expert >= 0]
            assert kept
            assert len(set(kept)) == len(kept)
            executed += len(kept)
    everything = FORWARDS * LAYERS * TOKENS * top_k
    assert (executed < everything) == (case.cuts and top_k > 1)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=str
)
def test_kept_weights_sum_to_the_routers_sum(
    case: Case, top_k: int, dtype: torch.dtype, tolerance: float
) -> None:
    forwards = stream(top_k, dtype=dtype)
    for _, weight, routing in pairs(forwards, run(case.make(top_k), forwards)):
        kept = routing.weight.float().masked_fill(routing.index < 0, 0.0)
        assert kept.isfinite().all()
        torch.testing.assert_close(kept.sum(1), weight.float().sum(1), rtol=tolerance, atol=0)
        alone = (routing.index >= 0).sum(1) == 1
        assert torch.equal(kept.sum(1)[alone], weight.sum(1).float()[alone])


def test_the_routers_experts_keep_their_slots(case: Case, top_k: int) -> None:
    forwards = stream(top_k)
    for index, _, routing in pairs(forwards, run(case.make(top_k), forwards)):
        moved = (routing.index >= 0) & (routing.index != index)
        if case.runs_unseen_experts:
            moved = moved[routing.tier == Tier.LEARNED]
        assert not moved.any()


def test_tokens_that_keep_all_pairs_keep_their_exact_weights(case: Case, top_k: int) -> None:
    forwards = stream(top_k, dtype=torch.bfloat16)
    for index, weight, routing in pairs(forwards, run(case.make(top_k), forwards)):
        whole = (routing.index == index).all(dim=1)
        assert torch.equal(routing.weight[whole], weight[whole])


def test_the_same_again_after_reset(case: Case, top_k: int) -> None:
    forwards = stream(top_k)
    policy = case.make(top_k)
    first = run(policy, forwards)
    policy.reset()
    for again in (run(policy, forwards), run(case.make(top_k), forwards)):
        for left, right in zip(first, again, strict=True):
            for layer in range(LAYERS):
                assert_equal(left[layer], right[layer])


def test_inputs_are_not_modified(case: Case, top_k: int) -> None:
    forwards, untouched = stream(top_k), stream(top_k)
    decisions = run(case.make(top_k), forwards)
    for (batch, router), (as_was, router_as_was) in zip(forwards, untouched, strict=True):
        assert torch.equal(batch.ids, as_was.ids)
        assert torch.equal(batch.valid, as_was.valid)
        assert torch.equal(batch.counted, as_was.counted)
        for (index, weight), (index_was, weight_was) in zip(router, router_as_was, strict=True):
            assert torch.equal(index, index_was)
            assert torch.equal(weight, weight_was)
    assert len(decisions) == FORWARDS


@pytest.mark.parametrize("known", [1, LENGTH + 4, TOKENS - 1])
def test_no_look_at_later_tokens(case: Case, top_k: int, known: int) -> None:
    """Changing everything after the first tokens of a forward leaves their decisions alone."""
    forwards, others = stream(top_k), stream(top_k, seed=1)
    batch, router = forwards[-1]
    other, other_router = others[-1]
    past = torch.arange(TOKENS) < known
    mixed = replace(batch, ids=torch.where(past.view(batch.ids.shape), batch.ids, other.ids))
    mixed_router = [
        tuple(torch.where(past[:, None], left, right) for left, right in zip(a, b, strict=True))
        for a, b in zip(router, other_router, strict=True)
    ]
    whole = run(case.make(top_k), forwards)
    changed = run(case.make(top_k), [*forwards[:-1], (mixed, mixed_router)])
    for layer in range(LAYERS):
        assert_equal(whole[-1][layer], changed[-1][layer], past & batch.valid.reshape(-1))


def test_padding_decides_nothing(case: Case, top_k: int) -> None:
    """What stands at padding, ids and router choices alike, changes no other token."""
    forwards, others = stream(top_k), stream(top_k, seed=1)
    changed = []
    for (batch, router), (other, other_router) in zip(forwards, others, strict=True):
        real = batch.valid.reshape(-1)
        mixed = replace(batch, ids=torch.where(batch.valid, batch.ids, other.ids))
        mixed_router = [
            (
                torch.where(real[:, None], index, other_index),
                torch.where(real[:, None], weight, other_weight),
            )
            for (index, weight), (other_index, other_weight) in zip(
                router, other_router, strict=True
            )
        ]
        changed.append((mixed, mixed_router))
    one, two = run(case.make(top_k), forwards), run(case.make(top_k), changed)
    for (batch, _), left, right in zip(forwards, one, two, strict=True):
        for layer in range(LAYERS):
            assert_equal(left[layer], right[layer], batch.valid.reshape(-1))


def at(routing: Routing, tokens: Tensor) -> Routing:
    """The decision of some tokens, in the order of ``tokens``."""
    return Routing(
        index=routing.index[tokens], weight=routing.weight[tokens], tier=routing.tier[tokens]
    )


def test_a_token_is_decided_by_its_own_choice_alone(stateless: Case, top_k: int) -> None:
    """Shuffled tokens are decided as before, and so is each as the only one of a forward."""
    policy = stateless.make(top_k)
    shuffled = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(2))
    for layer, (index, weight) in enumerate(stream(top_k)[0][1]):
        context = ForwardContext.of(index[:, :1])
        whole = policy.route(context, layer, index, weight)
        moved = policy.route(context, layer, index[shuffled], weight[shuffled])
        assert_equal(moved, at(whole, shuffled))
        for token in torch.arange(TOKENS).split(1):
            alone = policy.route(
                ForwardContext.of(index[token, :1]), layer, index[token], weight[token]
            )
            assert_equal(alone, at(whole, token))


def test_the_order_of_slots_decides_nothing(stateless: Case, top_k: int) -> None:
    """Also not between equal weights, of which there are many here."""
    policy = stateless.make(top_k)
    slots = torch.randperm(top_k, generator=torch.Generator().manual_seed(5))
    for layer, (index, weight) in enumerate(stream(top_k)[0][1]):
        coarse = (weight * 4).ceil() / 4
        context = ForwardContext.of(index[:, :1])
        left = policy.route(context, layer, index, coarse)
        right = policy.route(context, layer, index[:, slots], coarse[:, slots])
        assert torch.equal(left.index[:, slots], right.index)
        torch.testing.assert_close(left.weight[:, slots], right.weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedKPolicy(0), r"FixedKPolicy\.k = 0"),
        (lambda: FixedKPolicy(1.5), r"FixedKPolicy\.k = 1\.5: expected an integer"),
        (lambda: SERPolicy(0, 0.5), r"SERPolicy\.min_experts = 0: expected an integer in \[1"),
        (lambda: SERPolicy(1, -0.1), r"SERPolicy\.threshold = -0\.1: .* in \[0, 1\]"),
        (lambda: TopPPolicy(0.0), r"TopPPolicy\.p = 0\.0: expected a number in \(0, 1\]"),
        (lambda: TopPPolicy(1.01), r"TopPPolicy\.p = 1\.01"),
        (lambda: RandomSkipPolicy(1.5), r"RandomSkipPolicy\.share = 1\.5"),
        (lambda: RandomSkipPolicy(float("nan")), r"RandomSkipPolicy\.share = nan"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], RoutingPolicy], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize(("share", "executed"), [(0.0, 2.0), (0.5, 1.5), (1.0, 1.0)])
def test_random_skip_cuts_its_share(share: float, executed: float) -> None:
    index = torch.tensor([[4, 7]]).expand(4000, 2)
    weight = torch.tensor([[0.25, 0.75]]).expand(4000, 2)
    context = ForwardContext.of(index[:, :1])
    routing = RandomSkipPolicy(share).route(context, 0, index, weight)
    assert (routing.index >= 0).sum().item() / 4000 == pytest.approx(executed, abs=0.03)
    assert (routing.index[:, 1] == 7).all()  # the first expert always runs


def test_fixed_k_runs_the_heaviest() -> None:
    index = torch.tensor([[4, 7, 1, 0]])
    weight = torch.tensor([[0.125, 0.25, 0.25, 0.375]])
    routing = FixedKPolicy(2).route(ForwardContext.of(index[:, :1]), 0, index, weight)
    assert routing.index.tolist() == [[-1, -1, 1, 0]]
    torch.testing.assert_close(routing.weight[0, 2:], torch.tensor([0.4, 0.6]))


def test_the_stream_reaches_every_tier_of_var() -> None:
    for mode in ("plain", "verified"):
        tiers = [r.tier for _, _, r in pairs(stream(2), run(var(mode)(2), stream(2)))]
        assert set(torch.cat(tiers).tolist()) == {int(tier) for tier in Tier}


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "random_skip"])
def test_no_decision_waits_for_the_device(name: str, top_k: int) -> None:
    """Meta tensors hold no values: reading one on the host would raise.

    The control is left out: there are no rng on such a device.
    """
    policy = POLICIES[name].make(top_k)
    for context, router in stream(top_k):
        policy.begin(context)  # the ids stay on the host, as the cache's walk needs them
        counts = TierCounts(LAYERS, drops_only=policy.drops_only)
        counts.begin(context)
        for layer, (index, weight) in enumerate(router):
            policy.see(layer, seen(index, weight).to("meta"))
            index, weight = index.to("meta"), weight.to("meta")
            routing = policy.route(context, layer, index, weight)
            counts.see(layer, context, routing, index, weight)
            assert routing.index.device.type == "meta"
        counts.end()
