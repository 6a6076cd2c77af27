"""Several data sets as one text: names, turns, whose document is whose, and what is refused."""

from __future__ import annotations

import json

import pytest

from var_moe.data.documents import in_turn
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


def test_a_file_with_a_comma_in_its_name_is_one(tmp_path):
    path = tmp_path / "a,b.jsonl"
    path.write_text('{"text": "one"}\n')
    assert names_of(str(path)) == (str(path),)


@pytest.mark.parametrize(
    ("dataset", "why"),
    [
        ("demo,", "expected a name before and after each comma"),
        (",demo", "expected a name before and after each comma"),
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


def test_turns_in_the_proportions_of_the_whole():
    found = in_turn([list("aaaaaaaa"), list("bbbb")])
    assert "".join(found) == "abaabaabaaba"
    assert [found[:6].count(name) for name in "ab"] == [4, 2]


def test_equal_turns_as_long_as_they_last():
    assert "".join(in_turn([list("aaaaa"), list("bb"), list("cc")], equal=True)) == "abcabcaaa"


def test_each_group_keeps_its_order():
    assert in_turn([[3, 1, 2], [30, 10]], equal=True) == [3, 30, 1, 10, 2]


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
