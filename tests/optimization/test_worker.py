import math
from dataclasses import replace

import numpy as np
import pytest
from analytic import SmallObjective, rich_evaluation

from var_moe.errors import UsageError
from var_moe.optimization.results import Evaluation, documented_score
from var_moe.optimization.worker import bound_of, run_evaluation


@pytest.mark.parametrize(
    ("degradation", "speedup", "learned_pct", "score"),
    [
        (0.01, 1.3, 80.0, 1.3),  # at the bound is within it
        (0.005, 1.3, 10.0, 1.35),
        (0.005, 1.3, 15.0, 1.3),
        (-0.002, 1.0, 0.0, 1.15),
        (0.0101, 1.9, 5.0, -101.01),
        (0.5, None, 5.0, -150.0),
    ],
)
def test_the_documented_score(degradation, speedup, learned_pct, score):
    found = documented_score(
        degradation=degradation, max_degradation=0.01, speedup=speedup, learned_pct=learned_pct
    )
    assert found == pytest.approx(score)


def test_a_bare_callable():
    evaluation = run_evaluation(lambda p: np.float32(p["x"]), {"x": 0.5})
    assert (evaluation.score, evaluation.state, evaluation.feasible) == (0.5, "complete", None)
    assert type(evaluation.score) is float
    assert evaluation.seconds > 0
    assert bound_of(lambda p: 1.0) is None


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        (lambda p: math.nan, "nan, which is not finite"),
        (lambda p: -math.inf, "-inf, which is not finite"),
        (lambda p: None, "returned None"),
        (lambda p: "fast", "ValueError"),
        (lambda p: p["y"], "KeyError: 'y'"),
    ],
)
def test_a_failing_bare_callable(objective, says):
    evaluation = run_evaluation(objective, {"x": 0.5})
    assert (evaluation.state, evaluation.score) == ("failed", None)
    assert says in evaluation.error


def test_an_error_is_one_line():
    evaluation = run_evaluation(SmallObjective(fail_at=(1,)), {"x": 0.1, "n": 1})
    assert evaluation.error == "RuntimeError: out of memory"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interruption_passes_through(stop):
    with pytest.raises(stop):
        run_evaluation(SmallObjective(stop_at=1, stop=stop), {"x": 0.1, "n": 1})


def test_the_objective_cannot_change_the_point():
    def objective(params):
        params["x"] = 9.0
        return 1.0

    assert run_evaluation(objective, {"x": 0.5}).params == {"x": 0.5}


def test_a_rich_objective_is_used_through_evaluate():
    evaluation = run_evaluation(SmallObjective(), {"x": 0.4, "n": 0})
    assert (evaluation.feasible, evaluation.speedup) == (True, 1.4)
    over = run_evaluation(SmallObjective(), {"x": 0.6, "n": 0})
    assert (over.feasible, over.speedup, over.predicted_speedup) == (False, None, 1.6)
    assert bound_of(SmallObjective()) == 0.01


@pytest.mark.parametrize(
    "changes",
    [
        {"score": math.nan},
        {"score": None},
        {"degradation": math.inf},
        {"degradation": math.nan},
        {"degradation": None},
        {"speedup": None},
        {"speedup": math.nan},
        {"state": "failed"},
    ],
)
def test_a_rich_evaluation_without_what_the_search_needs_has_failed(changes):
    class Broken(SmallObjective):
        def evaluate(self, params):
            good = rich_evaluation(params, degradation=0.001, speedup=1.2, bound=0.01)
            return replace(good, **changes)

    evaluation = run_evaluation(Broken(), {"x": 0.5})
    assert (evaluation.state, evaluation.score) == ("failed", None)
    assert evaluation.error


def test_the_bound_decides_what_is_feasible():
    class Hopeful(SmallObjective):
        def evaluate(self, params):
            return Evaluation(params=params, score=-102.0, degradation=0.02, feasible=True)

    assert run_evaluation(Hopeful(), {"x": 0.5}).feasible is False


@pytest.mark.parametrize("bound", [-0.01, math.nan])
def test_a_senseless_bound_is_refused(bound):
    class Negative(SmallObjective):
        max_degradation = bound

    with pytest.raises(UsageError, match="max_degradation"):
        bound_of(Negative())
    with pytest.raises(UsageError, match="expected a callable"):
        bound_of("objective")
