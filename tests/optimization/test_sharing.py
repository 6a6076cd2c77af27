"""The loop of a search: what interrupts it, what goes on with it, and who shares it."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import analytic
import optuna
import pytest
from analytic import (
    CALLS,
    SMALL_SPACE,
    STARTUP,
    SmallObjective,
    kept,
    load,
    rich_evaluation,
    search,
    unbroken,
)

from var_moe.errors import UsageError
from var_moe.optimization import worker as room
from var_moe.optimization.methods import random_search
from var_moe.optimization.results import Evaluation
from var_moe.optimization.search_space import point_key, sample
from var_moe.optimization.trial_log import LOG_NAME
from var_moe.optimization.trials import told_value


def keys(result):
    return {point_key(e.params) for e in result.evaluations}


@pytest.fixture
def log(tmp_path):
    return tmp_path / LOG_NAME


@pytest.fixture(params=["file", "database"])
def storage(request, tmp_path):
    """Each of the two kinds of storage."""
    return {"file": str(tmp_path / "t.log"), "database": f"sqlite:///{tmp_path}/t.db"}[
        request.param
    ]


@pytest.mark.parametrize("stop_at", [1, 4, 7])
def test_a_resumed_search_equals_an_unbroken_one(stop_at, log):
    _stop_and_resume(stop_at, log)


@pytest.mark.slow
def test_a_search_in_a_database_is_resumed(tmp_path):
    _stop_and_resume(4, f"sqlite:///{tmp_path}/t.db")


def _stop_and_resume(stop_at, storage):
    with pytest.raises(KeyboardInterrupt):
        search(SmallObjective(stop_at=stop_at), storage=storage)
    rest = SmallObjective()
    resumed = search(rest, None, seed=None, storage=storage, resume=True)
    assert kept(resumed) == kept(unbroken())
    assert len(rest.seen) == CALLS - stop_at + 1
    assert len(keys(resumed)) == CALLS
    study = load(storage)
    states = [t.state.name for t in study.trials]
    assert (states.count("COMPLETE"), states.count("FAIL")) == (CALLS, 1)
    lost, again = study.trials[stop_at - 1], study.trials[stop_at]
    assert (lost.state.name, again.params) == ("FAIL", lost.params)
    assert again.user_attrs["again"] == lost.number


def test_an_evaluation_written_before_its_trial_was_closed_is_not_repeated(log, monkeypatch):
    def die(self, *args, **kwargs):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "tell", die)
        with pytest.raises(SystemExit):
            search(SmallObjective(), 3, storage=log)
    rest = SmallObjective()
    resumed = search(rest, 3, storage=log, resume=True)
    assert len(rest.seen) == 2
    assert kept(resumed) == kept(search(SmallObjective(), 3))
    assert load(log).trials[0].constraints.keys() == {"degradation", "degradation_upper"}


@pytest.mark.slow
def test_a_trial_that_was_lost_while_its_point_was_proposed_is_proposed_anew(log, monkeypatch):
    """As by a kill in the middle of writing the point."""
    suggest = optuna.Trial.suggest_int

    def die(self, *args, **kwargs):
        if self.number == 6:
            raise SystemExit
        return suggest(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Trial, "suggest_int", die)
        with pytest.raises(SystemExit):
            search(SmallObjective(), storage=log)
    assert set(load(log).trials[6].params) == {"x"}
    resumed = search(SmallObjective(), storage=log, resume=True)
    assert kept(resumed) == kept(search(SmallObjective()))
    assert load(log).trials[7].system_attrs["fixed_params"] == {}


def test_two_processes_that_found_the_same_trial_lost_make_it_again_once(log):
    with pytest.raises(KeyboardInterrupt):
        search(SmallObjective(stop_at=3), storage=log)
    study = load(log)
    for _ in range(2):
        study.enqueue_trial(study.trials[2].params, user_attrs={"again": 2})
    resumed = search(SmallObjective(), storage=log, resume=True)
    assert kept(resumed) == kept(unbroken())
    assert load(log).trials[4].user_attrs["void"] == "retried already"


def test_what_the_study_holds(log):
    result = search(SmallObjective(fail_at=(2,)), 5, storage=log)
    study = load(log)
    assert study.direction.name == "MAXIMIZE"
    assert study.user_attrs["header"]["method"] == "bayesian-optuna"
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
    good = replace(good, predicted_speedup=1.4, feasible=True)
    assert (told_value(good), good.score) == (1.2, pytest.approx(1.3))
    bad = replace(rich_evaluation({}, degradation=0.5, speedup=1.6, bound=0.01), feasible=False)
    assert (told_value(bad), bad.score) == (1.6, -150.0)
    assert told_value(replace(bad, predicted_speedup=None)) == 1.0
    assert told_value(replace(bad, predicted_speedup=float("nan"), speedup=1.5)) == 1.5
    assert told_value(Evaluation(params={}, score=-7.0)) == -7.0


class Process:
    """A search, or its share of one, in a process of its own."""

    def __init__(self, storage, *, calls, pause=0.0, hang_at=0, method="bayesian"):
        words = [str(storage), str(calls), str(pause), str(hang_at), method]
        command = [sys.executable, str(Path(analytic.__file__)), *words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._hanging = Path(f"{str(storage).partition('///')[2] or storage}.hanging")

    def seen(self):
        out, _ = self.process.communicate(timeout=120)
        assert self.process.returncode == 0
        return json.loads(out)

    def kill_when_hanging(self):
        try:
            deadline = time.monotonic() + 60
            while not self._hanging.exists():
                assert self.process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


@pytest.mark.slow
def test_a_killed_search_is_resumed(storage):
    Process(storage, calls=6, hang_at=4).kill_when_hanging()
    if "://" not in storage:
        with Path(storage).open("ab") as log:
            log.write(b'{"op_code": 5, "wor')  # a write that was cut short
    rest = SmallObjective()
    resumed = search(rest, None, seed=None, n_startup=None, storage=storage, resume=True)
    assert kept(resumed) == kept(search(SmallObjective(), 6, n_startup=None))
    assert len(rest.seen) == 3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bayesian", "random"])
def test_two_processes_share_a_search(storage, method):
    processes = [Process(storage, calls=16, pause=0.3, method=method) for _ in range(2)]
    shares = [process.seen() for process in processes]
    assert min(map(len, shares)) >= 3
    points = {point_key(point) for share in shares for point in share}
    assert len(points) == sum(map(len, shares)) == 16
    search_again = {"bayesian": bayesian_small, "random": random_small}[method]
    result = search_again(SmallObjective(stop_at=1), None, storage=storage, resume=True)
    assert keys(result) == points
    if method == "random":
        assert [e.params for e in result.evaluations] == [
            sample(SMALL_SPACE, 5, number) for number in range(16)
        ]


def bayesian_small(objective, n_calls, **more):
    return search(objective, n_calls, n_startup=None, **more)


def random_small(objective, n_calls, **more):
    return random_search(objective, SMALL_SPACE, n_calls, verbose=False, seed=5, **more)


@pytest.mark.slow
def test_what_a_killed_process_leaves_is_evaluated_by_the_other(storage):
    other = Process(storage, calls=10, pause=0.3)
    Process(storage, calls=10, pause=0.3, hang_at=2).kill_when_hanging()
    share = other.seen()
    result = search(SmallObjective(stop_at=1), None, n_startup=None, storage=storage, resume=True)
    assert result.num_evaluations == 10 == len(keys(result))
    assert len(share) == 9  # the killed one had finished one


@pytest.mark.slow
def test_threads_evaluate_each_point_once(tmp_path):
    """Far more often at the same step than processes that evaluate a model would be."""
    url, results, errors = f"sqlite:///{tmp_path}/t.db", [], []
    random_small(SmallObjective(), 1, storage=url)

    def share():
        try:
            results.append(random_small(SmallObjective(), 20, storage=url, resume=True))
        except BaseException as error:  # told by the main thread
            errors.append(error)

    threads = [threading.Thread(target=share) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for result in results:
        assert [e.params for e in result.evaluations] == [
            sample(SMALL_SPACE, 5, number) for number in range(20)
        ]


def test_the_last_evaluation_is_made_by_one_process(log, monkeypatch):
    """Two see that one is left, and both take a trial."""
    ask = optuna.Study.ask
    taken = []

    def as_another_does(self):
        if not taken and len(self.trials) == 2:
            taken.append(1)
            search(SmallObjective(), 3, storage=log, resume=True)
        return ask(self)

    monkeypatch.setattr(optuna.Study, "ask", as_another_does)
    objective = SmallObjective()
    result = search(objective, 3, storage=log)
    assert kept(result) == kept(search(SmallObjective(), 3))
    assert len(objective.seen) == 2
    assert load(log).trials[3].user_attrs["void"] == "over the planned number"


def test_the_same_point_is_not_taken_twice_at_once(log, monkeypatch):
    """Two processes propose at the same moment, so that neither sees the other's point."""
    search(SmallObjective(), STARTUP, storage=log)
    other = load(log)
    ask = room.Worker._taken_meanwhile
    once = []

    def as_another_does(self, trial, params):
        if not once:
            once.append(params)
            twin = other.ask()
            twin.suggest_float("x", 0.0, 1.0)
            with contextlib.suppress(Exception):
                twin.suggest_int("n", 0, 40)
            twin.set_user_attr("evaluation", Evaluation(params=params, score=1.0).to_dict())
            other.tell(twin, 1.0)
        return ask(self, trial, params)

    class Same(optuna.samplers.BaseSampler):
        def infer_relative_search_space(self, study, trial):
            return {}

        def sample_relative(self, study, trial, space):
            return {}

        def sample_independent(self, study, trial, name, distribution):
            return once[0][name]

    other.sampler = Same()
    monkeypatch.setattr(room.Worker, "_taken_meanwhile", as_another_does)
    objective = SmallObjective()
    result = search(objective, CALLS, storage=log, resume=True)
    assert result.num_evaluations == CALLS == len(keys(result))
    assert once[0] not in objective.seen


def test_an_evaluation_that_was_taken_for_lost_is_not_told_twice(log, caplog):
    class Suspended(SmallObjective):
        """Its machine sleeps in the third evaluation, and another one takes the trial."""

        def evaluate(self, params):
            if len(self.seen) == 2:
                other = load(log)
                other.tell(other.trials[-1].number, state=optuna.trial.TrialState.FAIL)
            return super().evaluate(params)

    result = search(Suspended(), 4, storage=log)
    assert kept(result) == kept(search(SmallObjective(), 4))
    assert "considered lost" in caplog.text


@pytest.mark.slow
def test_a_trial_of_another_machine_is_lost_after_a_silence(log, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        search(SmallObjective(stop_at=3), storage=log)
    study = load(log)
    trial = study.ask()
    told = {"machine": "another", "pid": 1, "started": "1", "run": "x", "beat": time.time() - 250}
    trial.set_user_attr("worker", told)
    stops = iter([False] * 7 + [True] * 99)
    part = search(SmallObjective(), storage=log, resume=True, should_stop=lambda: next(stops))
    assert part.num_evaluations == CALLS - 1  # it may still be at work
    monkeypatch.setattr("var_moe.optimization.trials.LOST_SECONDS", 200.0)
    assert search(SmallObjective(), storage=log, resume=True).num_evaluations == CALLS


def test_a_storage_that_fails_is_one_line(tmp_path):
    url = f"sqlite:///{tmp_path}/t.db"

    class Losing(SmallObjective):
        def evaluate(self, params):
            if len(self.seen) == 2:
                (tmp_path / "t.db").write_bytes(b"x" * 4096)
            return super().evaluate(params)

    with pytest.raises(Exception, match=r"t\.db: the storage failed \(") as caught:
        search(Losing(), 4, storage=url)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, UsageError)
