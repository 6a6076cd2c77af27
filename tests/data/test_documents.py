"""Documents: which split they fall to, their pages, and their order."""

from __future__ import annotations

import numpy as np
import pytest

from var_moe.data.documents import (
    SHARES,
    SPLITS,
    EncodedDocument,
    in_turn,
    one_per_page,
    page_of,
    require_documents,
    share_of,
    shuffled_pages,
)
from var_moe.errors import UsageError


@pytest.mark.parametrize(
    ("text", "split"),
    # The first 16 digits of `printf a | sha256sum`, over 2^64.
    [
        ("m", "calibration"),  # 62c66a7a5dd70c31: 0.3858
        ("k", "validation"),  # 8254c329a92850f6: 0.5091
        ("h", "certify"),  # aaa9402664f1a41f: 0.6666
        ("a", "certify"),  # ca978112ca1bbdca: 0.7913
        ("g", "test"),  # cd0aa9856147b6c5: 0.8009
        ("i", "test"),  # de7d1b721a1e0632: 0.8690
    ],
)
def test_split_of_by_hand(text, split):
    assert share_of(text, SPLITS) == split


def test_share_of_some_splits_by_hand():
    # 25 of 40 points are validation's: k is at 20.4, h at 26.7.
    assert share_of("k", ("validation", "certify")) == "validation"
    assert share_of("h", ("validation", "certify")) == "certify"
    assert share_of("h", ("test",)) == "test"


@pytest.mark.parametrize("splits", [SPLITS, ("calibration", "certify"), ("validation", "certify")])
def test_shares_are_kept(splits):
    names = [share_of(f"document {i}", splits) for i in range(20_000)]
    total = sum(SHARES[name] for name in splits)
    for name in splits:
        assert names.count(name) / len(names) == pytest.approx(SHARES[name] / total, abs=0.012)


@pytest.mark.parametrize(
    ("document", "page"),
    [
        ("manual/a#3", "manual/a"),
        ("a#b", "a#b"),
        ("#3", "#3"),
        ("plain", "plain"),
        ("a#1#2", "a#1"),
    ],
)
def test_sections_of_a_page(document, page):
    assert page_of(document) == page


def test_pages_in_random_order_hold_all_their_sections() -> None:
    sections = [EncodedDocument(f"p{n % 4}#{n}", "made", np.zeros(3)) for n in range(20)]
    pages = shuffled_pages(sections, seed=0)
    assert all(len({page_of(one.id) for one in page}) == 1 for page in pages)
    assert sorted(one.id for page in pages for one in page) == sorted(one.id for one in sections)
    orders = [[page_of(page[0].id) for page in shuffled_pages(sections, seed=s)] for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert len(pages) == 4


def test_one_section_of_each_page() -> None:
    documents = [EncodedDocument(f"p{n % 4}#{n}", "made", np.zeros(3)) for n in range(20)]
    chosen = one_per_page(documents)
    assert {document.id.split("#")[0] for document in chosen} == {"p0", "p1", "p2", "p3"}
    assert len(chosen) == 4
    assert one_per_page(documents, seed=1) != chosen


def test_turns_in_the_proportions_of_the_whole():
    found = in_turn([list("aaaaaaaa"), list("bbbb")])
    assert "".join(found) == "abaabaabaaba"
    assert [found[:6].count(name) for name in "ab"] == [4, 2]


def test_equal_turns_as_long_as_they_last():
    assert "".join(in_turn([list("aaaaa"), list("bb"), list("cc")], equal=True)) == "abcabcaaa"


def test_each_group_keeps_its_order():
    assert in_turn([[3, 1, 2], [30, 10]], equal=True) == [3, 30, 1, 10, 2]


def test_require_documents():
    require_documents([1, 2], 2, "x")
    with pytest.raises(UsageError, match="too few documents for x: 1, at least 2 needed"):
        require_documents([1], 2, "x")
