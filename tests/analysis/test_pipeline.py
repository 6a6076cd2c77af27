"""The whole analysis on a tiny random model, and the documented import path."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from var_moe.analysis.pipeline import AnalysisSettings
from var_moe.errors import UsageError
from var_moe.evaluation.speed_setting import SpeedSetting

SMALL = AnalysisSettings(
    blocks=1, rounds=1, scaling_blocks=1, cost_blocks=1, sequences=(16, 32), batch_sizes=(1,)
)


@pytest.fixture(scope="module")
def report(make_tiny_mixtral, tiny_tokenizer, tiny_texts, tmp_path_factory):
    from profiling import profile_full_pipeline

    folder = tmp_path_factory.mktemp("analysis")
    found = profile_full_pipeline(
        make_tiny_mixtral(),
        tiny_tokenizer,
        tiny_texts,
        settings=SMALL,
        setting=SpeedSetting(batch_size=2, sequence=32, forwards=1),
        output=folder,
    )
    return found, folder


@pytest.mark.slow
def test_the_documented_keys(report):
    found, folder = report
    systems = json.loads((folder / "systems_analysis.json").read_text())
    assert systems == {key: value for key, value in found.items() if key != "profile"}
    assert systems.keys() >= {
        *("baseline", "var", "scaling", "roofline", "bottlenecks", "comparison"),
        *("schema_version", "provenance"),
    }
    for arm in ("baseline", "var"):
        assert systems[arm].keys() >= {"avg_time_ms", "throughput_tps", "memory"}
        assert systems[arm]["memory"]["peak_bytes"] > 0
    assert systems["var"]["var_stats"].keys() >= {"learned_pct", "experts_per_token"}
    assert systems["comparison"].keys() >= {
        *("actual_speedup", "predicted_speedup", "prediction_error_pct"),
    }
    for row in systems["bottlenecks"]:
        assert row.keys() == {"name", "severity", "evidence", "recommendation"}


@pytest.mark.slow
def test_figures_belong_together(report):
    found, _ = report
    for arm in ("baseline", "var"):
        one = found[arm]
        assert one["avg_time_ms"] * one["throughput_tps"] == pytest.approx(1000 * 2 * 32)
    comparison = found["comparison"]
    assert comparison["prediction_error_pct"] == pytest.approx(
        100 * abs(comparison["predicted_speedup"] / comparison["actual_speedup"] - 1)
    )
    assert [(r["varied"], r["batch_size"], r["sequence"]) for r in found["scaling"]] == [
        ("sequence", 2, 16),
        ("sequence", 2, 32),
        ("batch_size", 1, 32),
    ]


@pytest.mark.slow
def test_component_timings(report):
    found, folder = report
    saved = json.loads((folder / "profile_report.json").read_text())
    assert saved == found["profile"]
    assert set(saved["var"]["layers"]["experts"]) == {"0", "1", "2"}
    shares = [row["share"] for row in saved["var"]["components"].values()]
    assert sum(shares) == pytest.approx(1)


def test_settings_that_are_none():
    with pytest.raises(UsageError, match=r"AnalysisSettings.blocks = 0"):
        AnalysisSettings(blocks=0)
    with pytest.raises(UsageError, match=r"AnalysisSettings.sequences = 0"):
        AnalysisSettings(sequences=(8, 0))


@pytest.mark.slow
def test_the_documented_path_is_light_and_complete():
    code = (
        "import sys, profiling\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
        "from profiling import GPUProfiler, PerformanceModel, profile_full_pipeline\n"
        "print(GPUProfiler.__module__)\n"
        "from profiling import missing\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.splitlines() == ["[]", "var_moe.analysis.profiler"], done.stderr
    assert "cannot import name 'missing'" in done.stderr
