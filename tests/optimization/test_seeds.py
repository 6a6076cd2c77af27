"""Plans of seeds, and searches over them with the search itself made up."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from results_folders import write_run

from var_moe.errors import UsageError
from var_moe.optimization import seeds as room
from var_moe.optimization.conclusion import NothingFitsError
from var_moe.optimization.seeds import NoSeedFitsError, plan_seeds, tune_seeds
from var_moe.optimization.settings import TuneSettings


def settings(folder, **changed):
    return TuneSettings(output=folder, method="replay", **changed)


def plan(folder, seeds=None, repeats=0, **changed):
    return plan_seeds(settings(folder, **changed), model="demo", seeds=seeds, repeats=repeats)


@pytest.mark.parametrize(
    ("seeds", "why"),
    [
        ([1, 2, 1], "seeds: 1 is given twice"),
        ([4], "1 seed: a spread over seeds needs at least 2"),
        ([1, -2], "seed = -2"),
    ],
)
def test_bad_seeds_are_refused(tmp_path, seeds, why):
    with pytest.raises(UsageError, match=why):
        plan(tmp_path, seeds)


def test_fresh_seeds_differ_and_are_recorded(tmp_path):
    first = plan(tmp_path, repeats=3)
    assert len(set(first.seeds)) == 3
    assert plan(tmp_path, repeats=3).seeds != first.seeds
    first.save(tmp_path)
    resumed = plan(tmp_path, repeats=3, resume=True)
    assert resumed.seeds == first.seeds
    more = plan(tmp_path, repeats=4, resume=True)
    assert more.seeds[:3] == first.seeds
    with pytest.raises(UsageError, match="repeats = 1: a spread over seeds needs at least 2"):
        plan(tmp_path, repeats=1)


def test_a_resumed_plan_knows_what_is_done(tmp_path):
    plan(tmp_path, [1, 2, 3]).done(2).save(tmp_path)
    assert plan(tmp_path, [1, 2, 3], resume=True).left == [1, 3]
    assert plan(tmp_path, [2, 5], resume=True).left == [5]
    assert plan(tmp_path, [1, 2, 3]).left == [1, 2, 3]  # anew


def test_a_plan_for_another_search_is_not_resumed(tmp_path):
    plan(tmp_path, [1, 2]).save(tmp_path)
    with pytest.raises(UsageError) as caught:
        plan(tmp_path, [1, 2], resume=True, max_degradation=0.02)
    assert "begun with max_degradation = 0.01, now 0.02" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def searches(monkeypatch):
    """Makes each search up: its score by its seed, None where nothing fits; notes what ran."""
    world = SimpleNamespace(ran=[], resumed=[], killed=None, scores={}, prepared=0)

    def tune(_loaded, own, *, ready, **_options):
        assert ready == "ready"
        if own.seed == world.killed:
            (own.output).mkdir(parents=True, exist_ok=True)
            (own.output / "trials.jsonl").write_text("{}\n")
            raise KeyboardInterrupt
        world.ran.append(own.seed)
        if own.resume:
            world.resumed.append(own.seed)
        assert own.shared == own.output.parent
        score = world.scores.get(own.seed, 1.2)
        write_run(own.output, seed=own.seed, score=score or 0, found=score is not None)
        if score is None:
            raise NothingFitsError("nothing fits", ())
        return SimpleNamespace(answer="found")

    def prepare(*_words, **_options):
        world.prepared += 1
        return "ready"

    monkeypatch.setattr(room, "tune", tune)
    monkeypatch.setattr(room, "prepare", prepare)
    monkeypatch.setattr(room, "perplexity_differences", lambda _ready, _runs: [])
    return world


def run(folder, seeds=(1, 2, 3), **changed):
    return tune_seeds(None, settings(folder, **changed), plan(folder, list(seeds), **changed))


def test_each_seed_is_searched_with_what_is_prepared_once(searches, tmp_path):
    searches.scores = {1: 1.20, 2: 1.22, 3: 1.21}
    report = run(tmp_path)
    assert searches.ran == [1, 2, 3]
    assert searches.prepared == 1
    assert report["seeds"] == [1, 2, 3]
    assert report["best_score"]["max"] == 1.22
    assert json.loads((tmp_path / "stability.json").read_text()) == report
    assert json.loads((tmp_path / "seeds.json").read_text())["finished"] == [1, 2, 3]


def test_finished_seeds_are_not_run_again(searches, tmp_path):
    searches.killed = 2
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert searches.ran == [1]
    assert not (tmp_path / "stability.json").exists()
    searches.killed = None
    run(tmp_path, resume=True)
    assert searches.ran == [1, 2, 3]
    assert searches.resumed == [2]  # the third had not begun
    run(tmp_path)
    assert searches.ran == [1, 2, 3, 1, 2, 3]  # anew


def test_without_resume_the_machine_is_measured_anew(searches, tmp_path):
    cost = tmp_path / "cost_model.json"
    cost.write_text("{}")
    run(tmp_path, resume=True)
    assert cost.exists()
    run(tmp_path)
    assert not cost.exists()


def test_a_seed_that_finds_nothing_does_not_end_the_others(searches, tmp_path):
    searches.scores = {2: None}
    report = run(tmp_path)
    assert searches.ran == [1, 2, 3]
    assert [row["found"] for row in report["runs"]] == [True, False, True]
    assert not report["criterion"]["met"]


def test_where_no_seed_finds_anything_that_is_said(searches, tmp_path):
    searches.scores = {1: None, 2: None, 3: None}
    with pytest.raises(NoSeedFitsError, match=r"with any of the seeds; see .*stability\.json"):
        run(tmp_path)
    assert (tmp_path / "stability.json").is_file()


def test_folders_may_be_named_by_text(tmp_path):
    named = TuneSettings(output=str(tmp_path), profile=str(tmp_path / "profile"))
    assert named == TuneSettings(output=tmp_path, profile=tmp_path / "profile")
    assert named.preparations / "trace" == tmp_path / "trace"
