"""The tuners benchmark's summary from saved runs, without a model."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from var_moe.errors import UsageError
from var_moe.storage import atomic_write_json, read_json

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.tuners.setting import SETUP_FILE, run_file
from benchmarks.tuners.summary import write_summary

SECONDS = {
    "setup_s": 0.0,
    "evaluations_s": 50.0,
    "suggestions_s": 2.0,
    "choosing_s": 8.0,
    "total_s": 60.0,
}


def saved(folder: Path, method: str, seed: int, score: float, curve: list[float | None]) -> None:
    figures: dict[str, Any] = {
        "score": score,
        "speedup": score,
        "degradation": 0.004,
        "feasible": seed != 1,
        "feasible_point": True,
    }
    run = {
        "method": method,
        "seed": seed,
        "evaluations": len(curve),
        "passed_ordering": seed != 2,
        "ordering": figures,
        "test": figures,
        "seconds": SECONDS,
        "best_score": curve,
    }
    atomic_write_json(run_file(folder, method, seed), run)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    identity = {
        "documents": 10,
        "ordering_documents": 20,
        "test_documents": 30,
        "threads": 1,
        "tokens": {"search": 1000, "ordering": 2000, "test": 3000},
    }
    atomic_write_json(
        tmp_path / SETUP_FILE, {"identity": identity, "trace_s": 3.0, "cost_model_s": 9.0}
    )
    for seed in range(3):
        saved(tmp_path, "gp", seed, 1.2 + 0.01 * seed, [None, 1.1, 1.2 + 0.01 * seed])
        saved(tmp_path, "replay", seed, 1.21, [1.21])
    return tmp_path


def test_quartiles_shares_and_curves(folder: Path) -> None:
    shown = write_summary(folder)
    found = read_json(folder / "results.json")
    gp = found["methods"]["gp"]
    assert gp["ordering_score"]["median"] == pytest.approx(1.21)
    assert gp["best_score_after"]["median"] == pytest.approx([1.0, 1.1, 1.21])
    # Seed 1 is above the bound on test; seed 2 passed nothing, so it has nothing to be feasible.
    assert gp["feasible_on_test"] == pytest.approx(1 / 3)
    assert gp["feasible_on_test_point"] == pytest.approx(2 / 3)
    assert "| GP (Optuna) | 3 | 3 |" in shown


def test_replay_is_compared_seed_by_seed(folder: Path) -> None:
    write_summary(folder)
    (against,) = read_json(folder / "results.json")["replay_against"]
    assert against["other"] == "gp"
    difference = against["ordering_score_difference"]
    assert [difference[name] for name in ("low", "median", "high")] == pytest.approx(
        [-0.005, 0.0, 0.005]
    )


def test_plot_is_a_picture_and_partial_runs_count(folder: Path) -> None:
    run_file(folder, "gp", 2).unlink()
    write_summary(folder)
    root = ElementTree.parse(folder / "best_score.svg").getroot()
    assert len(root.findall("{*}polyline")) == 3  # two lines, and one that goes on dashed
    assert read_json(folder / "results.json")["methods"]["gp"]["seeds"] == [0, 1]


def test_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no finished run"):
        write_summary(tmp_path)
