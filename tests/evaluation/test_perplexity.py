"""Losses of documents, token by token; degradation and its bounds, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from var_moe.data.documents import EncodedDocument
from var_moe.errors import UsageError
from var_moe.evaluation.batching import windows
from var_moe.evaluation.perplexity import (
    DocumentLosses,
    datasets_of,
    degradation,
    document_losses,
    groups_of,
    worst_of,
)
from var_moe.execution.session import routed
from var_moe.routing.simple import NativePolicy


def document(number, size, seed=0):
    ids = np.random.default_rng([seed, number]).integers(0, 300, size)
    return EncodedDocument(id=f"d{number}", source="s", ids=ids)


def slow_loss(model, ids):
    """One document alone, one token at a time."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].double()
    logs = logits.log_softmax(-1)
    return -sum(float(logs[at - 1, ids[at]]) for at in range(1, len(ids)))


@pytest.fixture
def model(make_tiny_mixtral):
    return make_tiny_mixtral()


def test_padded_batches_give_each_document_its_own_loss(model):
    documents = [document(i, size) for i, size in enumerate([5, 1, 17, 9, 30, 2])]
    found = document_losses(model, documents, window=64, tokens_per_batch=60)
    assert found.tokens.tolist() == [4, 0, 16, 8, 29, 1]
    expected = [slow_loss(model, d.ids) for d in documents]
    assert found.nll == pytest.approx(expected, abs=2e-3)
    assert found.perplexity == pytest.approx(np.exp(sum(expected) / 58), rel=1e-4)


def test_windows_score_every_token_but_the_first_once(model):
    long = document(0, 45)
    found = document_losses(model, [long], window=16)
    assert found.tokens.tolist() == [44]
    cut = windows(0, long.ids, 16, prefix=16)
    assert [len(w.ids) for w in cut] == [16, 16, 16, 9]
    assert [w.overlap for w in cut] == [0, 4, 4, 4]
    assert [w.prefix.tolist() for w in cut[1:]] == [
        long.ids[:12].tolist(),
        long.ids[8:24].tolist(),
        long.ids[20:36].tolist(),
    ]
    with torch.inference_mode():
        second = model(input_ids=torch.tensor([cut[1].ids.tolist()]), use_cache=False).logits[0]
    logs = second.double().log_softmax(-1)
    by_hand = -sum(float(logs[at - 1, cut[1].ids[at]]) for at in range(4, 16))
    first = slow_loss(model, long.ids[:16])
    two = document_losses(model, [document(0, 45)], window=16).nll[0]
    rest = two - first - by_hand
    assert rest > 0
    only_two = EncodedDocument(id="x", source="s", ids=long.ids[:28])
    assert document_losses(model, [only_two], window=16).nll[0] == pytest.approx(
        first + by_hand, abs=2e-3
    )


def test_overlap_is_left_out_of_the_counts(model):
    with routed(model, NativePolicy()) as session:
        document_losses(model, [document(0, 45)], window=16, session=session)
    assert session.report().tokens == 45


def test_nothing_to_score_is_refused(model):
    with pytest.raises(UsageError, match="no text to score"):
        document_losses(model, [document(0, 1)], window=16)


@pytest.mark.parametrize("given", [None, "a text", ["a text"], iter(())])
def test_texts_must_be_tokenised_first(model, given):
    with pytest.raises(UsageError, match=r"expected a list of encoded documents, as .*encode\("):
        document_losses(model, given, window=16)


def test_a_policy_is_told_as_many_ids_before_a_window_as_it_looks_at(model):
    class Long(NativePolicy):
        context_window = 30

        def begin(self, context):
            self.prefix = context.prefix

    policy = Long()
    with routed(model, policy) as session:
        document_losses(model, [document(0, 45)], window=16, session=session)
    assert policy.prefix.shape[1] == 29


# -- paired comparison ----------------------------------------------------------------------


def losses(nll, tokens):
    return DocumentLosses(nll=np.array(nll, dtype=float), tokens=np.array(tokens))


def test_by_hand():
    base = losses([10.0, 20.0, 30.0], [5, 10, 10])
    other = losses([11.0, 20.5, 31.0], [5, 10, 10])
    change = degradation(base, other)
    # d = 1, 0.5, 1; T = 25; r = 2.5 / 25 = 0.1; rest = 0.5, -0.5, 0
    error = math.sqrt(3 / 2 * 0.5) / 25
    assert change.value == pytest.approx(math.exp(0.1) - 1)
    assert change.standard_error == pytest.approx(math.exp(0.1) * error)
    assert change.upper == pytest.approx(math.exp(0.1 + 2.9199856 * error) - 1)
    assert change.baseline_perplexity == pytest.approx(math.exp(60 / 25))
    assert change.perplexity == pytest.approx(math.exp(62.5 / 25))
    assert (change.documents, change.tokens) == (3, 25)


def test_documents_without_scored_tokens_do_not_count():
    base, other = losses([1, 2, 0], [1, 2, 0]), losses([1.5, 2.5, 0], [1, 2, 0])
    assert degradation(base, other).documents == 2


def test_upper_bound_covers_at_its_rate():
    """The true ratio lies above the bound in about 5% of studies."""
    rng = np.random.default_rng(5)
    true, studies, over = 0.01, 1500, 0
    for _ in range(studies):
        size = rng.integers(50, 400, 80)
        noise = rng.standard_t(5, 80) * 0.02 * np.sqrt(size)
        base = losses(size * 2.5, size)
        change = degradation(base, losses(base.nll + size * math.log1p(true) + noise, size))
        over += change.upper < true
    assert stats.binomtest(over, studies, 0.05).pvalue > 0.01


def test_other_tokens_are_refused():
    with pytest.raises(UsageError, match="different tokens"):
        degradation(losses([1, 2], [1, 2]), losses([1, 2], [2, 2]))


def test_one_document_is_too_few():
    with pytest.raises(UsageError, match="at least 2 documents"):
        degradation(losses([1], [1]), losses([1], [1]))


# -- several data sets ----------------------------------------------------------------------


def named(*names, source="s"):
    return [
        EncodedDocument(f"{name}/{i}", source, np.arange(3), name) for i, name in enumerate(names)
    ]


def per_token(*values, tokens=100):
    count = np.full(len(values), tokens)
    return DocumentLosses(nll=np.array(values) * count, tokens=count)


def test_documents_by_data_set():
    found = datasets_of(named("a", "b", "a"))
    assert {name: at.tolist() for name, at in found.items()} == {"a": [0, 2], "b": [1]}


def test_one_data_set_is_told_apart_by_its_sources_alone():
    text = [*named("", "", source="x"), *named("", source="y")]
    assert datasets_of(text) == {}
    assert {name: at.tolist() for name, at in groups_of(text).items()} == {"x": [0, 1], "y": [2]}
    assert groups_of(named("", "")) == {}


CALM = [0.002, 0.002, 0.002, 0.002]


HARSH = [0.015, 0.015]
"""Change of the loss per token: two thirds at +0.2%, a third at +1.5%."""


def test_the_union_keeps_a_bound_that_the_worst_breaks():
    before = per_token(*[1.0] * 6)
    after = per_token(*(1.0 + np.array([*CALM, *HARSH])))
    groups = datasets_of(named(*"aaaabb"))
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
    before = per_token(*[1.0] * 8)
    after = per_token(*(1.0 + np.array([0.006] * 6 + [0.0, 0.010])))
    groups = datasets_of(named(*"aaaaaabb"))
    worst = worst_of(before, after, groups)
    assert worst.dataset == "b"
    assert worst.change.value == pytest.approx(math.expm1(0.005))


def test_a_data_set_of_one_document_cannot_be_judged():
    with pytest.raises(UsageError, match="too few documents of 'b' to judge it: 1, at least 2"):
        worst_of(per_token(1.0, 1.0, 1.0), per_token(1.0, 1.0, 1.0), datasets_of(named(*"aab")))
