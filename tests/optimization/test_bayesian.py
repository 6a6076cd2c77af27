import logging
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import analytic
import optuna
import pytest
from analytic import SMALL_SPACE, SixObjective, SmallObjective, rich_evaluation

from var_moe.config import VARConfig
from var_moe.errors import UsageError
from var_moe.optimization.bayesian import bayesian_optimization
from var_moe.optimization.optuna_engine import told_value
from var_moe.optimization.results import Evaluation
from var_moe.optimization.search_space import SEARCH_SPACE, point_key, starting_points

CALLS = 8
STARTUP = 5


def search(objective, n_calls=CALLS, **more):
    more = {"seed": 5, "verbose": False, "n_startup": STARTUP, **more}
    return bayesian_optimization(objective, SMALL_SPACE, n_calls, **more)


def kept(result):
    """Evaluations without the times, which differ between runs."""
    return [e.replace(seconds=0.0, suggestion_seconds=0.0) for e in result.evaluations]


def load(folder):
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(folder / "optuna_study.log"))
    )
    return optuna.load_study(storage=storage, study_name="var_moe")


@pytest.fixture(scope="module")
def unbroken():
    return search(SmallObjective())


def test_the_documented_call():
    result = bayesian_optimization(
        objective_fn=lambda p: -abs(p["entropy_threshold"] - 0.7),
        search_space=SEARCH_SPACE,
        n_calls=4,
        verbose=False,
    )
    assert isinstance(result.best_params, VARConfig)
    assert result.best_params.entropy_threshold == 0.7  # the aggressive preset
    assert (result.best_score, result.num_evaluations) == (0.0, 4)
    assert [r["params"] for r in result.all_results][:3] == starting_points(SEARCH_SPACE)
    assert result.method == "bayesian"


def test_the_process_finds_a_feasible_point_that_beats_the_default():
    objective = SixObjective()
    result = bayesian_optimization(objective, n_calls=12, verbose=False, seed=1)
    # The default scores 1.163, the aggressive preset breaks the bound, the optimum is 1.256.
    default = objective(starting_points(SEARCH_SPACE)[0])
    assert result.best_score > default + 0.035
    assert SixObjective().evaluate(result.best_params.documented()).degradation <= 0.01
    assert any(e.feasible is False for e in result.evaluations)


def test_the_model_is_used_and_its_time_is_told(unbroken):
    assert unbroken.extra["suggestion_seconds"] == pytest.approx(
        sum(e.suggestion_seconds for e in unbroken.evaluations)
    )
    asked = unbroken.evaluations[STARTUP:]
    assert all(e.suggestion_seconds > 0.01 for e in asked)
    # The optimum is at n = 0, x = 0.5.
    assert max(e.score for e in asked) > max(e.score for e in unbroken.evaluations[:STARTUP])


@pytest.mark.parametrize("stop_at", [1, 4, 7])
def test_a_resumed_search_equals_an_unbroken_one(stop_at, tmp_path, unbroken):
    with pytest.raises(KeyboardInterrupt):
        search(SmallObjective(stop_at=stop_at), storage_path=tmp_path)
    rest = SmallObjective()
    resumed = search(rest, None, seed=None, storage_path=tmp_path, resume=True)
    assert kept(resumed) == kept(unbroken)
    assert len(rest.seen) == CALLS - stop_at + 1
    assert len({point_key(e.params) for e in resumed.evaluations}) == CALLS
    study = load(tmp_path)
    states = [t.state.name for t in study.trials]
    assert (states.count("COMPLETE"), states.count("FAIL")) == (CALLS, 1)
    lost, again = study.trials[stop_at - 1], study.trials[stop_at]
    assert (lost.state.name, again.params) == ("FAIL", lost.params)
    assert again.user_attrs["again"] == lost.number


def test_a_killed_search_is_resumed(tmp_path):
    command = [sys.executable, str(Path(analytic.__file__)), str(tmp_path), "6"]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "hanging").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # A second run in the same folder is refused while the first one lives.
        with pytest.raises(UsageError, match="another run"):
            bayesian_optimization(
                SmallObjective(), SMALL_SPACE, 6, verbose=False, storage_path=tmp_path
            )
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    log = tmp_path / "optuna_study.log"
    log.write_bytes(log.read_bytes() + b'{"op_code": 5, "wor')  # a write that was cut short
    rest = SmallObjective()
    resumed = bayesian_optimization(
        rest, SMALL_SPACE, verbose=False, storage_path=tmp_path, resume=True
    )
    unbroken = bayesian_optimization(SmallObjective(), SMALL_SPACE, 6, verbose=False, seed=5)
    assert kept(resumed) == kept(unbroken)
    assert len(rest.seen) == 3


def test_a_lock_of_optuna_is_never_waited_for(tmp_path, monkeypatch):
    """Its lock files outlive a killed process by half a minute; ours is the system's."""

    def wait(self):
        raise AssertionError("waiting for a lock file")

    for name in ("JournalFileOpenLock", "JournalFileSymlinkLock"):
        monkeypatch.setattr(f"optuna.storages.journal.{name}.acquire", wait)
    assert search(SmallObjective(), 2, storage_path=tmp_path).num_evaluations == 2


def test_an_evaluation_written_before_its_trial_was_closed_is_not_repeated(tmp_path, monkeypatch):
    def die(self, *args, **kwargs):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "tell", die)
        with pytest.raises(SystemExit):
            search(SmallObjective(), 3, storage_path=tmp_path)
    rest = SmallObjective()
    resumed = search(rest, 3, storage_path=tmp_path, resume=True)
    assert len(rest.seen) == 2
    assert kept(resumed) == kept(search(SmallObjective(), 3))
    names = {"degradation", "degradation_upper"}
    assert load(tmp_path).trials[0].constraints.keys() == names


def test_what_the_study_holds(tmp_path):
    result = search(SmallObjective(fail_at=(2,)), 5, storage_path=tmp_path)
    study = load(tmp_path)
    assert study.direction.name == "MAXIMIZE"
    for trial, evaluation in zip(study.trials, result.evaluations, strict=True):
        assert trial.params == evaluation.params
        assert Evaluation.from_dict(trial.user_attrs["evaluation"]) == evaluation
        assert trial.user_attrs["score"] == evaluation.score
        if evaluation.failed:
            assert trial.state.name == "FAIL"
            continue
        assert trial.value == pytest.approx(1 + evaluation.params["x"])
        expected = evaluation.degradation - 0.01
        assert trial.constraints == {
            "degradation": pytest.approx(expected),
            # The error of the difference between two texts: 1.645 * sqrt(2) * 0.001.
            "degradation_upper": pytest.approx(expected + 0.0023264, abs=1e-6),
        }
    assert any(e.feasible is False for e in result.evaluations)


def test_the_value_told_is_a_speedup():
    good = rich_evaluation({}, degradation=0.001, speedup=1.2, bound=0.01, learned_pct=5.0)
    good = good.replace(predicted_speedup=1.4, feasible=True)
    assert (told_value(good), good.score) == (1.2, pytest.approx(1.3))
    bad = rich_evaluation({}, degradation=0.5, speedup=1.6, bound=0.01).replace(feasible=False)
    assert (told_value(bad), bad.score) == (1.6, -150.0)
    assert told_value(bad.replace(predicted_speedup=None)) == 1.0
    assert told_value(bad.replace(predicted_speedup=float("nan"), speedup=1.5)) == 1.5
    assert told_value(Evaluation(params={}, score=-7.0)) == -7.0


def test_after_a_failure_the_next_point_is_random():
    objective = SmallObjective(fail_at=(STARTUP + 1, STARTUP + 2))
    result = search(objective, STARTUP + 3)
    assert [e.failed for e in result.evaluations] == [False] * STARTUP + [True, True, False]
    assert len({point_key(e.params) for e in result.evaluations}) == STARTUP + 3
    assert result.evaluations[STARTUP + 2].params["n"] not in (0, 40)


def test_an_objective_that_always_fails_ends():
    result = search(lambda p: float("nan"), 7)
    assert result.extra["failed"] == 7
    assert result.best_params == {"x": 0.2, "n": 8}


def test_no_point_is_evaluated_twice_while_another_is_left():
    space = {"n": {"type": "int", "low": 0, "high": 6, "default": 3}}
    options = {"verbose": False, "n_startup": 3, "seed": 0}
    result = bayesian_optimization(lambda p: -p["n"], space, 7, **options)
    assert sorted(e.params["n"] for e in result.evaluations) == list(range(7))
    more = bayesian_optimization(lambda p: -p["n"], space, 8, **options)
    assert more.num_evaluations == 8


def test_a_space_without_freedom():
    space = {"n": {"type": "int", "low": 6, "high": 6, "default": 6}}
    result = bayesian_optimization(lambda p: p["n"], space, 4, verbose=False, n_startup=2)
    assert [e.params for e in result.evaluations] == [{"n": 6}] * 4


def test_a_process_that_cannot_be_fitted_is_replaced_by_chance(monkeypatch, caplog):
    def broken(self, *args, **kwargs):
        raise RuntimeError("cholesky")

    monkeypatch.setattr(optuna.samplers.GPSampler, "_sample_relative_impl", broken)
    with caplog.at_level(logging.WARNING):
        result = search(SmallObjective(), 7)
    assert len({point_key(e.params) for e in result.evaluations}) == 7
    assert "drawn at random" in caplog.text


def test_points_of_ones_own_come_after_the_default():
    own = [{"x": 0.45, "n": 1}, {"n": 2, "x": 0.4}]
    result = search(SmallObjective(), 3, enqueue=own)
    assert [e.params for e in result.evaluations] == [{"x": 0.2, "n": 8}, *own]
    with pytest.raises(UsageError, match=r"enqueue\[0\]: n = 41"):
        search(SmallObjective(), 3, enqueue=[{"x": 0.45, "n": 41}])


def test_another_search_in_the_folder(tmp_path):
    search(SmallObjective(), 2, storage_path=tmp_path, settings={"model": "a"})
    with pytest.raises(UsageError, match=r"settings\.model = 'a', now 'b'"):
        search(SmallObjective(), 2, storage_path=tmp_path, resume=True, settings={"model": "b"})
    with pytest.raises(UsageError, match="another method"):
        search(SmallObjective(), 2, storage_path=tmp_path, resume=True, engine="skopt")
    again = search(SmallObjective(), 3, storage_path=tmp_path)
    assert again.extra["resumed"] == 0
    assert (tmp_path / "optuna_study.log.previous").exists()
    assert len(load(tmp_path).trials) == 3


def test_a_damaged_study_is_named(tmp_path):
    search(SmallObjective(), 2, storage_path=tmp_path)
    log = tmp_path / "optuna_study.log"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:3], b"{...\n", *lines[4:]]))
    with pytest.raises(UsageError, match="line 4 is damaged"):
        search(SmallObjective(), 2, storage_path=tmp_path, resume=True)


def test_optuna_is_left_as_it_was(tmp_path, capfd):
    optuna.logging.set_verbosity(optuna.logging.INFO)
    search(SmallObjective(), 2, storage_path=tmp_path)
    assert optuna.logging.get_verbosity() == optuna.logging.INFO
    assert capfd.readouterr().err == ""


def test_bad_arguments():
    with pytest.raises(UsageError, match="engine = 'botorch'"):
        search(SmallObjective(), engine="botorch")
    with pytest.raises(UsageError, match="n_calls"):
        search(SmallObjective(), 0)
    with pytest.raises(UsageError, match="n_startup"):
        search(SmallObjective(), n_startup=0)
    with pytest.raises(UsageError, match="resume"):
        search(SmallObjective(), resume=True)


@pytest.mark.parametrize(("kind", "low", "high"), [("float", 1e-6, 1.0), ("int", 1, 10**6)])
def test_a_logarithmic_scale_is_searched_as_such(kind, low, high, tmp_path):
    space = {"tau": {"type": kind, "low": low, "high": high, "default": high, "log": True}}
    seen = []

    def objective(params):
        seen.append(params["tau"])
        return -((math.log10(params["tau"] / low) - 2) ** 2)

    options = {"seed": 5, "verbose": False, "n_startup": 5, "storage_path": tmp_path}
    bayesian_optimization(objective, space, 10, **options)
    (distribution,) = load(tmp_path).trials[-1].distributions.values()
    assert distribution.log
    near = [low * 10 < value < low * 1000 for value in seen]
    assert sum(near[5:]) >= 3  # on a linear scale that is a thousandth of the range
    assert {type(value) for value in seen} == {float if kind == "float" else int}
