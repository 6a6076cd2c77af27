"""Which column is the text: of .jsonl, .parquet, the Hub and a data set in memory alike."""

from __future__ import annotations

import copy
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from var_moe.data.encoding import as_documents, encode
from var_moe.data.text import load_text
from var_moe.errors import UsageError

PROSE = ["the router sends a token to an expert", "an index over the values of a table"]
ASKED = [
    [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}] for text in PROSE
]
SHARED = [[{"from": "human", "value": text}, {"from": "gpt", "value": "yes"}] for text in PROSE]
LABELS = ["identity_0", "identity_1"]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
IDS = [[5, 6, 7], [8, 9]]


@pytest.fixture(params=["jsonl", "parquet", "hub", "given"])
def table(request, tmp_path, monkeypatch):
    """Encode the text of columns, as each of the ways in does."""

    def run(tokenizer, column=None, **columns):
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        if request.param == "given":
            if column is not None:
                pytest.skip("select_columns names it there")
            return as_documents(datasets.Dataset.from_dict(columns), tokenizer)
        name = f"{tmp_path}/x.{request.param}"
        if request.param == "jsonl":
            (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif request.param == "parquet":
            pq.write_table(pa.table(columns), name)
        else:
            name, parts = "someone/data", {"train": datasets.Dataset.from_dict(columns)}
            monkeypatch.setattr("var_moe.hub.reachable", lambda: True)
            monkeypatch.setattr(datasets, "load_dataset", lambda repo, config: parts)
        text = load_text(name, "all", text_column=column)
        assert text.dataset == (f"{name}::{column}" if column else name)
        return encode(text, tokenizer)

    return run


@pytest.fixture
def chatty(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def texts(found, tokenizer):
    return [tokenizer.decode(document.ids) for document in found]


@pytest.mark.parametrize(
    "columns",
    [
        {"id": LABELS, "conversations": SHARED},
        {"messages": ASKED, "prompt": PROSE},
        {"chosen": ASKED},
    ],
)
def test_chats_are_rendered_and_without_a_template_refused(table, chatty, tiny_tokenizer, columns):
    wanted = [f"user: {text}\nassistant: yes\n" for text in PROSE]
    assert texts(table(chatty, **columns), chatty) == wanted  # and no start token of ours
    with pytest.raises(UsageError) as caught:
        table(tiny_tokenizer, **columns)
    assert "holds chats, and the tokenizer has no chat template" in str(caught.value)
    assert all(name in str(caught.value) for name in columns)


def test_token_ids_are_taken_as_they_are(table, tiny_tokenizer):
    found = table(tiny_tokenizer, meta=["shard-0", "shard-1"], input_ids=IDS)
    assert [d.ids.tolist() for d in found] == IDS
    masked = table(
        tiny_tokenizer, input_ids=[[5, 6, 7], [8, 9, 0]], attention_mask=[[1] * 3, [1, 1, 0]]
    )
    assert [d.ids.tolist() for d in masked] == IDS
    with pytest.raises(UsageError, match="expected token ids from 0, got -100"):
        table(tiny_tokenizer, meta=["shard-0", "shard-1"], input_ids=[[5, 6], [-100, 3]])


@pytest.mark.parametrize(
    "columns",
    [
        {"id": LABELS, "body": PROSE},
        {"date": ["2024-01-01 10:00:00", "2024-01-02 11:00:00"], "ids": IDS},
        {"question": PROSE, "answer": PROSE[::-1]},
        {"chosen": ASKED, "rejected": ASKED},
    ],
)
def test_what_is_not_clearly_the_text_is_refused_with_the_names(table, chatty, columns):
    with pytest.raises(UsageError, match="no column 'text'; it has " + ", ".join(columns)):
        table(chatty, **columns)


def test_the_only_column(table, tiny_tokenizer):
    found = table(tiny_tokenizer, body=PROSE)
    assert [text.removeprefix("<|endoftext|>") for text in texts(found, tiny_tokenizer)] == PROSE


def test_the_column_that_is_named(table, chatty):
    columns = {"text": PROSE, "messages": ASKED, "ids": IDS}
    assert len(table(chatty, **columns)) == 2
    assert texts(table(chatty, "messages", **columns), chatty)[0].startswith("user: ")
    assert [d.ids.tolist() for d in table(chatty, "ids", **columns)] == IDS
    with pytest.raises(UsageError, match="no column 'body'; it has text, messages, ids"):
        table(chatty, "body", **columns)


def test_one_row_of_another_kind_is_named(table, chatty):
    odd = [[{"from": "human", "value": "x y"}], [{"from": "narrator", "value": "z"}]]
    with pytest.raises(UsageError, match=r"1|2: a message from 'narrator'; expected one of human"):
        table(chatty, conversations=odd)


def test_a_message_without_content_is_not_rendered_as_none(table, chatty):
    chats = [[{"role": "user", "content": "x y"}], [{"role": "assistant", "content": None}]]
    with pytest.raises(UsageError, match="a message of 'assistant' is NoneType; expected text"):
        table(chatty, messages=chats)


def test_a_content_in_parts_is_refused(table, chatty):
    """A template for text alone would print the list."""
    parts = [{"type": "text", "text": text} for text in PROSE]
    with pytest.raises(UsageError, match="of 'user' is list; expected text alone"):
        table(chatty, messages=[[{"role": "user", "content": parts}]] * 2)


def test_a_template_that_refuses(table, chatty):
    chatty.chat_template = "{{ raise_exception('roles must\nalternate') }}"
    with pytest.raises(UsageError, match=r"does not take it \(roles must alternate\)"):
        table(chatty, messages=ASKED)


def test_the_column_is_part_of_the_name(tmp_path):
    rows = "".join(json.dumps({"text": "x", "body": text}) + "\n" for text in PROSE)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(rows.replace("the", name))
    one, other = (str(tmp_path / name) for name in ("a.jsonl", "b.jsonl"))
    both = load_text(f"{one}::body,{other}", "all")
    assert {d.text for d in both.documents if d.dataset == other} == {"x"}
    assert "column 'body'" in both.parts[0].note
    named = load_text(f"{one},{other}", "all", text_column="body")
    assert named.dataset == f"{one}::body,{other}::body"
    (tmp_path / "c.txt").write_text("x")
    for dataset, column, expected in (
        (f"{one}::body", "body", "it names a column already"),
        (one, "a,b", "expected a name without ','"),
        ("demo", "body", "dataset 'demo' has no columns"),
        (str(tmp_path / "c.txt"), "body", "a .txt file has no columns"),
        (f"{one}::", None, "expected a name before and a column after"),
    ):
        with pytest.raises(UsageError, match=expected):
            load_text(dataset, "calibration", text_column=column)
