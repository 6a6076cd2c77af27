"""Token ids: of documents, of what the documented API takes, and those that a model refuses."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from var_moe.data.documents import TextDocument
from var_moe.data.encoding import as_documents, check_documents, check_ids, encode
from var_moe.errors import UsageError
from var_moe.models.loading import LoadedModel
from var_moe.optimization.objective import create_objective_function
from var_moe.optimization.preparation import read_text


@pytest.fixture
def documents(tiny_texts):
    return [TextDocument(f"d{i}", "s", text) for i, text in enumerate(tiny_texts)]


def ids_of(found):
    return [document.ids.tolist() for document in found]


def test_encode_is_what_the_tokenizer_does_to_each_text(documents, tiny_tokenizer):
    found = encode(documents, tiny_tokenizer)
    assert ids_of(found) == [tiny_tokenizer(d.text)["input_ids"] for d in documents]
    assert [(d.id, d.source) for d in found] == [(d.id, d.source) for d in documents]
    assert all(d.ids.dtype == np.int64 for d in found)
    assert encode([], tiny_tokenizer) == []


def test_encode_drops_short_documents(documents, tiny_tokenizer):
    short = [TextDocument("empty", "s", ""), *documents[:3]]  # the start token alone
    assert [d.id for d in encode(short, tiny_tokenizer)] == ["d0", "d1", "d2"]


# -- as_documents ----------------------------------------------------------------------------


IDS = [[1, 2, 3], [4, 5, 6]]


class Rows(list):
    """As much of a datasets.Dataset as is used."""

    def __init__(self, columns, kinds):
        super().__init__(
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        )
        self.column_names = list(columns)
        self.features = {name: type("F", (), {"dtype": kinds[name]})() for name in columns}

    def select_columns(self, names):
        return [{name: row[name] for name in names} for row in self]


def test_texts_and_a_column_of_texts_are_the_same(tiny_texts, tiny_tokenizer):
    given = ["", *tiny_texts[:3], " "]
    found = as_documents(given, tiny_tokenizer)
    assert [d.id for d in found] == ["1", "2", "3"]
    expected = ids_of(found)
    assert ids_of(as_documents(np.array(given), tiny_tokenizer)) == expected
    rows = Rows({"n": list(range(5)), "text": given}, {"n": "int64", "text": "string"})
    assert ids_of(as_documents(rows, tiny_tokenizer)) == expected


def test_a_real_dataset(tiny_texts, tiny_tokenizer):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"n": [1, 2], "text": tiny_texts[:2]})
    expected = ids_of(as_documents(tiny_texts[:2], tiny_tokenizer))
    assert ids_of(as_documents(rows, tiny_tokenizer)) == expected
    assert ids_of(as_documents(rows.to_iterable_dataset(), tiny_tokenizer)) == expected
    tokens = datasets.Dataset.from_dict({"input_ids": expected})
    assert ids_of(as_documents(tokens.with_format("torch"), tiny_tokenizer)) == expected
    with pytest.raises(UsageError, match="expected one split of the data set, of train, test"):
        as_documents(datasets.DatasetDict(train=rows, test=rows), tiny_tokenizer)


@pytest.mark.parametrize(
    "data",
    [
        torch.tensor(IDS),
        torch.tensor(IDS, dtype=torch.int32),
        np.array(IDS),
        IDS,
        [torch.tensor(row) for row in IDS],
        [torch.tensor([row]) for row in IDS],
        (torch.tensor(IDS),),
        {"input_ids": torch.tensor(IDS)},
        {"input_ids": IDS},
        [{"input_ids": row} for row in IDS],
        [{"input_ids": torch.tensor([row])} for row in IDS],
        {
            "input_ids": torch.tensor([[1, 2, 3, 0], [0, 4, 5, 6]]),
            "attention_mask": torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]),
        },
        {"input_ids": [[1, 2, 3, 0], [4, 5, 6]], "attention_mask": [[1, 1, 1, 0], [1, 1, 1]]},
        [[7], *IDS, []],  # too short: dropped
        [*map(np.array, IDS), np.array([])],
    ],
)
def test_token_ids(data, tiny_tokenizer):
    found = as_documents(data, tiny_tokenizer)
    assert ids_of(found) == IDS
    assert all(d.ids.dtype == np.int64 for d in found)


def test_one_dimension_is_one_document(tiny_tokenizer):
    for data in (torch.tensor([1, 2, 3]), np.array([1, 2, 3]), [1, 2, 3]):
        assert ids_of(as_documents(data, tiny_tokenizer)) == [[1, 2, 3]]


def test_a_tokenizers_output(tiny_texts, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    padded = tokenizer(tiny_texts[:3], padding=True, return_tensors="pt")
    assert ids_of(as_documents(padded, tiny_tokenizer)) == ids_of(
        as_documents(tiny_texts[:3], tiny_tokenizer)
    )


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ([], "expected a non-empty list of texts"),
        ("a text", "expected a text or token ids, got str"),
        (None, "got NoneType"),
        (3, "got int"),
        (torch.tensor(3), "got int"),
        (torch.zeros(2, 3), "validation_data[0][0]: expected a text or token ids, got float"),
        (torch.tensor([[1, -100]]), "expected token ids from 0, got -100"),
        (["a text", 3], "validation_data[1]: expected a text, got int"),
        ([[1, 2], "a text"], "validation_data[1]: expected a text or token ids, got str"),
        ([[1, 2], [0.5]], "validation_data[1][0]: expected a text or token ids, got float"),
        ([[1, 0.5]], "validation_data[0]: expected token ids, got float64"),
        ([None], "validation_data[0]: expected a text or token ids, got NoneType"),
        ([{"labels": [1]}], "validation_data[0]: expected a text or token ids"),
        (["", " "], "none of its 2 documents has 2 tokens"),
        ([[1], [2]], "none of its 2 documents has 2 tokens"),
        (Rows({"a": ["x"], "b": ["y"]}, {"a": "string", "b": "string"}), "it has a, b"),
    ],
)
def test_what_is_no_validation_data(data, expected, tiny_tokenizer):
    with pytest.raises(UsageError) as caught:
        as_documents(data, tiny_tokenizer)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def model(make_tiny_mixtral):
    return make_tiny_mixtral()


@pytest.fixture
def added(tiny_tokenizer):
    """With a token more than the embedding has rows."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    return tokenizer


def test_a_token_beyond_the_embedding_is_refused_where_it_occurs(model, added, tiny_texts):
    assert check_documents(as_documents(tiny_texts, added), model, added, "x") == ""
    with pytest.raises(UsageError) as caught:
        check_documents(as_documents([f"<|im_start|>{tiny_texts[0]}"], added), model, added, "x")
    line = str(caught.value)
    assert line.startswith("x: token '<|im_start|>' has id 300, and the model's embedding has 300")
    assert "the tokenizer has 301 tokens" in line
    with pytest.raises(UsageError, match="there is a token id 999, and the model's embedding"):
        check_ids([5, 999], model, added, "x")
    check_ids([], model, added, "x")


def test_the_documented_objective_refuses_it_before_the_work(model, added, tiny_texts):
    texts = [*tiny_texts, f"<|im_start|>{tiny_texts[0]}"]
    with pytest.raises(UsageError, match=r"validation_data: token '<\|im_start\|>' has id 300"):
        create_objective_function(
            model=model,
            tokenizer=added,
            validation_data=texts,
            baseline_perplexity=None,
            baseline_throughput=None,
        )


def test_a_start_token_twice_is_noted_once(model, tiny_tokenizer, tiny_texts, tmp_path, caplog):
    texts = [("<|endoftext|>" if i < 3 else "") + text for i, text in enumerate(tiny_texts[:8])]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    text = read_text(str(path), "all", LoadedModel.of(model, tiny_tokenizer))
    note = "3 of 8 documents begin with the start token '<|endoftext|>' twice"
    assert note in str(text.to_dict()["note"])
    assert [note in record.getMessage() for record in caplog.records] == [True]
    assert np.array_equal(text.documents[0].ids[:2], [0, 0])  # and the tokens are as they were
