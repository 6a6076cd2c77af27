"""Timing: the order of blocks, ratios by hand, and what counts as a usable backend."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from var_moe.evaluation import throughput
from var_moe.evaluation.throughput import Timings, backend_arm, time_arms, usable_backends


@pytest.fixture(scope="module")
def model(make_tiny_mixtral):
    return make_tiny_mixtral(layers=1)


def test_ratio_by_hand():
    timings = Timings(
        seconds={"slow": np.array([2.0, 4.0, 6.0]), "fast": np.array([1.0, 1.0, 4.0])}, tokens=100
    )
    ratio = timings.ratio("slow", "fast")
    assert ratio.median == 2.0  # block ratios 2, 4, 1.5: a drift that hits both cancels
    assert ratio.low == 1.5
    assert ratio.high == 4.0
    assert timings.throughput("slow") == 25.0


def test_blocks_alternate_and_the_warm_up_is_not_timed(model):
    order = []

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


def test_backend_arm_restores(model):
    before = model.get_experts_implementation()
    with backend_arm(model, "eager")():
        assert model.get_experts_implementation() == {"": "eager"}
    assert model.get_experts_implementation() == before


def test_batched_mm_is_left_out_where_it_would_copy_too_much(model, monkeypatch):
    assert "batched_mm" in usable_backends(model.model, 128, 2)
    monkeypatch.setattr(throughput, "_GATHER_LIMIT_BYTES", 1000)
    assert usable_backends(model.model, 128, 2) == ["eager", "grouped_mm"]
