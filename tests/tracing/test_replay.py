"""Replayed decisions are those of the plain-Python oracle, for any configuration."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from traces import made_trace

from var_moe.config import VARConfig
from var_moe.errors import UsageError
from var_moe.routing.decision import Tier
from var_moe.routing.fast_path import RoutingTable
from var_moe.routing.reference import ReferenceRow, ReferenceVAR, RouterChoice, TableEntry
from var_moe.tracing.replay import TraceReplay

SETTINGS = settings(
    max_examples=300,
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


def choices(top_k: int) -> st.SearchStrategy[RouterChoice]:
    """K different experts of six in any order, with exactly representable weights."""
    experts = st.permutations(range(6)).map(lambda order: tuple(order[:top_k]))
    weights = st.sampled_from(WEIGHTS[top_k]).flatmap(st.permutations)
    return st.tuples(experts, weights.map(lambda ws: tuple(w / GRID for w in ws)))


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[int]], list[list[RouterChoice]], Table]:
    top_k, layers = draw(st.sampled_from([2, 1, 4])), draw(st.integers(1, 2))
    pool = draw(st.lists(choices(top_k), min_size=2, max_size=5))
    entries = st.tuples(st.integers(0, 4), st.sampled_from(ENTROPY), choices(top_k))
    table: Table = {}
    for layer in range(layers):
        for token in range(VOCABULARY):
            if draw(st.integers(0, 2)) == 0:
                count, entropy, (experts, weights) = draw(entries)
                ranked = sorted(zip(experts, weights, strict=True), key=lambda p: (-p[1], p[0]))
                table[layer, token] = (count, entropy, ranked[: (top_k + 1) // 2])
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


def assert_agrees(case, config, replay):
    documents, router, table = case
    expected = oracle(documents, router, table, config)
    report = replay.evaluate(config).report
    top_k = len(router[0][0][0])
    lead = (top_k + 1) // 2
    for layer, decided in enumerate(replay.decisions(config)):
        tiers = [Tier(tier).name for tier in decided.tier]
        assert tiers == [tier for tier, _ in expected[layer]], layer
        assert report.tier_counts[layer] == tuple(tiers.count(tier.name) for tier in Tier)
        assert report.executed_pairs[layer] == sum(len(run) for _, run in expected[layer])
        for token, (tier, run) in enumerate(expected[layer]):
            ranked = sorted(zip(*router[layer][token], strict=True), key=lambda p: (-p[1], p[0]))
            own = [expert for expert, _ in ranked]
            chosen = sum(expert in own for expert in run)
            leading = sum(expert in own[:lead] for expert in run)
            assert decided.cut[token] == (len(run) < top_k and leading == lead)
            if config.mode == "plain" and tier != "LEARNED":
                assert decided.next_count[token] == chosen - leading
                assert decided.foreign_count[token] == len(run) - chosen
                assert decided.stored[token] == (leading < lead)
                assert decided.foreign[token] == (chosen < lead)
                assert decided.next[token] == (leading < chosen == lead)
            else:
                assert not decided.stored[token]
            event(f"{config.mode}: {tier}")


@SETTINGS
@given(cases(), st.lists(configs(), min_size=1, max_size=3))
def test_random_streams(case, found):
    """Several configurations on one replay, so that what they share is shared rightly."""
    documents, router, table = case
    trace = made_trace(documents, router)
    replay = TraceReplay.of_table(trace, table_of(table, len(router), trace.top_k))
    for config in found:
        assert_agrees(case, config, replay)
    again = [result.report for result in replay.evaluate_many(found)]
    assert again == [replay.evaluate(config).report for config in found]
