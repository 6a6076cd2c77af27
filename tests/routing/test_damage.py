"""Predicted damages by hand, and the policy against its words in plain Python."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from damages import damage_model
from var_moe.errors import UsageError
from var_moe.routing.compensation import Compensation
from var_moe.routing.damage import TAU_HIGH, TAU_LOW, DamageModel, DamagePolicy
from var_moe.routing.decision import ForwardContext, Routing
from var_moe.routing.registry import make_policy

LAYERS, EXPERTS, VOCABULARY, HIDDEN = 2, 10, 6, 4


def zeros(*, experts: int, top_k: int, hidden: int = 0) -> DamageModel:
    """One layer, all terms zero."""
    model = damage_model(
        layers=1, experts=experts, top_k=top_k, vocabulary=VOCABULARY, hidden=hidden
    )
    return replace(model, **{name: value * 0 for name, value in model.tensors().items()})


def only(layer: DamageModel) -> object:
    return layer.layer(0, torch.device("cpu"))


def test_two_experts_by_hand() -> None:
    model = zeros(experts=3, top_k=2)
    model.base[0] = -5.0
    model.slope[0] = 2.0
    model.curve[0] = 0.5
    model.pair[0, 1 * 3 + 2] = 0.25  # first 1, dropped 2
    model.token[0, 4] = -0.75
    index = torch.tensor([[1, 2], [2, 1], [1, 2]])
    mass = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]])
    found = only(model).log_damage(index, mass, torch.tensor([4, 4, 0]))
    quarter, half, least = math.log(0.25), math.log(0.5), math.log(1e-6)
    expected = [
        -5 + 2 * quarter + 0.5 * quarter**2 + 0.25 - 0.75,
        -5 + 2 * half + 0.5 * half**2 - 0.75,  # another pair
        -5 + 2 * least + 0.5 * least**2 + 0.25,  # another token; nothing is dropped
    ]
    torch.testing.assert_close(found, torch.tensor(expected)[:, None])


def test_three_experts_by_hand() -> None:
    model = zeros(experts=4, top_k=3)
    model.base[0] = torch.tensor([-4.0, -6.0])
    model.slope[0] = torch.tensor([1.0, 2.0])
    model.curve[0] = torch.tensor([0.125, 0.0])
    model.first[0] = torch.tensor([9.0, 9.0, 0.5, 9.0])
    model.dropped[0] = torch.tensor([1.0, -2.0, 9.0, 9.0])
    model.token[0, 3] = 0.0625
    index, mass = torch.tensor([[2, 0, 1]]), torch.tensor([[0.5, 0.3, 0.2]])
    found = only(model).log_damage(index, mass, torch.tensor([3]), torch.tensor([0.25]))
    half, fifth = math.log(0.5), math.log(0.2)
    # Of the two that go, 0.3 are expert 0 and 0.2 are expert 1; then expert 1 alone.
    alone = -4 + half + 0.125 * half**2 + 0.5 + (0.3 * 1 - 0.2 * 2) / 0.5 + 0.0625 + 0.25
    two = -6 + 2 * fifth + 0.5 - 2 + 0.0625 + 0.25
    torch.testing.assert_close(found, torch.tensor([[alone, two]]))


def test_the_look_at_the_input_by_hand() -> None:
    model = zeros(experts=3, top_k=2, hidden=2)
    model.inner[0] = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    model.bias[0] = torch.tensor([0.0, 1.0, 0.0])
    model.out[0] = torch.tensor([3.0, -1.0, 7.0])
    hint = only(model).hint(torch.tensor([[2.0, -1.0]], dtype=torch.bfloat16))

    def silu(x: float) -> float:
        return x / (1 + math.exp(-x))

    torch.testing.assert_close(hint, torch.tensor([3 * silu(2.0) - silu(-1.0)]))
    assert only(zeros(experts=3, top_k=2)).hint(torch.ones(1, 2)) is None


def words(
    damage: DamageModel, layer: int, index: list[int], weight: list[float], token: int, hint: float
) -> list[float]:
    """log D_k of one decision, k = 1..K-1, from the formula of `DamageModel`."""
    part = {name: value[layer].tolist() for name, value in damage.tensors().items()}
    total = sum(weight)
    mass = [w / total if total else 0.0 for w in weight]
    found = []
    for k in range(1, len(index)):
        tail = max(sum(mass[k:]), 1e-6)
        size = math.log(tail)
        here = part["base"][k - 1] + part["slope"][k - 1] * size + part["curve"][k - 1] * size**2
        if len(index) == 2:
            here += part["pair"][index[0] * damage.experts + index[1]]
        else:
            here += part["first"][index[0]]
            pairs = zip(mass[k:], index[k:], strict=True)
            here += sum(m / tail * part["dropped"][e] for m, e in pairs)
        found.append(here + part["token"][token] + hint)
    return found


def oracle(
    damage: DamageModel, layer: int, choice: dict[int, float], token: int, hint: float, tau: float
) -> tuple[set[int], list[float]]:
    """The experts that run, dropped one after another from the last; and all damages."""
    order = sorted(choice, key=lambda expert: (-choice[expert], expert))
    sizes = words(damage, layer, order, [choice[e] for e in order], token, hint)
    kept = len(order)
    while kept > 1 and sizes[kept - 2] < math.log(tau):
        kept -= 1
    return set(order[:kept]), sizes


@st.composite
def decisions(draw: st.DrawFn) -> tuple[int, list[dict[int, float]], list[int]]:
    """K, some tokens' choices with many ties and zeros, and their ids."""
    top_k = draw(st.sampled_from([1, 2, 3, 8]))
    experts = st.permutations(range(EXPERTS)).map(lambda row: row[:top_k])
    weights = st.lists(st.sampled_from([0.0, 0.125, 0.25, 1.0]), min_size=top_k, max_size=top_k)
    count = draw(st.integers(1, 5))
    rows = [dict(zip(draw(experts), draw(weights), strict=True)) for _ in range(count)]
    return top_k, rows, draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))


@settings(max_examples=80, deadline=None)
@given(
    case=decisions(),
    near=st.tuples(st.integers(0, 6), st.floats(-2, 2)),  # a cut of the first token, and how far
    seed=st.integers(0, 3),
    looks=st.booleans(),
    layer=st.integers(0, LAYERS - 1),
)
def test_against_plain_python(case, near, seed, looks, layer) -> None:
    top_k, rows, ids = case
    size = HIDDEN if looks else 0
    damage = damage_model(
        layers=LAYERS,
        experts=EXPERTS,
        top_k=top_k,
        vocabulary=VOCABULARY,
        hidden=size,
        seed=seed,
    )
    index = torch.tensor([list(row) for row in rows])
    weight = torch.tensor([list(row.values()) for row in rows])
    hidden = torch.randn((len(rows), HIDDEN), generator=torch.Generator().manual_seed(seed))
    hints = [0.0] * len(rows)
    if looks:
        inner = hidden @ damage.inner[layer].T + damage.bias[layer]
        hints = ((inner * inner.sigmoid()) @ damage.out[layer]).tolist()
    sizes = oracle(damage, layer, rows[0], ids[0], hints[0], 1.0)[1]
    tau = math.exp(sizes[near[0] % len(sizes)] + near[1]) if sizes else 1.0
    policy = DamagePolicy(tau, damage=damage)
    context = ForwardContext.of(torch.tensor([ids]))
    policy.see(layer, hidden)
    routing = policy.route(context, layer, index, weight)
    for row, token, hint, got in zip(rows, ids, hints, routing.index.tolist(), strict=True):
        expected, sizes = oracle(damage, layer, row, token, hint, tau)
        assume(all(abs(size - math.log(tau)) > 1e-3 for size in sizes))
        assert [e if e in expected else -1 for e in row] == got
    kept = routing.weight.masked_fill(routing.index < 0, 0.0)
    torch.testing.assert_close(kept.sum(1), weight.sum(1))
    for at, token in enumerate(ids):  # a lone token is decided in a way of its own
        one = slice(at, at + 1)
        policy.see(layer, hidden[one])
        alone = policy.route(
            ForwardContext.of(torch.tensor([[token]])), layer, index[one], weight[one]
        )
        assert torch.equal(alone.index, routing.index[one])
        torch.testing.assert_close(alone.weight.masked_fill(alone.index < 0, 0.0), kept[one])


def test_no_deeper_cut_past_one_that_is_too_much() -> None:
    """Dropping the last alone costs too much here, though dropping two would not."""
    damage = zeros(experts=3, top_k=3)
    damage.base[0] = torch.tensor([-5.0, -1.0])
    policy = DamagePolicy(math.exp(-3.0), damage=damage)
    context = ForwardContext.of(torch.tensor([[0]]))
    routing = policy.route(context, 0, torch.tensor([[0, 1, 2]]), torch.tensor([[0.5, 0.3, 0.2]]))
    assert routing.index.tolist() == [[0, 1, 2]]


def routed(tau: float, *, top_k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Routing]:
    """The weights of many tokens, and what the policy makes of them."""
    damage = damage_model(layers=1, experts=EXPERTS, top_k=top_k, vocabulary=VOCABULARY)
    rng = torch.Generator().manual_seed(1)
    index = torch.rand((300, EXPERTS), generator=rng).argsort(dim=1)[:, :top_k]
    weight = (4 * torch.rand((300, top_k), generator=rng)).exp().to(dtype)
    policy = DamagePolicy(tau, damage=damage)
    context = ForwardContext.of(torch.randint(0, VOCABULARY, (3, 100), generator=rng))
    return weight, policy.route(context, 0, index, weight)


@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
def test_without_a_tau_nothing_changes(top_k: int) -> None:
    weight, routing = routed(0.0, top_k=top_k, dtype=torch.bfloat16)
    assert (routing.index >= 0).all()
    assert torch.equal(routing.weight, weight)


@pytest.mark.parametrize("top_k", [2, 3, 8])
def test_executed_pairs_fall_with_tau(top_k: int) -> None:
    taus = torch.logspace(-9, 2, 12).tolist()
    kept = [routed(tau, top_k=top_k)[1].index >= 0 for tau in taus]
    for mild, hard in pairwise(kept):
        assert not (hard & ~mild).any()
    assert kept[0].float().mean() > 0.9
    assert kept[-1].sum() < 1.05 * len(kept[-1])


def test_sweeps_and_search_space_span_one_range() -> None:
    space = DamagePolicy.search_space(2)["tau"]
    (sweep,) = DamagePolicy.sweeps(2).values()
    assert (space["low"], space["high"]) == (TAU_LOW, TAU_HIGH)
    assert sweep(0.0)["tau"] == pytest.approx(TAU_LOW)
    assert sweep(1.0)["tau"] == pytest.approx(TAU_HIGH)


def test_a_hint_does_not_outlive_its_layer() -> None:
    """What was seen in the forward before counts no more."""
    damage = damage_model(layers=1, experts=EXPERTS, top_k=2, vocabulary=VOCABULARY, hidden=HIDDEN)
    index, weight = torch.tensor([[1, 2]]), torch.tensor([[0.75, 0.25]])
    context = ForwardContext.of(torch.tensor([[0]]))
    tau = math.exp(only(damage).log_damage(index, weight, context.ids[0])) * 1.01
    policy = DamagePolicy(tau, damage=damage)
    policy.see_hint(torch.tensor([50.0]))
    assert policy.route(context, 0, index, weight).index.tolist() == [[1, 2]]
    assert policy.route(context, 0, index, weight).index.tolist() == [[1, -1]]


def test_another_models_damages_are_refused() -> None:
    damage = damage_model(layers=1, experts=EXPERTS, top_k=2, vocabulary=VOCABULARY)
    policy = make_policy("damage", {"tau": 0.1}, {"damage": damage})
    context = ForwardContext.of(torch.tensor([[0]]))
    with pytest.raises(UsageError, match="calibrated for K = 2, the model has K = 3"):
        policy.route(context, 0, torch.tensor([[0, 1, 2]]), torch.ones((1, 3)))


@pytest.mark.parametrize("tau", [-1e-9, math.nan, True, "much"])
def test_impossible_taus_are_refused(tau: object) -> None:
    damage = damage_model(layers=1, experts=2, top_k=2, vocabulary=1)
    with pytest.raises(UsageError, match=r"DamagePolicy\.tau = "):
        DamagePolicy(tau, damage=damage)


def test_a_compensation_that_the_damages_do_not_know_is_refused() -> None:
    one = Compensation.empty(layers=1, experts=2, hidden=4)
    other = Compensation.empty(layers=1, experts=2, hidden=5)
    bare = damage_model(layers=1, experts=2, top_k=2, vocabulary=1)
    fitted = replace(bare, compensation=one)
    again = Compensation.empty(layers=1, experts=2, hidden=4)
    policy = DamagePolicy(0.1, damage=fitted)
    assert policy.compensation is one
    assert policy.compensated(again).compensation is again  # the same values
    with pytest.raises(UsageError, match="with another compensation"):
        policy.compensated(other)
    with pytest.raises(UsageError, match="with another compensation"):
        policy.compensated(None)
    with pytest.raises(UsageError, match="without a compensation"):
        DamagePolicy(0.1, damage=bare).compensated(one)
    assert DamagePolicy(0.1, damage=bare).compensated(None).compensation is None


def test_hash_tells_models_apart() -> None:
    model = zeros(experts=3, top_k=2)
    assert zeros(experts=3, top_k=2).hash == model.hash
    assert replace(model, token=model.token + 1).hash != model.hash
    compensation = Compensation.empty(layers=1, experts=3, hidden=4)
    assert replace(model, compensation=compensation).hash != model.hash


@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
def test_sizes_are_read_off_the_tensors(top_k: int) -> None:
    model = damage_model(layers=3, experts=9, top_k=top_k, vocabulary=5)
    assert (model.layers, model.top_k, model.experts) == (3, top_k, 9)
