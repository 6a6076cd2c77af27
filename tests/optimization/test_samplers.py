import logging
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import analytic
import optuna
import pytest
from analytic import SMALL_SPACE, STARTUP, SixObjective, SmallObjective, kept, load, search

from var_moe.config import SEARCH_SPACE, VARConfig
from var_moe.errors import UsageError
from var_moe.optimization.methods import bayesian_optimization
from var_moe.optimization.results import Evaluation
from var_moe.optimization.samplers import SkoptSampler
from var_moe.optimization.search_space import point_key, starting_points
from var_moe.optimization.trial_log import LOG_NAME


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


@pytest.mark.slow
def test_the_process_finds_a_feasible_point_that_beats_the_default():
    objective = SixObjective()
    result = bayesian_optimization(objective, n_calls=12, verbose=False, seed=1)
    # The default scores 1.163, the aggressive preset breaks the bound, the optimum is 1.256.
    default = objective(starting_points(SEARCH_SPACE)[0])
    assert result.best_score > default + 0.035
    assert SixObjective().evaluate(result.best_params.documented()).degradation <= 0.01
    assert any(e.feasible is False for e in result.evaluations)


def test_the_model_is_used_and_its_time_is_told():
    unbroken = analytic.unbroken()
    assert unbroken.extra["suggestion_seconds"] == pytest.approx(
        sum(e.suggestion_seconds for e in unbroken.evaluations)
    )
    asked = unbroken.evaluations[STARTUP:]
    assert all(e.suggestion_seconds > 0.01 for e in asked)
    # The optimum is at n = 0, x = 0.5.
    assert max(e.score for e in asked) > max(e.score for e in unbroken.evaluations[:STARTUP])


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


def test_optuna_is_left_as_it_was(tmp_path, capfd):
    optuna.logging.set_verbosity(optuna.logging.INFO)
    search(SmallObjective(), 2, storage=tmp_path / LOG_NAME)
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

    options = {"seed": 5, "verbose": False, "n_startup": 5, "storage": tmp_path / LOG_NAME}
    bayesian_optimization(objective, space, 10, **options)
    (distribution,) = load(tmp_path / LOG_NAME).trials[-1].distributions.values()
    assert distribution.log
    near = [low * 10 < value < low * 1000 for value in seen]
    assert sum(near[5:]) >= 3  # on a linear scale that is a thousandth of the range
    assert {type(value) for value in seen} == {float if kind == "float" else int}


def skopt_search(objective, n_calls=8, **more):
    return search(objective, n_calls, engine="skopt", **more)


def test_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "skopt", None)
    objective = SmallObjective()
    with pytest.raises(UsageError) as caught:
        skopt_search(objective)
    assert str(caught.value) == (
        "tune --engine skopt needs scikit-optimize: pip install 'var-moe[skopt]'"
    )
    assert objective.seen == []


def test_installed_but_broken(monkeypatch, tmp_path):
    (tmp_path / "skopt.py").write_text("import numpy\nnumpy.int\n")
    monkeypatch.delitem(sys.modules, "skopt", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match="cannot be imported") as caught:
        skopt_search(SmallObjective())
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_it_searches_and_resumes_as_if_unbroken(tmp_path):
    pytest.importorskip("skopt")
    unbroken = skopt_search(SmallObjective())
    assert len({point_key(e.params) for e in unbroken.evaluations}) == 8
    assert unbroken.best_score > unbroken.evaluations[0].score
    assert all(type(e.params["n"]) is int for e in unbroken.evaluations)
    assert unbroken.extra["suggestion_seconds"] > 0
    with pytest.raises(KeyboardInterrupt):
        skopt_search(SmallObjective(stop_at=7), storage=tmp_path / LOG_NAME)
    rest = SmallObjective()
    resumed = skopt_search(rest, seed=None, storage=tmp_path / LOG_NAME, resume=True)
    assert kept(resumed) == kept(unbroken)
    assert len(rest.seen) == 2


def test_the_model_goes_where_the_score_is_high():
    pytest.importorskip("skopt")
    space = {"x": SMALL_SPACE["x"]}
    sampler = SkoptSampler(space, seed=0, total=5, n_startup=5)
    for sign in (1, -1):
        done = [Evaluation(params={"x": i / 10}, score=sign * i / 10) for i in range(2, 9)]
        point = sampler.by_model(SimpleNamespace(number=len(done), evaluations=done))
        assert point["x"] > 0.8 if sign == 1 else point["x"] < 0.2


def test_failures_and_fixed_names():
    pytest.importorskip("skopt")
    space = {**SMALL_SPACE, "n": {"type": "int", "low": 3, "high": 3, "default": 3}}
    objective = SmallObjective(fail_at=(1, 2, 6))
    result = bayesian_optimization(
        objective, space, 7, verbose=False, seed=0, engine="skopt", n_startup=3
    )
    assert result.extra["failed"] == 3
    assert {e.params["n"] for e in result.evaluations} == {3}
    assert len({e.params["x"] for e in result.evaluations}) == 7


def test_skopt_searches_a_logarithmic_scale_as_such():
    pytest.importorskip("skopt")
    for kind, low, high in (("float", 1e-6, 1.0), ("int", 1, 10**6)):
        space = {"tau": {"type": kind, "low": low, "high": high, "log": True}}
        sampler = SkoptSampler(space, seed=0, total=5, n_startup=5)
        # The best is a hundred times the lowest: on a linear scale all but one point are one.
        done = [
            Evaluation(params={"tau": low * 10**i}, score=-float((i - 2) ** 2)) for i in range(7)
        ]
        if kind == "float":
            done = [replace(e, params={"tau": float(e.params["tau"])}) for e in done]
        point = sampler.by_model(SimpleNamespace(number=len(done), evaluations=done))
        assert low * 10 < point["tau"] < low * 1000
        assert type(point["tau"]) is (float if kind == "float" else int)
