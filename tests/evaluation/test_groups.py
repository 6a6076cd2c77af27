"""Data sets apart, on losses made by hand; and the same in passes of a tiny model."""

from __future__ import annotations

import math

import numpy as np
import pytest

from var_moe.data.documents import EncodedDocument
from var_moe.errors import UsageError
from var_moe.evaluation.evaluator import Evaluator, SpeedSetting, measure_apart
from var_moe.evaluation.perplexity import (
    DocumentLosses,
    any_over,
    datasets_of,
    degradation,
    groups_of,
    worst_of,
)
from var_moe.models.loading import LoadedModel
from var_moe.routing.fixed_k import FixedKPolicy
from var_moe.routing.top_p import TopPPolicy


def documents(*names, source="s"):
    return [
        EncodedDocument(f"{name}/{i}", source, np.arange(3), name) for i, name in enumerate(names)
    ]


def losses(*per_token, tokens=100):
    count = np.full(len(per_token), tokens)
    return DocumentLosses(nll=np.array(per_token) * count, tokens=count)


def test_documents_by_data_set():
    found = datasets_of(documents("a", "b", "a"))
    assert {name: at.tolist() for name, at in found.items()} == {"a": [0, 2], "b": [1]}


def test_one_data_set_is_told_apart_by_its_sources_alone():
    text = [*documents("", "", source="x"), *documents("", source="y")]
    assert datasets_of(text) == {}
    assert {name: at.tolist() for name, at in groups_of(text).items()} == {"x": [0, 1], "y": [2]}
    assert groups_of(documents("", "")) == {}


CALM = [0.002, 0.002, 0.002, 0.002]
HARSH = [0.015, 0.015]
"""Change of the loss per token: two thirds at +0.2%, a third at +1.5%."""


def test_the_union_keeps_a_bound_that_the_worst_breaks():
    before = losses(*[1.0] * 6)
    after = losses(*(1.0 + np.array([*CALM, *HARSH])))
    groups = datasets_of(documents(*"aaaabb"))
    union = degradation(before, after)
    assert union.value == pytest.approx(math.expm1((4 * 0.002 + 2 * 0.015) / 6))  # +0.64%
    assert union.value < 0.01
    worst = worst_of(before, after, groups)
    assert worst.dataset == "b"
    assert worst.change.value == pytest.approx(math.expm1(0.015))
    assert worst.change.upper == pytest.approx(math.expm1(0.015))  # equal: no spread
    assert worst.change.documents == 2


def test_the_worst_is_the_one_with_the_highest_upper_bound():
    """b costs less than a on average, and is less certain."""
    before = losses(*[1.0] * 8)
    after = losses(*(1.0 + np.array([0.006] * 6 + [0.0, 0.010])))
    groups = datasets_of(documents(*"aaaaaabb"))
    worst = worst_of(before, after, groups)
    assert worst.dataset == "b"
    assert worst.change.value == pytest.approx(math.expm1(0.005))


def test_a_data_set_of_one_document_cannot_be_judged():
    with pytest.raises(UsageError, match="too few documents of 'b' to judge it: 1, at least 2"):
        worst_of(losses(1.0, 1.0, 1.0), losses(1.0, 1.0, 1.0), datasets_of(documents(*"aab")))


def test_a_search_drops_what_is_over_on_one_data_set_alone():
    dice = np.random.default_rng(0)
    change = np.concatenate([dice.normal(-0.02, 0.002, 60), dice.normal(0.02, 0.002, 60)])
    before, after = losses(*[1.0] * 120), losses(*(1.0 + change))
    groups = datasets_of(documents(*["a"] * 60, *["b"] * 60))
    assert not any_over(before, after, {}, 0.01)  # together nothing changes
    assert any_over(before, after, groups, 0.01)


def test_documents_that_are_not_scored_yet_do_not_count():
    tokens = np.array([100] * 20 + [0] * 20)
    before = DocumentLosses(nll=tokens * 1.0, tokens=tokens)
    wobble = np.random.default_rng(1).normal(0, 0.001, 40)
    after = DocumentLosses(nll=tokens * (1.05 + wobble), tokens=tokens)
    groups = datasets_of(documents(*["a"] * 20, *["b"] * 20))
    assert any_over(before, after, groups, 0.01)
    assert worst_of(before, after, groups, partial=True).dataset == "a"


@pytest.fixture(scope="module")
def evaluator(make_tiny_mixtral, tiny_tokenizer):
    dice = np.random.default_rng(4)
    text = [
        EncodedDocument(str(i), "s", dice.integers(1, 300, 12 + i % 9), "ab"[i % 3 == 0])
        for i in range(24)
    ]
    loaded = LoadedModel.of(make_tiny_mixtral(), tiny_tokenizer)
    setting = SpeedSetting(batch_size=2, sequence=32, forwards=1)
    return Evaluator(loaded, text, setting=setting)


def test_each_data_set_shows_what_it_would_alone(evaluator):
    rows = measure_apart(evaluator, FixedKPolicy(1))
    assert [row.dataset for row in rows] == ["b", "a"]
    for row in rows:
        own = [d for d in evaluator.documents if d.dataset == row.dataset]
        alone = evaluator.with_documents(own).quality(FixedKPolicy(1))
        assert row.quality.change.value == pytest.approx(alone.change.value, rel=1e-5)
        assert row.quality.report.experts_per_token == 1.0
        assert row.to_dict()["documents"] == len(own)
    whole = evaluator.quality(FixedKPolicy(1)).change
    assert sum(row.quality.change.tokens for row in rows) == whole.tokens
    by_hand = sum(math.log1p(row.quality.change.value) * row.quality.change.tokens for row in rows)
    assert math.expm1(by_hand / whole.tokens) == pytest.approx(whole.value, rel=1e-5)


def test_experts_per_token_are_the_data_sets_own(evaluator):
    rows = measure_apart(evaluator, TopPPolicy(0.6))
    whole = evaluator.quality(TopPPolicy(0.6)).report
    counts = [row.quality.report for row in rows]
    assert sum(sum(one.executed_pairs) for one in counts) == sum(whole.executed_pairs)
    assert counts[0].experts_per_token != counts[1].experts_per_token


def test_the_worst_is_judged_where_that_is_asked_for(evaluator):
    plain = evaluator.quality(FixedKPolicy(1))
    assert plain.worst is None
    assert plain.judged == plain.change
    robust = evaluator.with_documents(evaluator.documents)
    robust.robust = True
    found = robust.quality(FixedKPolicy(1))
    assert found.change.value == pytest.approx(plain.change.value)
    assert found.judged is found.worst.change
    uppers = {r.dataset: r.quality.change.upper for r in measure_apart(robust, FixedKPolicy(1))}
    assert found.worst.dataset == max(uppers, key=uppers.get)
    assert found.judged.upper == pytest.approx(max(uppers.values()), rel=1e-5)
    assert found.to_dict()["worst_degradation_upper_95"] == found.judged.upper
