"""Samples of text, windows and batches of documents, and batches for timing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from var_moe.data.documents import EncodedDocument
from var_moe.errors import UsageError
from var_moe.evaluation.batching import batches, collate, drawn, full_batches, windows


def made(*sizes):
    return [EncodedDocument(str(i), "s", np.arange(size)) for i, size in enumerate(sizes)]


def taken(documents, tokens, seed=0):
    return {at: len(document.ids) for at, document in drawn(documents, tokens, seed).items()}


@pytest.mark.parametrize("tokens", [1, 2, 2_000, 40_000])
def test_one_long_document_is_cut(tokens):
    assert list(taken(made(40_000, 40_000, 40_000), tokens).values()) == [tokens]


def test_the_number_is_held_by_cutting_the_last_document():
    documents = made(*[50] * 20)
    found = taken(documents, 170)
    assert list(found.values()) == [50, 50, 50, 20]
    assert list(taken(documents, 101).values()) == [50, 50]  # one token has no loss
    assert list(taken(documents, 100, seed=3)) == list(taken(documents, 170, seed=3))[:2]
    assert len(documents[list(found)[-1]].ids) == 50
    assert taken(documents, 5_000) == taken(documents, 1_000)
    assert list(taken(documents, None)) == list(range(20))


def test_batches_come_in_mixed_order_and_long_documents_in_one_piece():
    found = list(batches(made(*[5, 60, 12, 33, 90, 7, 8, 41, 6]), 40, window=16))
    rows = [row.document for batch in found for row in batch]
    assert [number for number, _ in itertools.groupby(rows)] == list(dict.fromkeys(rows))
    assert sorted(set(rows)) == list(range(9))
    widths = [max(len(row.ids) for row in batch) for batch in found]
    assert widths != sorted(widths, reverse=True)
    again = batches(made(*[5, 60, 12, 33, 90, 7, 8, 41, 6]), 40, window=16)
    assert [[row.document for row in batch] for batch in again] == [
        [row.document for row in batch] for batch in found
    ]


def test_batches_hold_every_document_once_within_the_budget():
    documents = made(*[3 + 7 * i % 40 for i in range(30)])
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


def test_text_shorter_than_a_timing_row_is_refused():
    with pytest.raises(UsageError, match="text of 20 tokens is shorter than one row of 32"):
        full_batches(made(20), batch_size=2, sequence=32)


def test_timing_rows_are_spread_over_the_text():
    ids = np.arange(1000)
    text = [EncodedDocument(id=str(i), source="s", ids=ids[i : i + 100]) for i in (0, 100, 200)]
    rows = torch.cat(full_batches(text, batch_size=2, sequence=20, forwards=2))
    assert rows[:, 0].tolist() == [0, 93, 186, 280]
    assert (rows.diff(dim=1) == 1).all()


def test_blocks_are_timed_on_rows_of_their_own_from_all_parts():
    text = made(3000)
    blocks = full_batches(text, batch_size=2, sequence=20, forwards=3, blocks=4)
    starts = torch.stack(blocks)[:, :, 0].view(4, 6)
    assert len(set(starts.flatten().tolist())) == 24
    assert (starts.diff(dim=1) > 100).all()  # each in the text's order, and all over it
    assert (starts[:, -1] > 2000).all()


def test_another_turn_takes_other_rows():
    text, drawn = made(3000), set()
    for turn in range(20):
        rows = torch.cat(full_batches(text, batch_size=2, sequence=20, blocks=2, turn=turn))
        assert (rows.diff(dim=1) == 1).all()
        drawn |= set(rows[:, 0].tolist())
    assert len(drawn) == 80


def test_timing_rows_overlap_where_the_text_is_short():
    rows = torch.cat(full_batches(made(40), batch_size=2, sequence=32, forwards=2))
    assert rows.shape == (4, 32)
    assert torch.equal(rows[0, 8:], rows[3, :-8])
