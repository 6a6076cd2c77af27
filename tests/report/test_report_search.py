"""Figures of a search against the rows that they are made of."""

from __future__ import annotations

import json

import pytest

from var_moe.evaluation.cost import TERMS, CostModel
from var_moe.evaluation.speed_setting import SpeedSetting
from var_moe.report.folder import read_results
from var_moe.report.forward import breakdown_figure
from var_moe.report.page import build_report
from var_moe.report.search import (
    measured_table,
    progress_figure,
    slice_figures,
    tradeoff_figure,
)


def traces(picture):
    return {trace.name: trace for trace in picture.figure.data}


def evaluation(speedup, feasible):
    return {
        "params": {"tau": speedup},
        "speedup": speedup,
        "feasible": feasible,
        "degradation": 0.005,
        "experts_per_token": 1.5,
    }


def test_the_best_so_far_counts_feasible_evaluations_alone():
    rows = [evaluation(*one) for one in ((1.4, False), (1.1, True), (1.3, True), (1.2, True))]
    found = traces(progress_figure(rows))
    assert list(found["best so far"].y) == [None, 1.1, 1.3, 1.3]
    assert list(found["over the bound"].x) == [1]
    assert list(found["keeps the bound"].x) == [2, 3, 4]


def test_the_certified_point_and_the_held_out_one_are_where_they_were_measured(sample):
    results = read_results(sample)
    found = traces(tradeoff_figure(results, []))
    certificate = results.get("certificate")
    test = next(t for t in certificate["tests"] if t["name"] == "front 17")
    star = found["certified"]
    assert star.x[0] == pytest.approx(100 * test["degradation"])
    low, high = test["degradation_interval"]
    assert star.x[0] + star.error_x.array[0] == pytest.approx(100 * high)
    assert star.x[0] - star.error_x.arrayminus[0] == pytest.approx(100 * low)
    held_out = results.get("validation")
    assert found["held-out text"].y[0] == held_out["speedup"]
    bounds = [shape.x0 for shape in tradeoff_figure(results, []).figure.layout.shapes]
    assert bounds == [1.0]


def test_the_winner_is_marked(sample):
    results = read_results(sample)
    best = results.get("search")["best_params"]
    table = measured_table(results.get("metadata"), best)
    assert table.rows[table.marked][0] == "candidate 1"
    assert measured_table(results.get("metadata"), None).marked is None


def test_one_parameter_has_a_slice(sample):
    results = read_results(sample)
    rows, metadata = results.get("search")["all_results"], results.get("metadata")
    rows = [row for row in rows if row["speedup"] is not None]
    assert [picture.name for picture in slice_figures(rows, metadata)] == ["slice-tau"]


def test_several_parameters_have_a_slice_each(six_thresholds):
    names = [picture.name for picture in build_report(six_thresholds).pictures]
    assert sum(name.startswith("slice-") for name in names) == 3


def test_the_breakdown_is_coefficients_times_work():
    cost = CostModel(
        seconds={**dict.fromkeys(TERMS, 0.0), "pair": 1e-3, "policy": 2e-3},
        baseline=0.5,
        setting=SpeedSetting(batch_size=1, sequence=100),
        layers=2,
        experts=4,
        top_k=2,
        error=0.1,
    )
    winner = {"experts_per_token_by_layer": [1.0, 1.5]}
    found = traces(breakdown_figure(cost, winner))
    assert list(found["expert pairs"].y) == ["all experts", "the winner", "leading experts only"]
    assert list(found["expert pairs"].x) == pytest.approx([400.0, 250.0, 200.0])  # ms
    assert list(found["decisions"].x) == pytest.approx([0.0, 200.0, 0.0])
    assert "reading experts" not in found
    assert found["unmodified, measured"].x[0] == 500.0


def test_a_command_is_repeated_with_the_seed_that_it_drew(change, sample):
    metadata = json.loads((sample / "optimization_metadata.json").read_text())
    for given, told in (
        ("var-moe tune", "var-moe tune --seed 1"),
        ("var-moe tune --seed=1", "var-moe tune --seed=1"),
    ):
        provenance = {**metadata["provenance"], "command": given}
        folder = change("optimization_metadata", provenance=provenance)
        origin = build_report(folder).sections[-1]
        assert origin.blocks[0].rows[0] == told
