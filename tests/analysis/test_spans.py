"""The profiler: nesting, own times and statistics, on a clock that tests turn by hand."""

from __future__ import annotations

import json

import pytest

from var_moe.analysis.clocks import CPUClock, PeakMemory
from var_moe.analysis.spans import GPUProfiler, summary
from var_moe.errors import UsageError


class HandClock:
    """Seconds stand still until they are set."""

    now = 0.0
    waits = 0

    def mark(self):
        return self.now

    def wait(self):
        self.waits += 1

    def milliseconds(self, start, end):
        return 1000 * (end - start)


@pytest.fixture
def profiler():
    made = GPUProfiler("cpu")
    made._clock = HandClock()
    return made


def fill(profiler):
    clock = profiler._clock
    for inner in (1.0, 3.0):
        with profiler.profile("outer"):
            clock.now += 0.5
            with profiler.profile("inner"):
                clock.now += inner
            clock.now += 0.25


def test_nested_stretches_have_their_own_names_and_times(profiler):
    fill(profiler)
    assert profiler.runs() == {"outer": [1750.0, 3750.0], "outer/inner": [1000.0, 3000.0]}
    assert profiler.runs(own=True) == {"outer": [750.0, 750.0], "outer/inner": [1000.0, 3000.0]}


def test_the_device_is_waited_for_once_a_report_is_asked_for(profiler):
    fill(profiler)
    assert profiler._clock.waits == 0
    profiler.get_report()
    assert profiler._clock.waits == 1


def test_the_report_by_hand(profiler, tmp_path):
    fill(profiler)
    row = profiler.get_report()["sections"]["outer/inner"]
    assert row["count"] == 2
    assert row["total_ms"] == 4000
    assert row["mean_ms"] == row["p50_ms"] == 2000
    assert row["std_ms"] == pytest.approx(2**0.5 * 1000)
    assert row["p99_ms"] == pytest.approx(2980)
    assert row["peak_memory_bytes"] > 0
    profiler.save_report(tmp_path / "profile.json")
    saved = json.loads((tmp_path / "profile.json").read_text())
    assert saved["sections"]["outer/inner"] == row
    assert saved["schema_version"] == 1
    assert "versions" in saved["provenance"]


def test_a_stretch_ends_after_an_exception_too(profiler):
    with pytest.raises(ZeroDivisionError), profiler.profile("fails"):
        raise ZeroDivisionError
    with profiler.profile("next"):
        pass
    assert set(profiler.runs()) == {"fails", "next"}


def test_bad_use_is_said(profiler):
    with pytest.raises(UsageError, match="'a/b': expected some text without '/'"):
        profiler.profile("a/b").__enter__()
    with profiler.profile("a"), pytest.raises(UsageError, match="inside 'a': leave it first"):
        profiler.reset()
    profiler.reset()
    assert profiler.get_report()["sections"] == {}


def test_print_summary(profiler, capsys):
    fill(profiler)
    profiler.print_summary()
    assert "inner" in capsys.readouterr().out


def test_one_value_has_no_spread():
    assert summary([2.0])["std_ms"] == 0


def test_cpu_marks_are_in_order():
    clock = CPUClock()
    start = clock.mark()
    assert clock.milliseconds(start, clock.mark()) >= 0


def test_peak_memory_sees_what_was_held_and_forgets_it():
    import torch

    memory = PeakMemory(torch.device("cpu"))
    before = memory.bytes()
    held = torch.ones(2**26, dtype=torch.uint8)
    assert memory.bytes() >= before
    if memory.kind == "resident":
        assert memory.bytes() > before + 2**25
        del held
        memory.restart()
        assert memory.bytes() < before + 2**25
