"""What the prediction benchmark predicts: enough, and nothing that a fit has seen."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from var_moe.evaluation.cost import SHAPES

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.prediction import UNFITTED, cases, report


class Profile:
    """What the cases ask of a profile."""

    def best_compensation(self):
        return "learned"


def test_enough_configurations_of_each_kind_and_a_shape_of_its_own():
    found = cases(Profile())
    usual = [case for case in found if case.setting != UNFITTED]
    assert len(usual) >= 10
    assert {case.fit for case in usual} == {"verified", "plain", "damage"}
    assert UNFITTED not in SHAPES
    assert len({case.name for case in found}) == len(found)
    assert {case.fit for case in found if case.setting == UNFITTED} == {"verified", "damage"}


def test_the_summary_by_hand(capsys):
    row = {
        "name": "a",
        "experts_per_token": 1.5,
        "measured_relative_time": 0.8,
        "measured_relative_time_95": [0.79, 0.81],
        "predicted_relative_time": 0.82,
        "error_pct": 2.5,
    }
    found = report([row, {**row, "error_pct": -11.0}, {**row, "error_pct": 1.0}])
    assert found["error_pct_median"] == pytest.approx(2.5)
    assert found["error_pct_max"] == 11.0
    assert not found["all_below_limit"]
    assert "11.0% at most" in capsys.readouterr().out
