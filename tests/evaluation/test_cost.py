"""The cost model: coefficients found again from timings made of them, and its file."""

from __future__ import annotations

import numpy as np
import pytest

from var_moe.errors import UsageError
from var_moe.evaluation.cost import TERMS, CostModel, Work, expected_experts, fit
from var_moe.evaluation.speed_setting import SpeedSetting
from var_moe.routing.counts import RoutingReport

TRUE = dict(zip(TERMS, (5e-3, 2e-5, 8e-6, 1e-4, 4e-3, 1e-6, 3e-7), strict=True))
LAYERS, EXPERTS, TOP_K = 5, 8, 2


def works() -> list[Work]:
    """As `fit_cost_model` times them: three sizes, with and without VAR."""
    found = []
    for tokens in (2048, 512, 32):
        for per_token, decided, cut in ((2, 0, 0), (1, 0, 0), (1.5, 0, 0), (2, 1, 0), (1, 1, 1)):
            pairs = tokens * per_token
            found.append(
                Work(
                    tokens=tokens,
                    pairs=pairs * LAYERS,
                    experts=LAYERS * float(expected_experts(EXPERTS, np.array(pairs))),
                    decided=tokens * decided,
                    cut=tokens * LAYERS * cut,
                )
            )
    return found


def seconds(work: Work) -> float:
    return float(np.dot(list(TRUE.values()), work.terms()))


@pytest.fixture
def model() -> CostModel:
    return CostModel(
        seconds=TRUE,
        baseline=0.5,
        setting=SpeedSetting(batch_size=2, sequence=50),
        layers=2,
        experts=4,
        top_k=2,
        error=0.01,
    )


def test_coefficients_are_found_again() -> None:
    found, error = fit([(work, seconds(work)) for work in works()])
    assert error < 1e-6
    for work in works():
        assert np.dot(list(found.values()), work.terms()) == pytest.approx(seconds(work), rel=1e-6)
    assert found["pair"] == pytest.approx(TRUE["pair"], rel=0.05)
    # VAR's calls are not taken for work per token, nor the other way round.
    assert found["calls"] == pytest.approx(TRUE["calls"], rel=0.05)
    assert found["policy"] == pytest.approx(TRUE["policy"], rel=0.2)


def test_the_error_is_that_of_timings_left_out() -> None:
    noisy = [(work, seconds(work) * (1.2 if n == 3 else 1.0)) for n, work in enumerate(works())]
    assert fit(noisy)[1] > 1e-4


def test_experts_that_some_pair_falls_on() -> None:
    assert expected_experts(4, np.array(2.0)) == pytest.approx(4 * (1 - 0.75**2))
    assert expected_experts(8, np.array(1e6)) == pytest.approx(8)
    assert expected_experts(8, np.array(0.0)) == 0


def test_a_speedup_by_hand(model: CostModel) -> None:
    # 200 tokens executed 300 and 400 pairs; a forward of 100 executes half of that.
    report = RoutingReport(
        tokens=200, top_k=2, tier_counts=((0, 0, 200),) * 2, executed_pairs=(300, 400)
    )
    work = model.work((300, 400), tokens=200, residual=True)
    experts = 4 * (1 - 0.75**150) + 4 * (1 - 0.75**200)
    assert work.terms() == pytest.approx([1, 100, 350, experts, 1, 100, 50])
    expected = 5e-3 + 2e-3 + 350 * 8e-6 + experts * 1e-4 + 4e-3 + 1e-4 + 50 * 3e-7
    assert model.predict(work) == pytest.approx(expected)
    assert model.speedup(report, residual=True) == pytest.approx(0.5 / expected)
    many = model.speedups(np.array([[300, 400]] * 3), tokens=200, residual=True)
    assert many == pytest.approx([0.5 / expected] * 3)
    assert sum(model.breakdown(work).values()) == pytest.approx(expected)
    assert model.speedup(report, decided=False) > model.speedup(report)


def test_round_trip_and_damage(model: CostModel) -> None:
    values = model.to_dict()
    assert CostModel.from_dict(values) == model
    del values["seconds"]["pair_s"]
    with pytest.raises(UsageError, match=r"cost.json: not a cost model .*fit it again"):
        CostModel.from_dict(values, source="cost.json")
