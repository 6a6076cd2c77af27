"""Local text: what each kind of file holds, how it is split, and what is refused."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from var_moe.data.documents import SPLITS
from var_moe.data.readers import PACK_CHARACTERS, looks_local, packed, read_file
from var_moe.data.text import check_dataset, load_text
from var_moe.errors import UsageError


def texts(path):
    return [document.text for document in read_file(path)[0]]


def test_txt_with_form_feeds(tmp_path):
    (tmp_path / "x.txt").write_text("one\n\nstill one\ftwo\f\f three")
    documents, independent = read_file(tmp_path / "x.txt")
    assert [d.text for d in documents] == ["one\n\nstill one", "two", " three"]
    assert independent


def test_txt_paragraphs_are_packed_and_marked(tmp_path):
    paragraph = "word " * 150  # 750 characters
    (tmp_path / "x.txt").write_text("\n\n".join([paragraph] * 6))
    documents, independent = read_file(tmp_path / "x.txt")
    assert [d.text.count("word") for d in documents] == [300, 300, 300]
    assert not independent
    assert "not independent" in load_text(str(tmp_path / "x.txt"), "all").note


def test_a_single_file_is_split_without_overlap(tmp_path):
    path = tmp_path / "x.jsonl"
    texts = [f"document {i}" for i in range(200)]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    parts = {name: load_text(str(path), name) for name in SPLITS}
    together = [d.text for part in parts.values() for d in part.documents]
    assert sorted(together) == sorted(texts)
    assert len(load_text(str(path), "all").documents) == 200
    assert all(part.independent for part in parts.values())


def test_a_folder_names_its_splits(tmp_path):
    (tmp_path / "validation.txt").write_text("a\fb")
    assert len(load_text(str(tmp_path), "validation").documents) == 2
    with pytest.raises(
        UsageError, match=r"expected one of test\.txt, test\.jsonl, test\.json, test\.parquet"
    ):
        load_text(str(tmp_path), "test")


def test_a_path_is_as_good_as_its_name(tiny_text_folder):
    assert load_text(tiny_text_folder, "test") == load_text(str(tiny_text_folder), "test")


def test_one_form_feed_at_the_end_separates_nothing(write):
    paragraph = "word " * 300
    documents, independent = read_file(write("x.txt", f"{paragraph}\n\n{paragraph}\f\n"))
    assert len(documents) == 2
    assert not independent


def test_blank_lines_with_spaces_and_windows_line_ends(write):
    half = "x" * (PACK_CHARACTERS // 2 + 1)
    unix = texts(write("a.txt", f"{half}\n \t\n\n  {half}\n"))
    assert unix == [half, f"  {half}"]
    assert texts(write("b.txt", f"{half}\r\n \t\r\n\r\n  {half}\r\n")) == unix


def test_repeated_documents_are_noted(write):
    split = load_text(str(write("x.txt", "one\ftwo\fone\fone")), "all")
    assert split.note == "the whole file; 2 of 4 documents repeat another"


def test_a_byte_order_mark_is_no_text(write):
    assert texts(write("x.txt", "\ufeffone\ftwo")) == ["one", "two"]


def test_long_paragraphs_are_cut_at_lines_then_spaces():
    lines = "\n".join(["a line of text"] * 400)
    pieces = packed(lines)
    assert all(len(piece) <= PACK_CHARACTERS for piece in pieces)
    assert "\n".join(pieces) == lines
    words = "word " * 1000
    assert " ".join(packed(words)).split() == words.split()
    assert max(map(len, packed("x" * 5_000))) == PACK_CHARACTERS
    assert "".join(packed("x" * 5_000)) == "x" * 5_000


def test_jsonl_rows_may_hold_unicode_line_ends(write):
    row = json.dumps({"text": "one\u2028two\x85three"}, ensure_ascii=False)
    assert texts(write("x.jsonl", f"{row}\n{row}\n")) == ["one\u2028two\x85three"] * 2


def test_jsonl_null_and_blank_rows_are_dropped_and_ids_keep_their_place(write):
    path = write("x.jsonl", '{"text": null}\n\n{"text": " "}\n{"text": "b"}\n')
    assert [d.id for d in read_file(path)[0]] == ["x.jsonl:2"]


def test_json_holds_one_list_or_one_row_to_a_line(write):
    assert texts(write("a.json", '\n[{"text": "one"},\n {"text": "two"}]\n')) == ["one", "two"]
    assert texts(write("b.json", '{"text": "one"}\n{"text": "two"}\n')) == ["one", "two"]


def test_rows_beyond_the_head_are_read_too(write, tmp_path):
    rows = [{"id": number, "text": f"text {number}"} for number in range(2_500)]
    path = write("x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    wanted = [row["text"] for row in rows]
    assert texts(path) == texts(tmp_path / "x.parquet") == wanted
    with path.open("a") as file:
        file.write("no JSON")
    with pytest.raises(UsageError, match="line 2501: not JSON"):
        read_file(path)


def test_parquet_types_of_text(tmp_path):
    for number, kind in enumerate([pa.string(), pa.large_string(), pa.dictionary("int32", "str")]):
        values = pa.array(["one", None, "two"], pa.string()).cast(kind)
        pq.write_table(pa.table({"body": values}), tmp_path / f"{number}.parquet")
        assert texts(tmp_path / f"{number}.parquet") == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.txt", b"\xff\xfe\x00", "not UTF-8 text"),
        ("x.txt", "\n \n", "holds no text"),
        ("x.txt", "", "holds no text"),
        ("x.txt", "\f\f", "holds no text"),
        ("x.jsonl", "", "holds no text"),
        ("x.jsonl", '{"a": "x", "b": "y"}', "no column 'text'; it has a, b; name the one"),
        ("x.jsonl", "{}", "no column 'text'; it has none"),
        ("x.jsonl", '{"text": "x"}\n[1]', "line 2: expected a JSON object"),
        ("x.jsonl", '{"text": "x"}\n{"text": 3}', "line 2: expected a string in field 'text'"),
        ("x.jsonl", '{"text": "x"}\n{"txt": "y"}', "line 2: expected a string in field 'text'"),
        ("x.jsonl", '{"text": "x"}\n{', "line 2: not JSON"),
        ("x.jsonl", '{"text": "x", "n": ' + "1" * 5_000 + "}", "line 1: not JSON (Exceeds"),
        ("x.jsonl", '{"text": ' + "[" * 100_000 + "}", "line 1: not JSON"),
        ("x.jsonl", '[{"text": "x"}]', "line 1: expected a JSON object, one to a line"),
        ("x.jsonl", '{"input_ids": [1, 1' + "0" * 30 + "]}", "expected token ids from 0, got 10"),
        ("x.jsonl", '{"text": "\\ud800"}', "line 1: 'text' holds a lone surrogate"),
        ("x.json", '[{"text": "x"}, 3]', "row 1: expected a JSON object"),
        ("x.json", '[{"text": "x"}', "x.json: not JSON"),
        ("x.json", '{"text": "x"}\n3', "line 2: expected a JSON object"),
        ("x.parquet", "no parquet", "not a readable parquet file"),
        ("x.csv", "text\nx\n", "expected a file ending in .txt, .jsonl, .json or .parquet"),
    ],
)
def test_files_that_are_refused(refused, write, name, content, expected):
    path = write(name, content)
    line = refused(load_text, str(path), "all")
    assert name in line
    assert expected in line


def test_parquet_without_strings_is_refused(refused, tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": [["a"], ["b"]]}), path)
    assert "expected strings in column 'text' (or chats, or token ids), found list" in refused(
        load_text, str(path), "all"
    )
    pq.write_table(pa.table({"a": ["x"], "b": ["y"], "n": [1]}), path)
    assert "no column 'text'; it has a, b, n" in refused(load_text, str(path), "all")


@pytest.mark.parametrize(
    "name",
    [
        "./none.txt",
        "/none/at/all",
        "~/none.jsonl",
        "a/none.parquet",
        "none.txt",
        "a/b/c",
        "~nobody-here/x.txt",
        "x" * 300 + ".txt",
    ],
)
def test_a_path_that_is_not_there(refused, name):
    assert looks_local(name)
    for call in (lambda: load_text(name, "test"), lambda: check_dataset(name)):
        assert refused(call).startswith(f"{name}: no such file")


@pytest.mark.parametrize("name", ["wikitext", "someone/data", "data:config", "a/b:c/d"])
def test_hub_names_are_no_paths(name):
    assert not looks_local(name)


def test_unknown_splits(refused, write, tmp_path):
    path = str(write("validation.txt", "a\fb"))
    assert "split 'train': expected one of calibration" in refused(load_text, path, "train")
    assert "split 'train': expected one of" in refused(load_text, str(tmp_path), "train")
    assert "a folder has no split 'all'" in refused(load_text, str(tmp_path), "all")
    assert "split 'all': dataset 'demo' has calibration" in refused(load_text, "demo", "all")


def test_two_files_for_one_split(refused, write, tmp_path):
    write("test.txt", "a\fb")
    write("test.jsonl", '{"text": "a"}')
    assert "test.txt and test.jsonl are both there" in refused(load_text, str(tmp_path), "test")


def test_a_file_too_small_for_a_split(refused, write):
    path = write("x.jsonl", '{"text": "m"}\n')  # falls to calibration, see above
    line = refused(load_text, str(path), "test")
    assert "none of its 1 documents falls to split 'test'" in line
    assert len(load_text(str(path), "calibration").documents) == 1
