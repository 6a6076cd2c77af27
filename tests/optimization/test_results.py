import json
import math
from dataclasses import replace

import numpy as np
import pytest

from var_moe.config import VARConfig
from var_moe.errors import UsageError
from var_moe.optimization.results import Evaluation, OptimizationResult, save_optimization_results
from var_moe.optimization.selection import (
    best_evaluation,
    distinct_evaluations,
    has_converged,
    nearest_miss,
)
from var_moe.storage import jsonable


def scored(*scores, feasible=None):
    return [Evaluation(params={"i": i}, score=s, feasible=feasible) for i, s in enumerate(scores)]


def rich(i, speedup, degradation, *, se=0.001, measured=True, **more):
    feasible = degradation <= 0.01
    return Evaluation(
        params={"i": i},
        score=speedup if feasible else -100 * (1 + degradation),
        speedup=speedup if feasible and measured else None,
        predicted_speedup=speedup,
        degradation=degradation,
        degradation_se=se,
        feasible=feasible,
        **{"experts_per_token": 3 - speedup, **more},
    )


def failed(i):
    return Evaluation(params={"i": i}, state="failed", error="RuntimeError: no")


def result_of(evaluations, **more):
    values = {
        "best_params": VARConfig(),
        "best_score": 1.0,
        "optimization_time": 1.5,
        "evaluations": tuple(evaluations),
        "converged": False,
        "max_degradation": 0.01,
        **more,
    }
    return OptimizationResult(**values)


def test_the_winner_runs_the_fewest_experts_within_the_bound():
    lucky = replace(rich(0, 1.1, 0.001), score=1.9, speedup=1.9)  # a lucky timing does not win
    evaluations = [lucky, rich(1, 1.9, 0.02), rich(2, 1.3, 0.01), failed(3)]
    assert best_evaluation(evaluations).params == {"i": 2}
    # Of two that run equally many, the safer one; of equals the first.
    evaluations += [rich(4, 1.3, 0.009), rich(5, 1.3, 0.009)]
    assert best_evaluation(evaluations).params == {"i": 4}
    evaluations.append(rich(6, 1.3, 0.008, se=0.002))
    assert best_evaluation(evaluations).params == {"i": 4}


def test_without_experts_per_token_the_highest_score_wins():
    assert best_evaluation(scored(1.0, 3.0, 3.0)).params == {"i": 1}  # the earliest of equals
    assert best_evaluation([failed(0), rich(1, 2.0, 0.5)]) is None


def test_where_nothing_is_feasible():
    evaluations = [rich(0, 1.1, 0.3), rich(1, 1.9, 0.02), failed(2)]
    assert nearest_miss(evaluations).params == {"i": 1}
    assert nearest_miss([failed(0), *scored(1.0)]) is None


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1.0] * 10, False),  # fewer than eleven
        ([1.0] * 11, True),
        ([1.0, *[0.9] * 10], True),
        ([1.0, *[0.9] * 9, 1.0051], False),
        ([1.0, *[0.9] * 9, 1.0049], True),
        ([1.0, 1.0051, *[0.9] * 9], False),  # the gain is the first of the last ten
        ([1.0, 1.0051, *[0.9] * 10], True),  # and here it is before them
        ([-1.0, *[-2.0] * 9, -0.99], False),
        ([-1.0, *[-2.0] * 9, -0.996], True),
    ],
)
def test_converged(scores, expected):
    assert has_converged(scored(*scores)) is expected


def test_converged_looks_at_feasible_evaluations_alone():
    start = [rich(i, 1.2, 0.005) for i in range(2)]
    assert has_converged([*start, *(rich(i, 1.9, 0.02) for i in range(10))])
    assert has_converged([*start, *(failed(i) for i in range(10))])
    assert not has_converged([rich(i, 1.9, 0.02) for i in range(20)])
    # The first feasible one among the last ten is a gain.
    assert not has_converged([*(rich(i, 1.9, 0.02) for i in range(10)), rich(10, 1.1, 0.0)])


def test_distinct_evaluations_are_ordered_by_what_their_pairs_predict():
    lucky = replace(rich(0, 1.1, 0.001), speedup=1.9)  # a lucky timing does not come first
    evaluations = [lucky, rich(1, 1.4, 0.009), rich(1, 1.45, 0.009), rich(4, 1.6, 0.0119)]
    found = distinct_evaluations(evaluations)
    assert [(e.params["i"], e.predicted_speedup) for e in found] == [(4, 1.6), (1, 1.45), (0, 1.1)]


def test_evaluations_that_decided_alike_count_once():
    same = {
        "perplexity": 11.25,
        "experts_per_token": 1.5,
        "fast_pct": 1.0,
        "cached_pct": 2.0,
        "learned_pct": 97.0,
    }
    evaluations = [
        rich(0, 1.30, 0.005, **same),
        rich(1, 1.31, 0.005, **same),
        rich(2, 1.32, 0.005, **{**same, "cached_pct": 2.1}),
        rich(3, 1.20, 0.005, **{**same, "experts_per_token": 1.4}),
    ]
    # The fewest executed pairs first, whatever timings predict of them.
    assert [e.params["i"] for e in distinct_evaluations(evaluations)] == [3, 0, 2]


def test_evaluations_of_a_bare_objective_go_by_score():
    assert [e.score for e in distinct_evaluations(scored(1.0, 3.0, 2.0))] == [3.0, 2.0, 1.0]


def test_json_values():
    values = {
        "a": math.nan,
        "b": [math.inf, np.float32(0.5), np.int64(3), np.array([1.0, np.nan])],
        "c": (True, np.bool_(False), None, "x"),
    }
    assert jsonable(values) == {
        "a": None,
        "b": [None, 0.5, 3, [1.0, None]],
        "c": [True, False, None, "x"],
    }
    with pytest.raises(UsageError, match="cannot be written as JSON"):
        jsonable(object())


def test_an_evaluation_goes_through_json():
    evaluation = rich(3, 1.25, 0.004, seconds=2.5, suggestion_seconds=0.25)
    text = json.dumps(evaluation.to_dict(), allow_nan=False)
    assert Evaluation.from_dict(json.loads(text)) == evaluation
    with pytest.raises(UsageError, match="unknown field 'speedupp'"):
        Evaluation.from_dict({"params": {}, "speedupp": 1.0}, source="here")
    with pytest.raises(UsageError, match="state"):
        Evaluation(params={}, state="done")


def test_saved_files(tmp_path):
    evaluations = [rich(0, 1.2, 0.004, learned_pct=80.0, experts_per_token=1.5), failed(1)]
    evaluations.append(Evaluation(params={"i": np.int64(2)}, score=math.nan))
    config = VARConfig(cache_size=700)
    result = result_of(evaluations, best_params=config, best_score=1.2, seed=9, converged=True)
    folder = tmp_path / "new" / "folder"
    save_optimization_results(result, folder, metadata={"baseline": {"ppl": math.inf}})
    assert VARConfig.load(folder / "best_config.json") == config
    first_field = next(iter(json.loads((folder / "best_config.json").read_text())))
    assert first_field == "frequency_threshold"
    saved = json.loads((folder / "optimization_results.json").read_text())
    assert (saved["best_score"], saved["optimization_time"]) == (1.2, 1.5)
    assert (saved["num_evaluations"], saved["converged"], saved["schema_version"]) == (3, True, 1)
    assert "versions" in saved["provenance"]
    first, second, third = saved["all_results"]
    assert (first["params"], first["score"], first["state"]) == ({"i": 0}, 1.2, "complete")
    assert (first["degradation"], first["speedup"]) == (0.004, 1.2)
    assert (first["learned_pct"], first["experts_per_token"]) == (80.0, 1.5)
    assert (second["score"], second["state"], second["error"]) == (
        None,
        "failed",
        "RuntimeError: no",
    )
    assert (third["params"], third["score"]) == ({"i": 2}, None)
    metadata = json.loads((folder / "optimization_metadata.json").read_text())
    assert metadata["baseline"] == {"ppl": None}
    assert metadata["seed"] == 9
    assert "cache_size = 700" in (folder / "optimization_summary.txt").read_text()
    assert sorted(p.name for p in folder.iterdir()) == [
        "best_config.json",
        "optimization_metadata.json",
        "optimization_results.json",
        "optimization_summary.txt",
    ]


def test_saving_a_miss_and_then_a_hit(tmp_path):
    miss = rich(0, 1.9, 0.02).to_dict()
    missed = result_of([rich(0, 1.9, 0.02)], best_score=math.nan, extra={"nearest_miss": miss})
    save_optimization_results(missed, tmp_path)
    assert json.loads((tmp_path / "nearest_miss.json").read_text())["degradation"] == 0.02
    assert json.loads((tmp_path / "optimization_results.json").read_text())["best_score"] is None
    assert not (tmp_path / "best_config.json").exists()
    assert "2.00%" in (tmp_path / "optimization_summary.txt").read_text()
    save_optimization_results(result_of(scored(1.0)), tmp_path, summary="all well\n")
    assert not (tmp_path / "nearest_miss.json").exists()
    assert (tmp_path / "best_config.json").is_file()
    assert (tmp_path / "optimization_summary.txt").read_text() == "all well\n"


def test_saving_plain_parameters_and_into_a_file(tmp_path):
    save_optimization_results(result_of(scored(1.0), best_params={"x": 0.5}), tmp_path)
    assert json.loads((tmp_path / "best_config.json").read_text()) == {"x": 0.5}
    with pytest.raises(UsageError, match="is a file"):
        save_optimization_results(result_of(scored(1.0)), tmp_path / "best_config.json")
