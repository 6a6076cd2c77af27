"""Which documents make up so many tokens."""

from __future__ import annotations

import numpy as np
import pytest

from var_moe.data.documents import EncodedDocument
from var_moe.evaluation.batching import drawn


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
