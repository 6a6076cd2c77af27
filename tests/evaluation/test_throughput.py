"""Timing: the order of blocks, ratios by hand, and what counts as a usable backend."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from var_moe.data.documents import EncodedDocument
from var_moe.errors import UsageError
from var_moe.evaluation import throughput
from var_moe.evaluation.speed_setting import SpeedSetting
from var_moe.evaluation.throughput import (
    WARM_UP,
    Timings,
    backend_arm,
    time_arms,
    time_groups,
    usable_backends,
)


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
    warm_up = len(order) - 6
    assert 4 <= warm_up <= 2 * WARM_UP
    assert "".join(order[warm_up:]) == "ab" + "ba" + "ab"
    assert [len(v) for v in timings.seconds.values()] == [3, 3]


def test_the_warm_up_ends_when_it_is_steady(model, monkeypatch):
    """Forwards that take 8, 4, 2, 2 seconds, by a clock of our own."""
    now, ran = [0.0], []
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])

    def run(_model, ids):
        ran.append(int(ids[0, 0]))
        now[0] += max(2.0, 8.0 / 2 ** (len(ran) - 1))

    batches = [torch.full((1, 4), number) for number in range(6)]
    arms = {"a": nullcontext}
    timings = time_arms(model, arms, batches, blocks=3, forwards=2, run=run)
    # Then each block has batches of its own.
    assert ran == [5, 4, 3, 2, 0, 1, 2, 3, 4, 5]
    assert timings.seconds["a"].tolist() == [4.0, 4.0, 4.0]
    assert timings.tokens == 8


def test_what_never_gets_steady_is_timed_nevertheless(model, monkeypatch):
    now, ran = [0.0], []
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])

    def run(_model, _ids):
        ran.append(0)
        now[0] += 2.0 ** -len(ran)

    time_arms(model, {"a": nullcontext}, [torch.zeros((1, 4))], blocks=1, run=run)
    assert len(ran) == WARM_UP + 1


def test_generating_counts_new_tokens(model):
    group = SpeedSetting(objective="decode", batch_size=2, sequence=4, forwards=1, new_tokens=3)
    text = [EncodedDocument(id="a", source="s", ids=np.arange(8, 60))]
    timed = group.group(text, {"own": nullcontext}, blocks=2)
    asked = []
    monkeyed = replace(timed, run=lambda m, ids: asked.append(ids) or timed.run(m, ids))
    (timings,) = time_groups(model, [monkeyed], blocks=2)
    assert timings.tokens == 6
    assert {tuple(ids.shape) for ids in asked} == {(2, 4)}
    assert not torch.equal(asked[-1], asked[-2])


@pytest.mark.parametrize(
    ("values", "expected"),
    [({"objective": "train"}, "objective 'train'"), ({"batch_size": 0}, "batch_size")],
)
def test_settings_are_checked(values, expected):
    with pytest.raises(UsageError, match=expected):
        SpeedSetting(**values)


def test_a_setting_is_read_back():
    for setting in (SpeedSetting(), SpeedSetting.of("decode", 16)):
        assert SpeedSetting.from_dict(setting.to_dict()) == setting
    assert SpeedSetting.of("decode", 16).described == "after 16 prompt(s) at once"
    assert SpeedSetting.of("prefill", 4).described == f"4 x {SpeedSetting().sequence} tokens"


def test_backend_arm_restores(model):
    before = model.get_experts_implementation()
    with backend_arm(model, "eager")():
        assert model.get_experts_implementation() == {"": "eager"}
    assert model.get_experts_implementation() == before


def test_batched_mm_is_left_out_where_it_would_copy_too_much(model, monkeypatch):
    assert "batched_mm" in usable_backends(model.model, 128, 2)
    monkeypatch.setattr(throughput, "_GATHER_LIMIT_BYTES", 1000)
    assert usable_backends(model.model, 128, 2) == ["eager", "grouped_mm"]
