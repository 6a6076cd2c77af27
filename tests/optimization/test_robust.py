"""The worst of several data sets is what a bound is held against: the union passes, it fails."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from var_moe.config import VARConfig
from var_moe.data.documents import EncodedDocument
from var_moe.errors import UsageError
from var_moe.evaluation.evaluator import Quality
from var_moe.evaluation.perplexity import DocumentLosses, datasets_of, degradation, worst_of
from var_moe.optimization.measure_again import (
    LastMeasurement,
    NothingFitsError,
    conclude,
)
from var_moe.optimization.objective import PolicyObjective
from var_moe.optimization.results import Evaluation, OptimizationResult
from var_moe.optimization.selection import save_front
from var_moe.optimization.settings import TuneSettings
from var_moe.routing.counts import RoutingReport

BOUND = 0.01
DOCUMENTS = [EncodedDocument(str(i), "s", np.arange(3), "aaab"[i % 4]) for i in range(40)]


def quality(*, robust):
    """+0.2% on a, three quarters of the text, and +2% on b: about +0.65% together."""
    groups, tokens = datasets_of(DOCUMENTS), np.full(40, 100)
    change = np.where(np.arange(40) % 4 == 3, 0.02, 0.002)
    before = DocumentLosses(nll=2.0 * tokens, tokens=tokens)
    after = DocumentLosses(nll=(2.0 + change) * tokens, tokens=tokens)
    report = RoutingReport(
        tokens=4000, top_k=2, tier_counts=((0, 0, 4000),), executed_pairs=(6000,)
    )
    return Quality(
        change=degradation(before, after),
        report=report,
        worst=worst_of(before, after, groups) if robust else None,
    )


class Evaluator:
    """What measures: its qualities are those above."""

    def __init__(self, *, robust):
        self.robust = robust

    top_k = 2

    def quality(self, _policy, **_options):
        return quality(robust=self.robust)

    def speed(self, _policy, **_options):
        ratio = SimpleNamespace(median=1.3, low=1.2, high=1.4)
        return SimpleNamespace(
            speedup=ratio, tps=1.0, baseline_tps=1.0, to_dict=lambda: {"speedup": 1.3}
        )

    def predicted_speedup(self, _executed):
        return 1.3


class Objective(PolicyObjective):
    """A configuration is its own policy."""

    def policy(self, candidate):
        return candidate


@pytest.fixture(params=[False, True], ids=["union", "worst"])
def robust(request):
    return request.param


@pytest.fixture
def objective(robust):
    return Objective(Evaluator(robust=robust), None, "var", max_degradation=BOUND)


@pytest.fixture
def last(objective):
    last = LastMeasurement(objective.evaluator, objective, blocks=1)
    last.candidates.append(last.measure(objective.default, name="one"))
    return last


@pytest.fixture
def measured(last):
    return last.candidates[0]


def test_the_figures():
    found = quality(robust=True)
    assert found.change.value == pytest.approx(math.expm1(0.75 * 0.002 + 0.25 * 0.02))
    assert found.change.upper < BOUND
    assert found.worst.dataset == "b"
    assert found.judged.value == pytest.approx(math.expm1(0.02))


def test_a_search_sees_the_worst(objective, robust):
    found = objective.evaluate({})
    assert found.feasible is not robust
    assert found.degradation == pytest.approx(0.0202 if robust else 0.0065, abs=1e-4)
    assert (found.score < 0) is robust
    assert found.perplexity == pytest.approx(math.exp(2.0065), rel=1e-6)  # of all text


def test_who_wins_is_judged_by_the_worst(last, measured, robust):
    assert measured.passed is not robust
    assert (last.best is None) is robust
    assert last.nearest is measured
    assert (measured.speed is None) is robust
    row = measured.to_dict()
    assert row["degradation"] == pytest.approx(0.0065, abs=1e-4)
    assert ("worst_degradation" in row) is robust


def test_the_front_is_of_the_worst(measured, robust, tmp_path):
    save_front(tmp_path, [], [measured], candidate=None, max_degradation=BOUND, identity={})
    (point,) = json.loads((tmp_path / "pareto.json").read_text())["points"]
    assert point["degradation"] == pytest.approx(0.0202 if robust else 0.0065, abs=1e-4)
    assert (point["degradation_upper_95"] < BOUND) is not robust


def test_the_answer_names_the_worst(last, measured, tmp_path, robust):
    result = OptimizationResult(
        best_params=VARConfig(),
        best_score=1.0,
        optimization_time=1.0,
        evaluations=(Evaluation(params={}, score=1.0, degradation=0.002),),
        converged=False,
        method="replay",
        seed=1,
        max_degradation=BOUND,
    )
    if not robust:
        assert "worst data set" not in str(measured.to_dict())
        return
    with pytest.raises(NothingFitsError, match=r"\+2\.02% .* on the worst data set, b\)"):
        conclude(result, last, output=tmp_path, metadata={})
    assert json.loads((tmp_path / "nearest_miss.json").read_text())["worst_dataset"] == "b"
    assert "worst data set" in (tmp_path / "optimization_summary.txt").read_text()


@pytest.mark.parametrize("dataset", ["demo", "demo-kjv"])
def test_one_data_set_has_no_worst(tmp_path, dataset):
    with pytest.raises(UsageError) as caught:
        TuneSettings(output=tmp_path, dataset=dataset, robust=True)
    assert f"--robust judges the worst of several data sets, and {dataset!r} is one" in str(
        caught.value
    )
    assert TuneSettings(output=tmp_path, dataset="demo,demo-kjv", robust=True).robust
