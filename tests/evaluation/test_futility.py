"""Scoring that ends where a policy is clearly over the bound; and the order that allows it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from var_moe.data.documents import EncodedDocument
from var_moe.evaluation.batching import batches
from var_moe.evaluation.evaluator import Evaluator, SpeedSetting
from var_moe.models.loading import LoadedModel
from var_moe.routing.fixed_k import FixedKPolicy
from var_moe.routing.native import NativePolicy


def documents(sizes):
    dice = np.random.default_rng(4)
    return [
        EncodedDocument(id=f"d{i}", source="s", ids=dice.integers(0, 300, size))
        for i, size in enumerate(sizes)
    ]


@pytest.fixture
def evaluator(make_tiny_mixtral, tiny_tokenizer):
    loaded = LoadedModel.of(make_tiny_mixtral(), tiny_tokenizer, name="tiny")
    found = Evaluator(
        loaded,
        documents([24, 31, 18] * 30),
        setting=SpeedSetting(batch_size=1, sequence=16),
        tokens_per_batch=150,
    )
    found.__dict__["_fastest"] = ("eager", {})
    return found


def test_a_policy_clearly_over_the_bound_is_not_scored_to_the_end(evaluator):
    # On a random model dropping experts changes much, in either direction: a bound far below.
    change = evaluator.quality(FixedKPolicy(1)).change
    bound = math.exp(math.log1p(change.value) - 40 * change.standard_error) - 1
    stopped = evaluator.quality(FixedKPolicy(1), futile_over=bound)
    assert not stopped.complete
    assert 15 <= stopped.change.documents < change.documents
    assert stopped.report.tokens < evaluator.quality(FixedKPolicy(1)).report.tokens


def test_others_are_scored_to_the_end_with_the_same_result(evaluator):
    whole = evaluator.quality(NativePolicy())
    asked = evaluator.quality(NativePolicy(), futile_over=0.01)
    assert asked.complete
    assert asked == whole


def test_batches_come_in_mixed_order_and_long_documents_in_one_piece():
    found = list(batches(documents([5, 60, 12, 33, 90, 7, 8, 41, 6]), 40, window=16))
    rows = [row.document for batch in found for row in batch]
    assert [number for number, _ in itertools.groupby(rows)] == list(dict.fromkeys(rows))
    assert sorted(set(rows)) == list(range(9))
    widths = [max(len(row.ids) for row in batch) for batch in found]
    assert widths != sorted(widths, reverse=True)
    again = batches(documents([5, 60, 12, 33, 90, 7, 8, 41, 6]), 40, window=16)
    assert [[row.document for row in batch] for batch in again] == [
        [row.document for row in batch] for batch in found
    ]
