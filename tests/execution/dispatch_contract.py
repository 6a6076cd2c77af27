"""The contract of the experts dispatch, as a suite that every set of models inherits.

A module with a class that inherits has a fixture ``tiny``, and may have a ``backend`` of its own.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from contract import (
    Call,
    DropLastPair,
    Failing,
    differences,
    eager,
    logits,
    relative,
    snapshot,
    spied,
    watched,
)
from torch import Tensor

from families import EXPERTS, VOCABULARY, Family, in_dtype, tiny_ids
from var_moe.calibration.collect import collect_profile
from var_moe.config import VARConfig
from var_moe.data.documents import TextDocument
from var_moe.data.encoding import encode
from var_moe.evaluation.perplexity import document_losses
from var_moe.execution.session import routed
from var_moe.models.loading import LoadedModel
from var_moe.models.moe_layers import experts_modules
from var_moe.routing.compensation import ResidualMeans
from var_moe.routing.decision import ForwardContext, Routing, Tier
from var_moe.routing.keeping import leading_count
from var_moe.routing.simple import NativePolicy
from var_moe.routing.var import RoutingTable, VARPolicy
from var_moe.tracing.record import record_trace
from var_moe.tracing.replay import TraceReplay

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Distance of a layer's output to the module's own eager forward, relative to its norm.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# The unmodified model does not run in float16.
NO_FLOAT16 = {
    "deepseek_v4": "keeps weights in float32 that it multiplies with float16 activations",
}
# These multiply as `grouped_mm` does; the others agree to the tolerance.
EXACT_BACKENDS = ("sorted", "grouped_mm")


@dataclass
class Tiny:
    """A family's tiny model, in each dtype, and the text that it scores."""

    family: Family
    model: Any
    top_k: int
    experts: int = EXPERTS

    @cached_property
    def ids(self) -> Tensor:
        return tiny_ids()

    @cached_property
    def _copies(self) -> dict[torch.dtype, Any]:
        return {torch.float32: self.model}

    def within(self, dtype: torch.dtype) -> Any:
        if dtype == torch.float16 and self.family.module in NO_FLOAT16:
            pytest.skip(NO_FLOAT16[self.family.module])
        if dtype not in self._copies:
            self._copies[dtype] = in_dtype(self.model, dtype)
        return self._copies[dtype]

    @property
    def layers(self) -> int:
        return len(experts_modules(self.model))

    def table(self) -> RoutingTable:
        """A static table that knows the even token ids, with random experts."""
        lead = leading_count(self.top_k)
        shape = (self.layers, VOCABULARY)
        generator = torch.Generator().manual_seed(5)
        scores = torch.rand((*shape, self.experts), generator=generator)
        even = torch.arange(VOCABULARY) % 2 == 0
        return RoutingTable(
            count=torch.where(even, 100.0, 0.0).double().expand(shape).clone(),
            entropy=torch.zeros(shape, dtype=torch.float64),
            index=scores.topk(lead, dim=2).indices,
            weight=torch.ones((*shape, lead)),
        )


class Recording(VARPolicy):
    """VAR that keeps what it decided."""

    def reset(self) -> None:
        super().reset()
        self.decided = []

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        routing = super().route(context, layer, index, weight)
        self.decided.append((layer, routing))
        return routing


def var(tiny: Tiny, mode: str, **options: Any) -> Recording:
    """VAR with the table alone: no cache, and no decision confident enough to be cut."""
    config = VARConfig(
        frequency_threshold=10,
        entropy_threshold=0.5,
        confidence_threshold=1.0,
        cache_size=0,
        mode=mode,
        residuals=bool(options),
    )
    policy = Recording(config, tiny.table(), **options)
    policy.reset()
    return policy


def expected_pairs(
    call: Call, layer: int, table: RoutingTable, ids: Tensor, mode: str
) -> tuple[list[list[int]], list[int]]:
    """The experts that each token must run, in slot order, and its tier: in plain Python."""
    chosen, tiers = [], []
    lead = leading_count(call.index.shape[1])
    for token, experts, weight in zip(
        ids.tolist(), call.index.tolist(), call.weight.tolist(), strict=True
    ):
        order = sorted(range(len(experts)), key=lambda k: (-weight[k], experts[k]))
        first = [experts[slot] for slot in order[:lead]]
        stored = table.index[layer, token].tolist()
        fast = table.count[layer, token] >= 10
        if mode == "plain":
            kept = stored if fast else experts
        else:
            fast = fast and stored[0] in first
            sure = sum(weight[slot] for slot in order[:lead]) >= sum(weight)
            kept = experts
            if fast or sure:
                kept = [experts[slot] for slot in range(len(experts)) if slot in order[:lead]]
        chosen.append(kept)
        tiers.append(int(Tier.FAST if fast else Tier.LEARNED))
    return chosen, tiers


def check_keep_all(tiny: Tiny, dtype: torch.dtype, backend: str) -> None:
    """All pairs are kept; then one is dropped, so that the others go through compaction."""
    model = tiny.within(dtype)
    expected = logits(model, tiny.ids, "grouped_mm")
    with routed(model, NativePolicy(), backend=backend):
        kept = logits(model, tiny.ids)
    with (
        routed(model, DropLastPair(layer=tiny.layers - 1), backend=backend) as session,
        watched(model) as calls,
    ):
        got = logits(model, tiny.ids)
    assert torch.isfinite(expected).all()
    others, theirs = got.flatten(0, 1)[:-1], expected.flatten(0, 1)[:-1]
    if backend in EXACT_BACKENDS:
        assert torch.equal(kept, expected)
        assert torch.equal(others, theirs)
    elif dtype == torch.float32:  # below, a rounding can turn a near-tie between experts
        assert relative(kept, expected) <= 10 * TOLERANCE[dtype]
        assert relative(others, theirs) <= 10 * TOLERANCE[dtype]
    assert not torch.equal(got[-1, -1], expected[-1, -1])
    pairs = tiny.layers * tiny.ids.numel() * tiny.top_k
    assert sum(session.report().executed_pairs) == pairs - 1
    for call in calls:
        meant = eager(call, call.index, call.weight)
        assert relative(call.output[:-1], meant[:-1]) <= TOLERANCE[dtype]


class DispatchContract:
    """What must hold for every model whose experts transformers dispatches."""

    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
    def test_keep_all_is_grouped_mm_bit_for_bit(self, tiny, dtype, backend):
        check_keep_all(tiny, dtype, backend)

    @pytest.mark.parametrize("mode", ["plain", "verified"])
    def test_the_fast_path_executes_exactly_its_pairs(self, tiny, mode, backend):
        policy, ids = var(tiny, mode), tiny.ids.flatten()
        with (
            spied(backend) as spy,
            routed(tiny.model, policy, backend="spy") as session,
            watched(tiny.model) as calls,
        ):
            logits(tiny.model, tiny.ids)
        report = session.report()
        fast = 0
        for layer, call in enumerate(calls):
            chosen, tiers = expected_pairs(call, layer, policy.table, ids, mode)
            module, hidden, experts = spy.executed[layer]
            token = torch.tensor([t for t, kept in enumerate(chosen) for _ in kept])
            assert module is call.module
            assert experts.tolist() == [expert for kept in chosen for expert in kept]
            assert torch.equal(hidden, call.hidden[token])
            assert report.executed_pairs[layer] == len(token)
            assert policy.decided[layer][1].tier.tolist() == tiers
            fast += tiers.count(Tier.FAST)
        known = int((ids % 2 == 0).sum()) * tiny.layers
        assert fast == known if mode == "plain" else 0 < fast < known

    @pytest.mark.parametrize("mode", ["plain", "verified"])
    def test_kept_weights_sum_to_the_routers_own_sum(self, tiny, mode, backend):
        policy = var(tiny, mode)
        with routed(tiny.model, policy, backend=backend), watched(tiny.model) as calls:
            logits(tiny.model, tiny.ids)
        cut = 0
        for call, (_, routing) in zip(calls, policy.decided, strict=True):
            kept = torch.where(routing.index >= 0, routing.weight, torch.zeros_like(routing.weight))
            torch.testing.assert_close(kept.sum(1), call.weight.sum(1), rtol=1e-5, atol=1e-8)
            assert torch.isfinite(routing.weight).all()
            # What runs is what these pairs and weights mean to the module's own forward.
            meant = eager(call, routing.index, routing.weight)
            assert relative(call.output, meant) <= TOLERANCE[torch.float32]
            cut += int((routing.index < 0).sum())
        assert cut > 0 or tiny.top_k == 1

    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
    def test_residual_means_stand_for_what_is_dropped(self, tiny, dtype, backend):
        """Zero means leave the kept experts their own weights, and add nothing."""
        model = tiny.within(dtype)
        size = experts_modules(model)[0][1].down_proj.shape
        hidden = size[2] if experts_modules(model)[0][1].is_transposed else size[1]

        def scored(value: float) -> tuple[Tensor, list[Call], Recording]:
            table = torch.full((tiny.experts**2 + 1, hidden), value)
            table[-1] = 0.0
            means = ResidualMeans(table=(table,) * tiny.layers, by_pair=True, experts=tiny.experts)
            policy = var(tiny, "verified", residuals=means)
            with routed(model, policy, backend=backend), watched(model) as calls:
                return logits(model, tiny.ids), calls, policy

        zero, calls, policy = scored(0.0)
        for call, (_, routing) in zip(calls, policy.decided, strict=True):
            assert torch.equal(routing.weight, call.weight)
            meant = eager(call, routing.index, call.weight)
            assert relative(call.output, meant) <= TOLERANCE[dtype]
        if tiny.top_k > 1:
            assert not torch.equal(scored(1.0)[0], zero)

    @pytest.mark.parametrize("failing", [False, True], ids=["leaving", "exception"])
    def test_leaving_restores_everything(self, tiny, failing, backend):
        expected = logits(tiny.model, tiny.ids, "grouped_mm")
        before = snapshot(tiny.model)
        last = tiny.layers - 1
        policy = Failing(last) if failing else DropLastPair(last)
        expectation = (
            pytest.raises(RuntimeError, match="policy failed") if failing else nullcontext()
        )
        with expectation, routed(tiny.model, policy, backend=backend):
            assert differences(before, snapshot(tiny.model)) != []
            logits(tiny.model, tiny.ids)
        assert differences(before, snapshot(tiny.model)) == []
        assert torch.equal(logits(tiny.model, tiny.ids), expected)

    def test_layers_are_numbered_as_they_run(self, tiny, backend):
        """The policy's layer l is the l-th MoE layer that runs; dense ones are not counted."""
        policy = var(tiny, "verified")
        with routed(tiny.model, policy, backend=backend), watched(tiny.model) as calls:
            logits(tiny.model, tiny.ids)
        assert [layer for layer, _ in policy.decided] == list(range(tiny.layers))
        assert [call.name for call in calls] == [name for name, _ in experts_modules(tiny.model)]
        numbers = [int(call.name.split("layers.")[1].split(".")[0]) for call in calls]
        assert numbers == sorted(set(numbers))
        assert tiny.layers >= 2

    def test_top_k_and_experts_are_read_from_the_configuration(self, tiny, tiny_tokenizer):
        loaded = LoadedModel.of(tiny.model, tiny_tokenizer, name=tiny.family.module)
        with watched(tiny.model) as calls:
            logits(tiny.model, tiny.ids)
        assert {call.index.shape[1] for call in calls} == {loaded.top_k} == {tiny.top_k}
        assert loaded.num_experts == tiny.experts
        assert all(int(call.index.max()) < tiny.experts for call in calls)

    def test_profiling_works_and_its_profile_runs(self, tiny, backend, tiny_texts, tiny_tokenizer):
        loaded = LoadedModel.of(tiny.model, tiny_tokenizer, name=tiny.family.module)
        texts = [TextDocument(str(i), "s", text) for i, text in enumerate(tiny_texts[:4])]
        documents = encode(texts, tiny_tokenizer)
        before = snapshot(tiny.model)
        profile = collect_profile(
            loaded, documents, dataset="tiny", data_hash="h", max_tokens=None, backend=backend
        )
        assert differences(before, snapshot(tiny.model)) == []
        tokens = sum(len(document.ids) for document in documents)
        assert profile.stats.groupby("layer").frequency.sum().tolist() == [tokens] * tiny.layers
        numbers = profile.stats.select_dtypes("number")
        assert numbers.notna().all(axis=None)
        # One more class than experts where a router can choose to skip them.
        assert profile.stats.max_entropy.max() <= torch.tensor(tiny.experts + 1.0).log()
        assert profile.stats.max_entropy.min() > 0
        table = profile.table()
        assert torch.isfinite(table.weight).all()
        assert all(torch.isfinite(mean).all() for mean in profile.residuals.table)
        config = VARConfig(frequency_threshold=1, entropy_threshold=4.0)
        policy = VARPolicy(config, table, residuals=profile.residuals)
        text = torch.from_numpy(documents[0].ids)[None]
        with routed(tiny.model, policy, backend=backend) as session:
            scored = logits(tiny.model, text)
        assert torch.isfinite(scored).all()
        assert session.report().fast_pct > 0

    def test_traces(self, tiny, backend, tiny_texts, tiny_tokenizer):
        """A recording with its way back, and configurations replayed on it."""
        loaded = LoadedModel.of(tiny.model, tiny_tokenizer, name=tiny.family.module)
        texts = [TextDocument(str(i), "s", text) for i, text in enumerate(tiny_texts[:3])]
        documents = encode(texts, tiny_tokenizer)
        before = snapshot(tiny.model)
        trace = record_trace(
            loaded, documents, dataset="tiny", data_hash="h", window=64, backend=backend
        )
        assert differences(before, snapshot(tiny.model)) == []
        assert trace.tokens == sum(len(document.ids) for document in documents)
        assert trace.index.shape == (tiny.layers, trace.tokens, tiny.top_k)
        columns = trace.columns()
        assert all(torch.isfinite(column).all() for column in columns.values())
        assert trace.damage["cut"].shape == (*trace.index.shape[:2], tiny.top_k - 1)
        # Every layer's output reaches the loss.
        assert (trace.damage["foreign"] != 0).flatten(1).any(dim=1).all()
        losses = document_losses(tiny.model, documents, window=64)
        assert float(trace.nll.double().sum()) == pytest.approx(losses.nll.sum(), rel=1e-4)
        replay = TraceReplay(trace, tiny.table())
        found = replay.evaluate(VARConfig()).report
        assert found.tokens == trace.tokens
        assert found.fast_pct > 0
        keep_all = VARConfig(entropy_threshold=0, frequency_threshold=10**9, cache_size=0)
        native = replay.evaluate(keep_all.replace(confidence_threshold=1.0, mode="plain"))
        assert native.report.experts_per_token == tiny.top_k
