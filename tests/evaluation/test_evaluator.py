"""The evaluator: quality and speed of policies on a tiny model."""

from __future__ import annotations

import math

import numpy as np
import pytest

from var_moe.data.documents import EncodedDocument
from var_moe.evaluation.evaluator import Evaluator, measure_by_dataset
from var_moe.evaluation.speed_setting import SpeedSetting
from var_moe.models.loading import LoadedModel
from var_moe.routing.simple import FixedKPolicy, NativePolicy, TopPPolicy


@pytest.fixture(scope="module")
def loaded(make_tiny_mixtral, tiny_tokenizer):
    return LoadedModel.of(make_tiny_mixtral(), tiny_tokenizer, name="tiny")


@pytest.fixture(scope="module")
def evaluator(loaded):
    """Of a text of two data sets."""
    rng = np.random.default_rng(4)
    text = [
        EncodedDocument(str(i), "s", rng.integers(1, 300, 12 + i % 9), "ab"[i % 3 == 0])
        for i in range(24)
    ]
    return Evaluator(loaded, text, setting=SpeedSetting(batch_size=2, sequence=32, forwards=1))


def test_caches_are_emptied_before_each_block(evaluator):
    resets = []

    class Counting(NativePolicy):
        def reset(self):
            resets.append(1)

    evaluator.speed(Counting(), blocks=3, factors=False)
    assert len(resets) >= 5  # the warm-up's batches as well


def test_keep_all_changes_nothing_and_half_is_counted(evaluator):
    kept = evaluator.quality(NativePolicy())
    assert abs(kept.change.value) < 1e-6
    assert kept.report.experts_per_token == 2.0
    half = evaluator.quality(FixedKPolicy(1))
    assert half.report.experts_per_token == 1.0
    assert half.change.value != 0
    speed = evaluator.speed(FixedKPolicy(1), blocks=2)
    assert speed.backend_factor is not None
    assert speed.skipping_factor is not None


def test_prediction_is_linear_in_time(evaluator):
    at = [1 / evaluator.predicted_speedup(e) for e in (1.0, 1.5, 2.0)]
    assert at[1] == pytest.approx((at[0] + at[2]) / 2)


def test_the_recorded_backend_is_the_fastest_measured(evaluator):
    speeds = evaluator.backend_throughputs
    assert evaluator.baseline_backend == max(speeds, key=speeds.get)
    assert set(speeds) >= {"eager", "grouped_mm"}


def test_each_data_set_shows_what_it_would_alone(evaluator):
    rows = measure_by_dataset(evaluator, FixedKPolicy(1))
    assert [row["dataset"] for row in rows] == ["b", "a"]
    for row in rows:
        own = [d for d in evaluator.documents if d.dataset == row["dataset"]]
        alone = evaluator.with_documents(own).quality(FixedKPolicy(1))
        assert row["degradation"] == pytest.approx(alone.change.value, rel=1e-5)
        assert row["experts_per_token"] == 1.0
        assert row["documents"] == len(own)
    whole = evaluator.quality(FixedKPolicy(1)).change
    assert sum(row["scored_tokens"] for row in rows) == whole.tokens
    by_hand = sum(math.log1p(row["degradation"]) * row["scored_tokens"] for row in rows)
    assert math.expm1(by_hand / whole.tokens) == pytest.approx(whole.value, rel=1e-5)


def test_experts_per_token_are_the_data_sets_own(evaluator):
    rows = measure_by_dataset(evaluator, TopPPolicy(0.6))
    whole = evaluator.quality(TopPPolicy(0.6)).report
    executed = {row["dataset"]: row["experts_per_token"] for row in rows}
    total = sum(executed[d.dataset] * len(d.ids) for d in evaluator.documents)
    assert total / whole.tokens == pytest.approx(whole.experts_per_token)
    assert executed["a"] != executed["b"]


def test_the_worst_is_judged_where_that_is_asked_for(evaluator):
    plain = evaluator.quality(FixedKPolicy(1))
    assert plain.worst is None
    assert plain.judged == plain.change
    robust = evaluator.with_documents(evaluator.documents)
    robust.robust = True
    found = robust.quality(FixedKPolicy(1))
    assert found.change.value == pytest.approx(plain.change.value)
    assert found.judged is found.worst.change
    uppers = {
        row["dataset"]: row["degradation_upper_95"]
        for row in measure_by_dataset(robust, FixedKPolicy(1))
    }
    assert found.worst.dataset == max(uppers, key=uppers.get)
    assert found.judged.upper == pytest.approx(max(uppers.values()), rel=1e-5)
    assert found.to_dict()["worst_degradation_upper_95"] == found.judged.upper
