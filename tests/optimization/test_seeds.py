"""A search for each of several seeds, with the search itself made up."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from results_folders import write_run

from var_moe.errors import UsageError, VarMoeError
from var_moe.optimization import run as room
from var_moe.optimization.measure_again import NothingFitsError
from var_moe.optimization.run import tune_seeds
from var_moe.optimization.settings import TuneSettings


@pytest.fixture
def searches(monkeypatch):
    """Makes each search up: its experts per token by its seed, None where nothing fits."""
    world = SimpleNamespace(ran=[], killed=None, experts={}, prepared=0)

    def tune(loaded, own, *, ready, **_options):
        assert ready == "ready"
        assert own.shared == own.output.parent
        world.ran.append((own.seed, own.resume))
        if own.seed == world.killed:
            raise KeyboardInterrupt
        experts = world.experts.get(own.seed, 1.3)
        known = own.to_dict() | {"seed": own.seed, "found": experts is not None}
        write_run(own.output, **known, experts=experts)
        if experts is None:
            raise NothingFitsError("nothing fits", ())
        return SimpleNamespace(answer="found")

    def prepare(*_words, **_options):
        world.prepared += 1
        return "ready"

    monkeypatch.setattr(room, "tune", tune)
    monkeypatch.setattr(room, "prepare", prepare)
    return world


def run(folder, seeds=(3, 1, 2), **changed):
    settings = TuneSettings(output=folder, method="replay", **changed)
    return tune_seeds(SimpleNamespace(name="demo"), settings, seeds)


def test_each_seed_is_searched_with_what_is_prepared_once(searches, tmp_path):
    searches.experts = {1: 1.20, 2: 1.25, 3: 1.26}
    report = run(tmp_path)
    assert searches.ran == [(1, False), (2, False), (3, False)]
    assert searches.prepared == 1
    assert [row["seed"] for row in report["runs"]] == [1, 2, 3]
    spread = report["spread"]["experts_per_token"]
    assert (spread["min"], spread["max"]) == (1.20, 1.26)
    assert spread["spread_relative"] == pytest.approx(0.06 / 1.25)
    assert json.loads((tmp_path / "stability.json").read_text()) == report


def test_finished_seeds_are_not_run_again(searches, tmp_path):
    searches.killed = 2
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert not (tmp_path / "stability.json").exists()
    searches.killed, searches.ran = None, []
    run(tmp_path, resume=True)
    assert searches.ran == [(2, True), (3, True)]
    run(tmp_path, resume=True)
    assert (searches.ran, searches.prepared) == ([(2, True), (3, True)], 2)
    searches.killed = 2
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)  # anew
    searches.killed, searches.ran = None, []
    run(tmp_path, resume=True)
    assert searches.ran == [(2, True), (3, True)]


def test_a_search_that_failed_to_measure_its_winner_goes_on(searches, tmp_path):
    run(tmp_path)
    path = tmp_path / "run_2" / "optimization_metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"search": {"unfinished": "why"}}))
    searches.ran = []
    run(tmp_path, resume=True)
    assert searches.ran == [(2, True)]


def test_a_finished_search_with_other_settings_is_not_taken(searches, tmp_path):
    run(tmp_path)
    with pytest.raises(UsageError) as caught:
        run(tmp_path, resume=True, max_degradation=0.02)
    assert "run_1: begun with max_degradation = 0.01, now 0.02" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changed", [{"settings": None}, {"identity": "x"}, {"search": 3}])
def test_metadata_that_were_edited(searches, tmp_path, changed):
    run(tmp_path)
    path = tmp_path / "run_2" / "optimization_metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(UsageError, match=r"optimization_metadata\.json: not as this version"):
        run(tmp_path, resume=True)


def test_without_resume_the_machine_is_measured_anew(searches, tmp_path):
    cost = tmp_path / "cost_model.json"
    cost.write_text("{}")
    run(tmp_path, resume=True)
    assert cost.exists()
    run(tmp_path)
    assert not cost.exists()


def test_a_seed_that_finds_nothing_does_not_end_the_others(searches, tmp_path):
    searches.experts = {2: None}
    report = run(tmp_path)
    assert [row["found"] for row in report["runs"]] == [True, False, True]
    assert report["spread"]["speedup"]["spread_relative"] == 0


def test_where_no_seed_finds_anything_that_is_said(searches, tmp_path):
    searches.experts = {1: None, 2: None, 3: None}
    with pytest.raises(VarMoeError, match=r"with any seed; see .*stability\.json"):
        run(tmp_path)
    assert (tmp_path / "stability.json").is_file()


def test_folders_may_be_named_by_text(tmp_path):
    named = TuneSettings(output=str(tmp_path), profile=str(tmp_path / "profile"))
    assert named == TuneSettings(output=tmp_path, profile=tmp_path / "profile")
    assert named.preparations / "trace" == tmp_path / "trace"
