"""Replayed decisions are those of the plain-Python oracle, for any configuration."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from traces import made_trace

from oracle import ReferenceRow, ReferenceVAR, RouterChoice, TableEntry
from var_moe.config import VARConfig
from var_moe.errors import UsageError
from var_moe.routing.decision import Tier
from var_moe.routing.simple import FixedKPolicy, NativePolicy, RandomSkipPolicy
from var_moe.routing.var import RoutingTable, VARPolicy
from var_moe.tracing import policies
from var_moe.tracing.policies import evaluate_policy
from var_moe.tracing.replay import TraceReplay

SETTINGS = settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
GRID = 64
# Weights that sum to one on the grid, so that shares are exact in float16; with ties.
WEIGHTS = {
    1: [(64,), (32,)],
    2: [(48, 16), (32, 32), (40, 24), (56, 8)],
    4: [(16, 16, 16, 16), (32, 16, 8, 8), (40, 8, 8, 8), (24, 24, 8, 8), (61, 1, 1, 1)],
}
CONFIDENCE = (0.5, 0.6, 0.625, 0.75, 0.8, 0.875, 0.9, 1.0)
ENTROPY = (0.25, 0.5, 1.0)
VOCABULARY = 5

Table = dict[tuple[int, int], TableEntry]


def by_rank(pair):
    weight, expert = pair
    return -weight, expert


def choices(top_k: int) -> st.SearchStrategy[RouterChoice]:
    """K different experts of six in any order, with exactly representable weights."""
    experts = st.permutations(range(6)).map(lambda order: tuple(order[:top_k]))
    weights = st.sampled_from(WEIGHTS[top_k]).flatmap(st.permutations)
    return st.tuples(experts, weights.map(lambda ws: tuple(w / GRID for w in ws)))


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[int]], list[list[RouterChoice]], Table]:
    top_k, layers = draw(st.sampled_from([2, 1, 4])), draw(st.integers(1, 2))
    pool = draw(st.lists(choices(top_k), min_size=2, max_size=5))
    # The same experts with other weights: a slot's expert leads tokens that are not confident.
    for experts, weights in pool[:2]:
        ranked = [e for _, e in sorted(zip(weights, experts, strict=True), key=by_rank)]
        other = draw(st.sampled_from(WEIGHTS[top_k]))
        pool.append((tuple(ranked), tuple(w / GRID for w in other)))
    entries = st.tuples(st.integers(0, 4), st.sampled_from(ENTROPY), choices(top_k))
    table: Table = {}
    for layer in range(layers):
        for token in range(VOCABULARY):
            if draw(st.integers(0, 2)) == 0:
                count, entropy, (experts, weights) = draw(entries)
                order = sorted(zip(weights, experts, strict=True), key=by_rank)
                leading = [(e, w) for w, e in order[: (top_k + 1) // 2]]
                table[layer, token] = (count, entropy, leading)
    documents: list[list[int]] = []
    for _ in range(draw(st.integers(1, 4))):
        ids = [byte % VOCABULARY for byte in draw(st.binary(min_size=1, max_size=20))]
        # Often the document before again, so that long contexts come back.
        documents.append(documents[-1] + ids if documents and draw(st.booleans()) else ids)
    tokens = sum(len(document) for document in documents)
    router = []
    for _ in range(layers):
        picks = draw(st.binary(min_size=tokens, max_size=tokens))
        router.append([pool[byte % len(pool)] for byte in picks])
    return documents, router, table


@st.composite
def configs(draw: st.DrawFn) -> VARConfig:
    return VARConfig(
        frequency_threshold=draw(st.integers(0, 3)),
        entropy_threshold=draw(st.sampled_from(ENTROPY)),
        confidence_threshold=draw(st.sampled_from(CONFIDENCE)),
        cache_size=draw(st.sampled_from([3, 2, 5, 1000, 1, 0])),
        cache_ttl_seconds=draw(st.sampled_from([60, 0.012, 0.007, 0.03, 0.0025, 0.001])),
        context_window_size=draw(st.sampled_from([2, 1, 3, 4, 8])),
        mode=draw(st.sampled_from(["plain", "verified"])),
        residuals=False,
        cache_scope=draw(st.sampled_from(["shared", "document"])),
    )


def table_of(table: Table, layers: int, top_k: int) -> RoutingTable:
    lead = (top_k + 1) // 2
    shape = (layers, VOCABULARY)
    made = RoutingTable(
        count=torch.zeros(shape, dtype=torch.float64),
        entropy=torch.full(shape, torch.inf, dtype=torch.float64),
        index=torch.zeros((*shape, lead), dtype=torch.int64),
        weight=torch.ones((*shape, lead)),
    )
    for at, (count, entropy, experts) in table.items():
        made.count[at], made.entropy[at] = count, entropy
        made.index[at] = torch.tensor([expert for expert, _ in experts])
        made.weight[at] = torch.tensor([weight for _, weight in experts])
    return made


def oracle(documents, router, table, config):
    """Per layer, the oracle's decisions on the documents, one after the other."""
    reference, decided, at = ReferenceVAR(config, table), [[] for _ in router], 0
    for number, ids in enumerate(documents):
        row = ReferenceRow(
            ids=ids, valid=[True] * len(ids), counted=[True] * len(ids), document=number
        )
        part = {layer: rows[at : at + len(ids)] for layer, rows in enumerate(router)}
        for layer, found in reference.forward([row], part).items():
            decided[layer] += found
        at += len(ids)
    return decided


def telling_damage(layers, tokens, top_k):
    """Whole numbers at random, of which no two sets of decisions have the same sum, in practice.

    They stay below 2^22, so that sums of a thousand halves are exact.
    """
    rng = torch.Generator().manual_seed(0)
    shapes = {"cut": (layers, tokens, top_k - 1)}
    shapes |= dict.fromkeys(("next", "foreign"), (layers, tokens))
    return {
        name: torch.randint(1, 2**22, shape, generator=rng).float()
        for name, shape in shapes.items()
    }


def expected_damage(decided, choices, damage, layer):
    """The sums of ``damage`` over one layer's decisions, from the experts that the oracle runs."""
    sums = dict.fromkeys(damage, 0.0)
    for token, ((tier, run), (experts, weights)) in enumerate(zip(decided, choices, strict=True)):
        if len(run) == len(experts):
            continue  # all of them, or K = 1: there is nothing to cut
        ranked = [e for _, e in sorted(zip(weights, experts, strict=True), key=by_rank)]
        leading = set(ranked[: len(run)])
        if set(run) == leading:
            sums["cut"] += float(damage["cut"][layer, token, len(run) - 1])
            continue
        assert tier != "LEARNED"
        others = {"next": set(run) & set(ranked) - leading, "foreign": set(run) - set(ranked)}
        for name, which in others.items():
            sums[name] += len(which) / len(run) * float(damage[name][layer, token])
    return sums


def assert_agrees(case, config, replay):
    """Tiers by their counts, and by the damages which experts each single token runs."""
    documents, router, table = case
    expected = oracle(documents, router, table, config)
    replayed = replay.evaluate(config)
    report = replayed.report
    for layer, decided in enumerate(expected):
        tiers = [tier for tier, _ in decided]
        assert report.tier_counts[layer] == tuple(tiers.count(tier.name) for tier in Tier)
        assert report.executed_pairs[layer] == sum(len(run) for _, run in decided)
        for tier, run in decided:
            event(f"{config.mode}: {tier}, {len(run)} of {len(router[layer][0][0])}")
        if replay.trace.top_k > 1:
            sums = expected_damage(decided, router[layer], replay.trace.damage, layer)
            for name, found in replayed.first.items():
                assert found[layer] == sums[name], (layer, name)


@st.composite
def neighbours(draw: st.DrawFn) -> list[VARConfig]:
    """Configurations of which each differs from the one before in one field, at most."""
    found = [draw(configs())]
    names = [*VARConfig().documented(), "mode", "cache_scope"]
    for name in draw(st.lists(st.sampled_from(names), max_size=3)):
        found.append(replace(found[-1], **{name: getattr(draw(configs()), name)}))
    return found


@pytest.mark.slow
@SETTINGS
@given(cases(), neighbours())
def test_random_streams(case, found):
    """Several configurations on one replay, so that what they share is shared rightly."""
    documents, router, table = case
    top_k, tokens = len(router[0][0][0]), len(router[0])
    damage = telling_damage(len(router), tokens, top_k)
    trace = made_trace(documents, router, damage=damage)
    replay = TraceReplay(trace, table_of(table, len(router), top_k))
    for config in found:
        assert_agrees(case, config, replay)
    again = [result.report for result in replay.evaluate_many(found)]
    assert again == [replay.evaluate(config).report for config in found]


def profile_like(trace):
    """A table over the trace's own ids, some of them on the fast path."""
    vocabulary = int(trace.ids.max()) + 1
    shape = (trace.layers, vocabulary)
    generator = torch.Generator().manual_seed(0)
    lead = (trace.top_k + 1) // 2
    return RoutingTable(
        count=torch.randint(0, 40, shape, generator=generator).double(),
        entropy=torch.rand(shape, generator=generator).double(),
        index=torch.rand((*shape, 8), generator=generator).topk(lead, dim=2).indices,
        weight=torch.ones((*shape, lead)),
    )


@pytest.mark.parametrize("mode", ["plain", "verified"])
@pytest.mark.parametrize("scope", ["shared", "document"])
@pytest.mark.parametrize("chunk", [40, 10_000])
def test_the_policy_itself_on_the_trace(recorded, mode, scope, chunk, monkeypatch):
    """`VARPolicy`, fed with chunks of documents, reports the same as the replay."""
    monkeypatch.setattr(policies, "_TOKENS_PER_CHUNK", chunk)
    table = profile_like(recorded)
    config = VARConfig(
        frequency_threshold=30,
        entropy_threshold=0.6,
        confidence_threshold=0.7,
        cache_size=60,
        cache_ttl_seconds=0.3,
        context_window_size=2,
        mode=mode,
        residuals=False,
        cache_scope=scope,
    )
    report = evaluate_policy(recorded, VARPolicy(config, table)).report
    assert min(report.fast_pct, report.cached_pct, report.learned_pct) > 1
    assert TraceReplay(recorded, table).evaluate(config).report == report


def test_other_policies(recorded):
    report = evaluate_policy(recorded, NativePolicy()).report
    assert report.tokens == recorded.tokens
    assert report.experts_per_token == 2.0
    assert evaluate_policy(recorded, FixedKPolicy(1)).report.experts_per_token == 1.0
    near = evaluate_policy(recorded, RandomSkipPolicy(0.5)).report.experts_per_token
    assert near == pytest.approx(1.5, abs=0.05)


def test_damage_sums_by_kind():
    """Three tokens of one context: the first is learned, the others run what it stored."""
    router = [[((0, 1), (0.75, 0.25)), ((0, 2), (0.5, 0.5)), ((3, 0), (0.75, 0.25))]]
    damage = {
        "cut": torch.tensor([[[1.0], [2.0], [4.0]]]),
        "cut_residual": torch.tensor([[0.5, 0.25, 0.125]]),
        "next": torch.tensor([[10.0, 20.0, 40.0]]),
        "foreign": torch.tensor([[100.0, 200.0, 400.0]]),
    }
    trace = made_trace([[1, 1, 1]], router, damage=damage)
    replay = TraceReplay(trace, table_of({}, 1, 2))
    plain = VARConfig(confidence_threshold=0.7, context_window_size=1, mode="plain")
    found = replay.evaluate(plain)
    assert found.report.tier_counts == ((0, 2, 1),)
    # The second runs its own first expert, the third its own second one.
    assert found.first == {"cut": [2.0], "next": [40.0], "foreign": [0.0]}
    assert found.squares == {"cut": [4.0], "next": [1600.0], "foreign": [0.0]}
    # Verified: the third token's licence is refused, but it is confident, as is the first.
    verified = replace(plain, mode="verified")
    assert replay.evaluate(verified).report.tier_counts == ((0, 1, 2),)
    assert replay.evaluate(verified).first == {"cut_residual": [0.875]}
    assert replay.evaluate(replace(verified, residuals=False)).first == {"cut": [7.0]}


def test_foreign_experts_count_in_proportion():
    router = [[((0, 1, 2), (0.5, 0.25, 0.25)), ((0, 3, 4), (0.5, 0.25, 0.25))]]
    damage = {name: torch.full((1, 2), 8.0) for name in ("next", "foreign")}
    trace = made_trace([[1, 1]], router, damage={"cut": torch.ones((1, 2, 2)), **damage})
    replay = TraceReplay(trace, table_of({}, 1, 3))
    config = VARConfig(confidence_threshold=0.7, context_window_size=1, mode="plain")
    found = replay.evaluate(config)
    assert found.first == {"cut": [0.0], "next": [0.0], "foreign": [4.0]}
    assert found.squares == {"cut": [0.0], "next": [0.0], "foreign": [16.0]}


def test_weights_of_zero_are_never_confident():
    router = [[((0, 1), (0.0, 0.0))] * 3]
    trace = made_trace([[1, 1, 1]], router)
    replay = TraceReplay(trace, table_of({}, 1, 2))
    config = VARConfig(confidence_threshold=0.01, context_window_size=1)
    assert replay.evaluate(config).report.tier_counts == ((0, 0, 3),)
    assert replay.evaluate(config).report.experts_per_token == 2.0


def test_another_models_profile_is_refused(recorded, profile):
    other = replace(profile, head={**profile.head, "tokenizer_hash": "x", "model": "other"})
    with pytest.raises(UsageError, match=r"'other' does not fit the trace of model 'tiny'"):
        TraceReplay(recorded, other)
    assert TraceReplay(recorded, profile).evaluate(VARConfig()).report.tokens == recorded.tokens


def test_sums_of_a_recording(recorded, profile):
    """Keeping all costs nothing; cutting all costs what all damages are."""
    replay = TraceReplay(recorded, profile)
    cache_off = VARConfig(frequency_threshold=10**9, cache_size=0, confidence_threshold=1.0)
    assert replay.evaluate(cache_off).first == {"cut_residual": [0.0] * recorded.layers}
    everything = cache_off.replace(confidence_threshold=0.001, residuals=False)
    found = replay.evaluate(everything)
    assert found.report.experts_per_token == 1.0
    a = recorded.damage["cut"][:, :, 0].double()
    assert found.first["cut"] == pytest.approx(a.sum(1).tolist(), rel=1e-4, abs=1e-3)
    assert found.squares["cut"] == pytest.approx(a.square().sum(1).tolist(), rel=1e-4)
