"""Token ids that the model has no embedding of, and texts with two start tokens."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from var_moe.data.encoding import as_documents, check_documents, check_ids
from var_moe.errors import UsageError
from var_moe.models.loading import LoadedModel
from var_moe.optimization.objective import create_objective_function
from var_moe.optimization.preparation import read_text


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
