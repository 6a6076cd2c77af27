"""Spreads by hand, and reports on results folders made by hand."""

from __future__ import annotations

import json
import math

import pytest
from results_folders import write_run

from var_moe.errors import UsageError
from var_moe.optimization.search_space import dimensions
from var_moe.optimization.seed_runs import read_run, read_runs
from var_moe.optimization.stability import Spread, parameter_spread, save_stability, stability


def test_a_spread_by_hand():
    found = Spread.of([1.20, 1.26, 1.23])
    assert found.mean == pytest.approx(1.23)
    assert found.deviation == pytest.approx(0.03)  # sqrt((0.03^2 + 0.03^2) / 2)
    assert (found.low, found.high, found.middle) == (1.20, 1.26, 1.23)
    assert found.relative == pytest.approx(0.06 / 1.23)


def test_a_spread_needs_two_values():
    with pytest.raises(UsageError, match="1 value: a spread needs at least 2"):
        Spread.of([1.0])


def space(**entry):
    (found,) = dimensions({"cache_size": {"type": "int", "low": 100, "high": 5100, **entry}})
    return found


def test_a_parameter_in_its_own_unit_and_as_a_share_of_its_range():
    found = parameter_spread(space(default=1000), [600, 1100, 1600])
    assert found["mean"] == 1100
    assert found["standard_deviation"] == 500
    assert (found["min"], found["max"]) == (600, 1600)
    assert found["spread_share_of_range"] == pytest.approx(1000 / 5000)
    assert (found["searched_low"], found["searched_high"]) == (100, 5100)


def test_on_a_logarithmic_scale_the_share_is_one_of_factors():
    (tau,) = dimensions({"tau": {"type": "float", "low": 1e-4, "high": 1.0, "log": True}})
    found = parameter_spread(tau, [0.001, 0.01])
    assert found["spread_share_of_range"] == pytest.approx(math.log(10) / math.log(1e4))
    assert found["mean"] == pytest.approx(0.0055)  # in its own unit


def test_a_parameter_that_was_fixed_has_no_spread():
    (fixed,) = dimensions({"p": {"type": "float", "low": 0.5, "high": 0.5}})
    assert parameter_spread(fixed, [0.5, 0.5])["spread_share_of_range"] == 0.0


@pytest.fixture
def runs(tmp_path):
    def make(*scores, **changed):
        folders = [
            write_run(tmp_path / f"run_{seed}", seed=seed, score=score, tau=0.01 * seed, **changed)
            for seed, score in enumerate(scores, start=1)
        ]
        return read_runs(folders)

    return make


@pytest.mark.parametrize(
    ("scores", "met"), [((1.20, 1.22, 1.23), True), ((1.20, 1.22, 1.26), False)]
)
def test_the_criterion_is_a_spread_below_three_percent(runs, scores, met):
    report = stability(runs(*scores))
    assert report["best_score"]["spread_relative"] == pytest.approx(
        (max(scores) - min(scores)) / sorted(scores)[1]
    )
    assert report["criterion"]["met"] is met
    assert report["seeds"] == [1, 2, 3]
    (tau,) = report["parameters"]
    assert tau["values"] == [0.01, 0.02, 0.03]
    assert tau["spread_share_of_range"] == pytest.approx(math.log(3) / math.log(1e4))


def test_the_report_says_what_it_is_about(runs, tmp_path):
    report = stability(runs(1.2, 1.21))
    assert report["schema_version"] == 1
    assert report["provenance"]["versions"]["torch"]
    assert report["search"]["model"] == "demo"
    assert report["search"]["max_degradation"] == 0.01
    assert [row["experts_per_token"] for row in report["runs"]] == [1.3, 1.3]
    assert report["agreement"] is None
    assert any("no trace in the results folders" in note for note in report["notes"])
    path = save_stability(tmp_path, report)
    assert json.loads(path.read_text()) == report


def test_a_seed_without_an_answer_is_not_stable(tmp_path):
    folders = [
        write_run(tmp_path / "a", seed=1),
        write_run(tmp_path / "b", seed=2, found=False),
        write_run(tmp_path / "c", seed=3),
    ]
    report = stability(read_runs(folders))
    assert report["best_score"]["spread_relative"] == 0.0  # of the two that found something
    assert not report["criterion"]["met"]
    assert [row["found"] for row in report["runs"]] == [True, False, True]
    assert any("nothing kept the bound with seed 2" in note for note in report["notes"])


def test_one_winner_of_all_seeds_differs_by_its_timings_alone(tmp_path):
    folders = [
        write_run(tmp_path / f"run_{seed}", seed=seed, score=score, experts=1.3)
        for seed, score in ((1, 1.5), (2, 1.7))
    ]
    report = stability(read_runs(folders))
    assert report["best_score"]["spread_relative"] == pytest.approx(0.2 / 1.6)
    assert report["experts_per_token"]["spread_relative"] == 0.0
    assert any(note.startswith("all seeds found one configuration") for note in report["notes"])
    other = write_run(tmp_path / "run_3", seed=3, score=1.6, tau=0.02, experts=1.4)
    report = stability(read_runs([*folders, other]))
    assert report["experts_per_token"]["spread_relative"] == pytest.approx(0.1 / 1.3)
    assert not any("one configuration" in note for note in report["notes"])


def test_without_two_answers_there_is_no_spread(tmp_path):
    folders = [write_run(tmp_path / "a", seed=1), write_run(tmp_path / "b", seed=2, found=False)]
    report = stability(read_runs(folders))
    assert report["best_score"] is None
    assert report["parameters"] == []
    assert not report["criterion"]["met"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "other"),
        ("dataset", "demo-kjv"),
        ("data_hash", "e"),
        ("max_degradation", 0.02),
        ("policy", "naee"),
        ("mode", "plain"),
        ("robust", True),
        ("n_calls", 20),
    ],
)
def test_runs_of_different_searches_are_refused(tmp_path, name, value):
    one = write_run(tmp_path / "one", seed=1)
    two = write_run(tmp_path / "two", seed=2, **{name: value})
    with pytest.raises(UsageError) as caught:
        read_runs([one, two])
    line = str(caught.value)
    assert f"{two}: {name} = {value!r}, and {one} has " in line
    assert "\n" not in line


def test_two_runs_of_one_seed_are_refused(tmp_path):
    folders = [write_run(tmp_path / name, seed=7) for name in ("one", "two")]
    with pytest.raises(UsageError, match="are both of seed 7; expected different seeds"):
        read_runs(folders)


def test_one_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="1 run: a spread over seeds needs at least 2"):
        read_runs([write_run(tmp_path / "one", seed=1)])


def test_a_folder_without_a_finished_search_is_refused(tmp_path):
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trials.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match="an interrupted one goes on with --resume"):
        read_run(tmp_path / "run")


def test_a_damaged_folder_is_refused(tmp_path):
    folder = write_run(tmp_path / "run", seed=1)
    config = {"policy": "damage", "settings": {"tau": 0.5}}
    (folder / "best_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="beside it was written for"):
        read_run(folder)
    (folder / "optimization_metadata.json").write_text('{"schema_version": 9}')
    with pytest.raises(UsageError, match="not of schema 1"):
        read_run(folder)
