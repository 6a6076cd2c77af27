import sys

import pytest
from analytic import SMALL_SPACE, SmallObjective

from var_moe.errors import UsageError
from var_moe.optimization.bayesian import bayesian_optimization
from var_moe.optimization.guided import GuidedPlan
from var_moe.optimization.results import Evaluation
from var_moe.optimization.search_space import point_key


def search(objective, n_calls=8, **more):
    more = {"seed": 5, "verbose": False, "n_startup": 5, "engine": "skopt", **more}
    return bayesian_optimization(objective, SMALL_SPACE, n_calls, **more)


def kept(result):
    return [e.replace(seconds=0.0, suggestion_seconds=0.0) for e in result.evaluations]


def test_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "skopt", None)
    objective = SmallObjective()
    with pytest.raises(UsageError) as caught:
        search(objective)
    assert str(caught.value) == (
        "tune --engine skopt needs scikit-optimize: pip install 'var-moe[skopt]'"
    )
    assert objective.seen == []


def test_installed_but_broken(monkeypatch, tmp_path):
    (tmp_path / "skopt.py").write_text("import numpy\nnumpy.int\n")
    monkeypatch.delitem(sys.modules, "skopt", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match="cannot be imported") as caught:
        search(SmallObjective())
    assert "\n" not in str(caught.value)


def test_it_searches_and_resumes_as_if_unbroken(tmp_path):
    pytest.importorskip("skopt")
    unbroken = search(SmallObjective())
    assert len({point_key(e.params) for e in unbroken.evaluations}) == 8
    assert unbroken.best_score > unbroken.evaluations[0].score
    assert all(type(e.params["n"]) is int for e in unbroken.evaluations)
    assert unbroken.extra["suggestion_seconds"] > 0
    with pytest.raises(KeyboardInterrupt):
        search(SmallObjective(stop_at=7), storage_path=tmp_path)
    rest = SmallObjective()
    resumed = search(rest, seed=None, storage_path=tmp_path, resume=True)
    assert kept(resumed) == kept(unbroken)
    assert len(rest.seen) == 2
    assert (tmp_path / "trials.jsonl").exists()


def test_the_model_goes_where_the_score_is_high():
    pytest.importorskip("skopt")
    from var_moe.optimization.skopt_engine import skopt_suggest

    space = {"x": SMALL_SPACE["x"]}
    plan = GuidedPlan(space, seed=0, total=5, n_startup=5)
    for sign in (1, -1):
        done = [Evaluation(params={"x": i / 10}, score=sign * i / 10) for i in range(2, 9)]
        point = skopt_suggest(space, plan)(len(done), done)
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


def test_a_logarithmic_scale_is_searched_as_such():
    pytest.importorskip("skopt")
    from var_moe.optimization.skopt_engine import skopt_suggest

    for kind, low, high in (("float", 1e-6, 1.0), ("int", 1, 10**6)):
        space = {"tau": {"type": kind, "low": low, "high": high, "log": True}}
        plan = GuidedPlan(space, seed=0, total=5, n_startup=5)
        # The best is a hundred times the lowest: on a linear scale all but one point are one.
        done = [
            Evaluation(params={"tau": low * 10**i}, score=-float((i - 2) ** 2)) for i in range(7)
        ]
        if kind == "float":
            done = [e.replace(params={"tau": float(e.params["tau"])}) for e in done]
        point = skopt_suggest(space, plan)(len(done), done)
        assert low * 10 < point["tau"] < low * 1000
        assert type(point["tau"]) is (float if kind == "float" else int)
