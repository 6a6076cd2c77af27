"""Validation's halves."""

from __future__ import annotations

import numpy as np

from var_moe.evaluation.documents import EncodedDocument
from var_moe.optimization.preparation import halves


def documents(ids):
    return [EncodedDocument(id=name, source="s", ids=np.arange(3)) for name in ids]


def test_sections_of_a_page_stay_in_one_half():
    text = documents([f"book/page{i % 40}#{i}" for i in range(400)])
    first, second = halves(text)
    assert sorted(d.id for d in [*first, *second]) == sorted(d.id for d in text)
    pages = [{d.id.split("#")[0] for d in half} for half in (first, second)]
    assert pages[0].isdisjoint(pages[1])
    assert abs(len(first) - len(second)) <= 10
    # A search takes the first of its half: they must be of many pages.
    assert len({d.id.split("#")[0] for d in first[:20]}) > 8
    assert [d.id for d in halves(text)[0]] == [d.id for d in first]


def test_documents_of_one_file_are_not_one_page():
    first, second = halves(documents([f"c#notes.jsonl:{i}" for i in range(30)]))
    assert len(first) == len(second) == 15
