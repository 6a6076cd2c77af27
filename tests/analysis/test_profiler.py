"""The profiler: nesting, names, statistics and memory."""

from __future__ import annotations

import json
import time

import pytest
import torch

from var_moe.analysis.profiler import GPUProfiler, PeakMemory, mark, recorded, summary
from var_moe.errors import UsageError

CPU = torch.device("cpu")


def fill(profiler):
    for _ in range(2):
        with profiler.profile("outer"):
            time.sleep(0.002)
            with profiler.profile("inner"):
                time.sleep(0.005)


def test_nested_stretches_have_their_own_names_and_times(capfd, tmp_path):
    profiler = GPUProfiler("cpu")
    fill(profiler)
    profiler.save_report(tmp_path / "profile.json")
    saved = json.loads((tmp_path / "profile.json").read_text())
    assert list(saved["sections"]) == ["outer", "outer/inner"]
    outer, inner = saved["sections"].values()
    assert outer["count"] == inner["count"] == 2
    assert inner["total_ms"] >= 10
    assert outer["total_ms"] >= inner["total_ms"] + 4
    assert inner["peak_memory_bytes"] > 0
    assert saved["schema_version"] == 1
    assert "versions" in saved["provenance"]
    profiler.print_summary()
    said = capfd.readouterr()
    assert "inner" in said.out
    assert said.err == ""  # torch's profiler would write a line for each run


def test_a_stretch_ends_after_an_exception_too():
    profiler = GPUProfiler("cpu")
    with pytest.raises(ZeroDivisionError), profiler.profile("fails"):
        raise ZeroDivisionError
    with profiler.profile("next"):
        pass
    assert set(profiler.get_report()["sections"]) == {"fails", "next"}


def test_bad_use_is_said():
    profiler = GPUProfiler("cpu")
    with pytest.raises(UsageError, match="'a/b': expected some text without '/'"):
        profiler.profile("a/b").__enter__()
    with profiler.profile("a"), pytest.raises(UsageError, match="inside 'a': leave it first"):
        profiler.reset()
    profiler.reset()
    assert profiler.get_report()["sections"] == {}


def test_operators_belong_to_the_stretch_that_ran_them():
    left = torch.ones(8, 8)
    with recorded(CPU) as spans, mark("outer"):
        torch.mm(left, left)
        with mark("inner"):
            left.relu()
    (outer,) = spans
    assert [one.name for one in outer.operators] == ["aten::mm"]
    (inner,) = outer.inner
    assert [one.name for one in inner.operators] == ["aten::relu"]
    assert outer.ms == pytest.approx(outer.own_ms + inner.ms)
    assert outer.start <= inner.start <= inner.end <= outer.end


def test_the_statistics_by_hand():
    row = summary([1000.0, 3000.0])
    assert (row["count"], row["total_ms"], row["mean_ms"], row["p50_ms"]) == (2, 4000, 2000, 2000)
    assert row["std_ms"] == pytest.approx(2**0.5 * 1000)
    assert row["p99_ms"] == pytest.approx(2980)
    assert summary([2.0])["std_ms"] == 0


def test_peak_memory_sees_what_was_held_and_forgets_it():
    memory = PeakMemory(CPU)
    before = memory.bytes()
    held = torch.ones(2**26, dtype=torch.uint8)
    assert memory.bytes() >= before
    if memory.kind == "resident":
        assert memory.bytes() > before + 2**25
        del held
        memory.restart()
        assert memory.bytes() < before + 2**25
