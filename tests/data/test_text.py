"""Data sets by name: the demo, several as one text, and random subsets of them."""

from __future__ import annotations

import json

import pytest

from var_moe.data.documents import SPLITS
from var_moe.data.encoding import encode
from var_moe.data.text import check_dataset, load_text, names_of
from var_moe.errors import UsageError


@pytest.fixture
def folders(tmp_path):
    """Makes a data set of a name with these validation texts."""

    def make(name, texts):
        folder = tmp_path / name
        folder.mkdir()
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / "validation.jsonl").write_text(rows)
        return str(folder)

    return make


def test_names_stand_between_commas():
    assert names_of("demo") == ("demo",)
    assert names_of("demo-postgres, demo-python,demo-kjv") == (
        *("demo-postgres", "demo-python", "demo-kjv"),
    )


@pytest.mark.parametrize(
    ("dataset", "why"),
    [
        ("", "dataset '': expected a name"),
        ("demo,", "expected a name, or several with commas between"),
        ("demo-kjv,demo,demo-kjv", "'demo-kjv' is given twice"),
        ("demo-kjv,demo-klingon", "'demo-klingon': expected one of demo, "),
        ("demo,./nowhere.jsonl", "nowhere.jsonl: no such file"),
    ],
)
def test_a_bad_list_is_refused_in_one_line(dataset, why):
    with pytest.raises(UsageError) as caught:
        check_dataset(dataset)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_documents_know_their_data_set_and_share_no_id(folders, tiny_tokenizer):
    one = folders("one", ["alpha beta", "gamma delta", "beta beta"])
    two = folders("two", ["index select", "where order"])
    text = load_text(f"{one},{two}", "validation")
    assert [d.dataset for d in text.documents] == [one, two, one, two, one]
    assert len({d.id for d in text.documents}) == 5  # both files number theirs from 0
    assert [(part.dataset, len(part.documents)) for part in text.parts] == [(one, 3), (two, 2)]
    assert [d.dataset for d in encode(text, tiny_tokenizer)] == [one, two, one, two, one]
    assert text.content_hash not in [part.content_hash for part in text.parts]


def test_one_data_set_is_as_before(folders):
    text = load_text(folders("one", ["alpha", "beta"]), "validation")
    assert [(d.id, d.dataset) for d in text.documents] == [
        ("validation.jsonl:0", ""),
        ("validation.jsonl:1", ""),
    ]
    assert text.parts == ()


def test_a_text_of_two_data_sets_counts_once(folders):
    one, two = folders("one", ["alpha", "beta"]), folders("two", ["beta", "gamma"])
    text = load_text(f"{one},{two}", "validation")
    assert sorted(d.text for d in text.documents) == ["alpha", "beta", "gamma"]
    assert "1 documents are of the others" in text.parts[1].note


def test_a_part_of_another_data_set_is_refused():
    with pytest.raises(UsageError, match="'demo-postgres' has no text that the others lack"):
        load_text("demo,demo-postgres", "validation")


def test_the_demo_and_a_text_out_of_its_domain():
    text = load_text("demo-postgres,demo-kjv", "test")
    count = {part.dataset: len(part.documents) for part in text.parts}
    assert count == {"demo-postgres": 416, "demo-kjv": 654}
    first = [d.dataset for d in text.documents[:107]]
    assert first.count("demo-postgres") == pytest.approx(107 * 416 / 1070, abs=1)


SOURCES = {"postgres", "python", "wordnet"}


@pytest.mark.parametrize("split", SPLITS)
def test_demo_splits(split):
    mix = load_text("demo", split)
    assert {d.source for d in mix.documents} == SOURCES
    size = {s: sum(len(d.text) for d in mix.documents if d.source == s) for s in SOURCES}
    assert min(size.values()) >= 0.2 * sum(size.values())
    parts = [load_text(f"demo-{source}", split) for source in sorted(SOURCES)]
    assert sum(len(part.documents) for part in parts) == len(mix.documents)
    assert len(load_text("demo-kjv", split).documents) >= 100
    if split in ("certify", "test"):
        assert len(mix.documents) >= 1000


def test_demo_documents_are_in_one_split_only():
    seen: dict[str, str] = {}
    for dataset in ("demo", "demo-kjv"):
        for split in SPLITS:
            for document in load_text(dataset, split).documents:
                assert seen.setdefault(document.text, split) == split
                assert seen.setdefault(document.id, split) == split


def test_a_package_without_its_text(refused, monkeypatch, tmp_path):
    monkeypatch.setattr("var_moe.data.text.DEMO_FOLDER", tmp_path)
    assert "the package lacks its text, demo/text/test.parquet" in refused(
        load_text, "demo", "test"
    )


def test_the_hash_is_of_the_documents_in_order(write):
    one, other = write("a.txt", "x\fy"), write("b.txt", "y\fx")
    found = load_text(str(one), "all").content_hash
    assert found == load_text(str(write("c.txt", "x\fy\f")), "all").content_hash
    assert found != load_text(str(other), "all").content_hash
    assert found != load_text(str(write("d.txt", "x")), "all").content_hash
