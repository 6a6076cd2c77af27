"""Text as documents: demo names, local files, hash splits, the Hub's absence."""

from __future__ import annotations

import json
import time

import pandas as pd
import pytest

from var_moe import hub
from var_moe.data.documents import SPLITS, require_documents, share_of
from var_moe.data.encoding import encode
from var_moe.data.readers import articles, read_file
from var_moe.data.text import load_text
from var_moe.errors import UsageError


def test_hash_split_is_the_same_everywhere():
    # int(sha256("a")[:8 bytes], big endian) / 2^64 = 0.7913...: after 0.40 and 0.25 -> certify
    assert share_of("a", SPLITS) == "certify"
    assert [share_of(word, SPLITS) for word in ("b", "c", "d", "e")] == [
        "calibration",
        "calibration",
        "calibration",
        "calibration",
    ]
    names = [share_of(f"document {i}", SPLITS) for i in range(20_000)]
    shares = {name: names.count(name) / 20_000 for name in SPLITS}
    assert shares == pytest.approx(
        {"calibration": 0.4, "validation": 0.25, "certify": 0.15, "test": 0.2}, abs=0.015
    )


def test_a_single_file_is_split_without_overlap(tmp_path):
    path = tmp_path / "x.jsonl"
    texts = [f"document {i}" for i in range(200)]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    parts = {name: load_text(str(path), name) for name in SPLITS}
    together = [d.text for part in parts.values() for d in part.documents]
    assert sorted(together) == sorted(texts)
    assert len(load_text(str(path), "all").documents) == 200
    assert all(part.independent for part in parts.values())


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


def test_parquet_takes_the_only_column_of_running_text(tmp_path, tiny_texts):
    pd.DataFrame({"n": [1, 2], "body": tiny_texts[:2]}).to_parquet(tmp_path / "x.parquet")
    documents, _ = read_file(tmp_path / "x.parquet")
    assert [d.text for d in documents] == tiny_texts[:2]


def test_no_text_column_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": "x", "b": "y"}\n')
    with pytest.raises(UsageError, match=r"no column .text.; it has a, b"):
        read_file(tmp_path / "x.jsonl")
    (tmp_path / "y.jsonl").write_text('{"text": "x"}\n{"text": 3}\n')
    with pytest.raises(UsageError, match="line 2: expected a string"):
        read_file(tmp_path / "y.jsonl")
    (tmp_path / "z.jsonl").write_text('{"text": "x"}\nnot json\n')
    with pytest.raises(UsageError, match="line 2: not JSON"):
        read_file(tmp_path / "z.jsonl")


def test_a_folder_names_its_splits(tmp_path):
    (tmp_path / "validation.txt").write_text("a\fb")
    assert len(load_text(str(tmp_path), "validation").documents) == 2
    with pytest.raises(
        UsageError, match=r"expected one of test\.txt, test\.jsonl, test\.json, test\.parquet"
    ):
        load_text(str(tmp_path), "test")


def test_a_path_is_as_good_as_its_name(tiny_text_folder):
    assert load_text(tiny_text_folder, "test") == load_text(str(tiny_text_folder), "test")


def test_missing_file():
    with pytest.raises(UsageError, match="no such file"):
        load_text("./none.txt", "test")


def test_the_real_hub_is_out_of_reach_in_one_quick_line(monkeypatch):
    """Tests run offline: the probe itself decides, within five seconds."""
    hub.reachable.cache_clear()
    start = time.perf_counter()
    with pytest.raises(UsageError, match="does not answer"):
        load_text("wikitext", "test")
    assert time.perf_counter() - start < 5


def test_wikitext_articles():
    lines = ["", " = One = \n", " text \n", " = = Part = = \n", " more \n", " = Two = \n", " x \n"]
    assert [a.strip()[:9] for a in articles(lines) if a.strip()] == ["= One = \n", "= Two = \n"]


def test_encode_adds_the_start_token(tiny_tokenizer, tmp_path):
    (tmp_path / "x.txt").write_text("the router\fan expert")
    encoded = encode(load_text(str(tmp_path / "x.txt"), "all"), tiny_tokenizer)
    assert [d.ids[0] for d in encoded] == [0, 0]
    assert tiny_tokenizer.decode(encoded[1].ids[1:]) == "an expert"


def test_require_documents():
    require_documents([1, 2], 2, "x")
    with pytest.raises(UsageError, match="too few documents for x: 1, at least 2 needed"):
        require_documents([1], 2, "x")


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


def test_unknown_demo_name():
    with pytest.raises(UsageError, match="demo-postgres, demo-python, demo-wordnet, demo-kjv"):
        load_text("demo-latin", "test")
