"""Timing: the order of blocks, ratios by hand, and what counts as a usable backend."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from var_moe.data.documents import EncodedDocument
from var_moe.evaluation import throughput
from var_moe.evaluation.evaluator import Evaluator, SpeedSetting
from var_moe.evaluation.throughput import Timings, backend_arm, time_arms, usable_backends
from var_moe.models.loading import LoadedModel
from var_moe.routing.fixed_k import FixedKPolicy
from var_moe.routing.native import NativePolicy


@pytest.fixture(scope="module")
def evaluator(make_tiny_mixtral, tiny_tokenizer):
    loaded = LoadedModel.of(make_tiny_mixtral(), tiny_tokenizer, name="tiny")
    rng = np.random.default_rng(0)
    documents = [EncodedDocument(str(i), "s", rng.integers(1, 300, 40)) for i in range(12)]
    setting = SpeedSetting(batch_size=2, sequence=64, forwards=1)
    return Evaluator(loaded, documents, setting=setting)


def test_ratio_by_hand():
    timings = Timings(
        seconds={"slow": np.array([2.0, 4.0, 6.0]), "fast": np.array([1.0, 1.0, 4.0])}, tokens=100
    )
    ratio = timings.ratio("slow", "fast")
    assert ratio.median == 2.0  # block ratios 2, 4, 1.5: a drift that hits both cancels
    assert ratio.low == 1.5
    assert ratio.high == 4.0
    assert timings.throughput("slow") == 25.0


def test_blocks_alternate_and_the_warm_up_is_not_timed(make_tiny_mixtral):
    model, order = make_tiny_mixtral(layers=1), []

    def arm(name):
        @contextmanager
        def run():
            order.append(name)
            yield None

        return run

    batch = torch.zeros((1, 4), dtype=torch.int64)
    timings = time_arms(model, {"a": arm("a"), "b": arm("b")}, [batch], blocks=3)
    assert "".join(order) == "ba" + "ab" + "ba" + "ab"
    assert [len(v) for v in timings.seconds.values()] == [3, 3]


def test_caches_are_emptied_before_each_block(evaluator):
    resets = []

    class Counting(NativePolicy):
        def reset(self):
            resets.append(1)

    evaluator.speed(Counting(), blocks=3, factors=False)
    assert len(resets) == 4  # the warm-up's block as well


def test_backend_arm_restores(evaluator):
    model = evaluator.model
    before = model.get_experts_implementation()
    with backend_arm(model, "eager")():
        assert model.get_experts_implementation() == {"": "eager"}
    assert model.get_experts_implementation() == before


def test_batched_mm_is_left_out_where_it_would_copy_too_much(evaluator, monkeypatch):
    assert "batched_mm" in usable_backends(evaluator.model, 128, 2)
    monkeypatch.setattr(throughput, "_GATHER_LIMIT_BYTES", 1000)
    assert usable_backends(evaluator.model, 128, 2) == ["eager", "grouped_mm"]


def test_keep_all_changes_nothing_and_half_is_counted(evaluator):
    kept = evaluator.quality(NativePolicy())
    assert abs(kept.change.value) < 1e-6
    assert kept.report.experts_per_token == 2.0
    half = evaluator.quality(FixedKPolicy(1))
    assert half.report.experts_per_token == 1.0
    assert half.change.value != 0
    speed = evaluator.speed(FixedKPolicy(1), blocks=2)
    assert speed.experts_per_token == 1.0
    assert speed.backend_factor is not None
    assert speed.skipping_factor is not None


def test_prediction_is_linear_in_time(evaluator):
    at = [1 / evaluator.predicted_speedup(e) for e in (1.0, 1.5, 2.0)]
    assert at[1] == pytest.approx((at[0] + at[2]) / 2)


def test_the_recorded_backend_is_the_fastest_measured(evaluator):
    speeds = evaluator.backend_throughputs
    assert evaluator.baseline_backend == max(speeds, key=speeds.get)
    assert set(speeds) >= {"eager", "grouped_mm"}
