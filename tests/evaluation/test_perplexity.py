"""Per-document losses against a token-by-token computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from var_moe.data.documents import EncodedDocument
from var_moe.errors import UsageError
from var_moe.evaluation.batching import batches, collate, full_batches, windows
from var_moe.evaluation.perplexity import document_losses
from var_moe.execution.session import routed
from var_moe.routing.native import NativePolicy


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


def test_batches_hold_every_document_once_within_the_budget():
    documents = [document(i, 3 + 7 * i % 40) for i in range(30)]
    seen = []
    for rows in batches(documents, 100, window=50):
        width = max(len(row.ids) for row in rows)
        assert len(rows) == 1 or width * len(rows) <= 100
        seen += [row.document for row in rows]
    assert sorted(seen) == list(range(30))


def test_collate_marks_padding_and_overlap():
    batch = collate(windows(7, np.arange(20), 8, prefix=16)[1:3])
    assert batch.ids.tolist()[0] == list(range(6, 14))
    assert batch.counted[0].tolist() == [False, False] + [True] * 6
    assert batch.document == (7, 7)
    assert batch.prefix is not None
    assert batch.prefix[0, -6:].tolist() == list(range(6))
    assert batch.prefix[0, :-6].eq(-1).all()


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


def test_text_shorter_than_a_timing_row_is_refused():
    with pytest.raises(UsageError, match="text of 20 tokens is shorter than one row of 32"):
        full_batches([document(0, 20)], batch_size=2, sequence=32, count=1)


def test_timing_rows_are_spread_over_the_text():
    ids = np.arange(1000)
    text = [EncodedDocument(id=str(i), source="s", ids=ids[i : i + 100]) for i in (0, 100, 200)]
    rows = torch.cat(full_batches(text, batch_size=2, sequence=20, count=2))
    assert rows[:, 0].tolist() == [0, 93, 186, 280]
    assert (rows.diff(dim=1) == 1).all()


def test_timing_rows_overlap_where_the_text_is_short():
    rows = torch.cat(full_batches([document(0, 40)], batch_size=2, sequence=32, count=2))
    assert rows.shape == (4, 32)
    assert torch.equal(rows[0, 8:], rows[3, :-8])


def test_a_policy_is_told_as_many_ids_before_a_window_as_it_looks_at(model):
    class Long(NativePolicy):
        context_window = 30

        def begin(self, context):
            self.prefix = context.prefix

    policy = Long()
    with routed(model, policy) as session:
        document_losses(model, [document(0, 45)], window=16, session=session)
    assert policy.prefix.shape[1] == 29
