"""Guards: calibration, files, alarms, and the false-alarm rate with the calibration's own error."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest

from var_moe.errors import UsageError
from var_moe.routing.counts import COLUMNS
from var_moe.routing.guard import Expectation, Guard
from var_moe.routing.watch import DriftWarning, Watch

POLICY = {"class": "DamagePolicy", "tau": 0.1}


def unit(dropped: float, cut: float = 0.6, tokens: int = 50) -> np.ndarray:
    """A document of two layers that the router alone decides; layer 1 drops twice as much."""
    sums = np.zeros((2, COLUMNS))
    sums[:, 2] = tokens
    sums[:, 5] = tokens * dropped * np.array([2 / 3, 4 / 3])
    sums[:, 8] = tokens * cut
    return sums


def documents(rng: np.random.Generator, number: int, mean: float = 0.15) -> list[np.ndarray]:
    return [
        unit(float(rng.normal(mean, 0.015)), float(rng.normal(0.6, 0.05))) for _ in range(number)
    ]


@pytest.fixture(scope="module")
def expectation() -> Expectation:
    return Expectation.of_units(
        documents(np.random.default_rng(1), 200),
        alpha=0.01,
        policy=POLICY,
        head={"model": {"model": "tiny"}},
    )


def played(guard: Guard, units: list[np.ndarray]) -> Watch:
    watch = Watch(guard)
    for sums in units:
        watch.judge(sums)
    return watch


def test_what_is_expected(expectation: Expectation) -> None:
    found = {row.name: row for row in expectation.statistics}
    # The tiers say nothing more than all of them, and the cuts of both layers are one series.
    assert list(found) == [
        "dropped_mass",
        "cut_share",
        "dropped_mass.layer0",
        "dropped_mass.layer1",
    ]
    assert sum(row.stake for row in found.values()) == pytest.approx(1)
    row = found["dropped_mass"]
    assert row.low < 0.15 < row.high
    assert row.high - row.low < 0.015
    assert row.mean == pytest.approx(0.15, abs=0.004)
    assert row.spread == pytest.approx(0.015, rel=0.2)
    assert found["dropped_mass.layer1"].mean == pytest.approx(0.2, abs=0.006)


def test_calm_stream(expectation: Expectation) -> None:
    guard = Guard(expectation=expectation)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch = played(guard, documents(np.random.default_rng(2), 500))
    report = watch.guard_report()
    assert (report.units, report.alarm_at, report.fallback) == (500, None, False)
    assert report.statistics[0].units == 500
    assert report.statistics[0].seen == pytest.approx(0.15, abs=0.002)


def test_the_warning_says_what_has_left_its_range(expectation: Expectation) -> None:
    drifted = documents(np.random.default_rng(3), 100, mean=0.19)
    with pytest.warns(DriftWarning) as caught:
        watch = played(Guard(expectation=expectation), drifted)
    assert len(caught) == 1  # once, though the drift goes on
    report = watch.guard_report()
    assert report.alarm_at is not None
    assert 5 < report.alarm_at < 30
    assert not watch.native
    text = str(caught[0].message)
    for part in (f"after {report.alarm_at} documents", "dropped_mass", "expected 0.1", "rate 0.01"):
        assert part in text
    assert "own routing" not in text
    assert report.worst().name.startswith("dropped_mass")


def test_fallback_ends_the_stream(expectation: Expectation) -> None:
    drifted = documents(np.random.default_rng(3), 100, mean=0.11)
    with pytest.warns(DriftWarning, match="the model's own routing decides"):
        watch = played(Guard(expectation=expectation, action="fallback"), drifted)
    report = watch.guard_report()
    assert watch.native
    assert report.fallback
    assert report.units == report.alarm_at  # nothing is judged any more


def test_report_alone_warns_of_nothing(expectation: Expectation) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch = played(
            Guard(expectation=expectation, action="report"),
            documents(np.random.default_rng(3), 60, mean=0.19),
        )
    assert watch.guard_report().alarm_at is not None
    assert not watch.native
    assert watch.guard_report().units == 60


def test_one_wild_document_is_no_drift(expectation: Expectation) -> None:
    calm = documents(np.random.default_rng(4), 50)
    watch = played(Guard(expectation=expectation), [*calm, unit(0.5, 1.0), *calm])
    assert watch.guard_report().alarm_at is None


def test_tolerance_allows_more(expectation: Expectation) -> None:
    shifted = documents(np.random.default_rng(5), 300, mean=0.165)  # one standard deviation
    strict = played(Guard(expectation=expectation, action="report"), shifted)
    lenient = played(Guard(expectation=expectation, action="report", tolerance=1.5), shifted)
    assert strict.guard_report().alarm_at is not None
    assert lenient.guard_report().alarm_at is None


def test_what_a_shared_cache_ties_together_is_reported_only() -> None:
    rng = np.random.default_rng(6)

    def cached(agreement: float) -> np.ndarray:
        sums = unit(float(rng.normal(0.15, 0.015)))
        sums[:, [1, 4, 10]] = [20, 4, 20]
        sums[:, 12] = 20 * agreement
        return sums

    def expected(*, shared: bool) -> Guard:
        units = [cached(float(rng.normal(0.9, 0.02))) for _ in range(100)]
        made = Expectation.of_units(units, alpha=0.01, policy=POLICY, shared_cache=shared)
        return Guard(expectation=made, action="report")

    drifted = [cached(0.7) for _ in range(60)]
    apart = played(expected(shared=False), drifted).guard_report()
    shared = played(expected(shared=True), drifted).guard_report()
    assert apart.alarm_at is not None
    assert apart.worst().name == "agreement.cached"
    assert shared.alarm_at is None
    seen = next(seen for seen in shared.statistics if seen.name == "agreement.cached")
    assert not seen.bet_on
    assert seen.seen is not None
    assert seen.seen < seen.low


@pytest.mark.slow
def test_false_alarms_with_the_calibrations_own_error() -> None:
    """Calibrated on 60 documents each time, then a stream of the same kind: alpha holds."""
    alpha, studies = 0.2, 150
    rng = np.random.default_rng(12)
    alarms = 0
    for _ in range(studies):
        made = Expectation.of_units(documents(rng, 60), alpha=alpha, policy=POLICY)
        watch = played(Guard(expectation=made, action="report"), documents(rng, 150))
        alarms += watch.alarm_at is not None
    assert alarms / studies <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / studies)


def test_file(expectation: Expectation, tmp_path) -> None:
    guard = Guard(expectation=expectation, action="fallback", tolerance=0.25)
    guard.save(tmp_path / "guard.json")
    assert Guard.load(tmp_path / "guard.json") == guard


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"schema_version": 1', '"schema_version": 9', "schema version 1"),
        ('"action": "warn"', '"action": "shout"', "Guard.action = 'shout'"),
        ('"tolerance": 0.0', '"tolerance": -1', "Guard.tolerance = -1"),
        ('"tolerance"', '"tolerant"', "'toleran"),
        ('"alpha": 0.01', '"alpha": 2', "alpha = 2: expected a number in (0, 0.5]"),
        ('"name": "cut_share"', '"name": "cut"', "unknown 'cut'"),
        ('"spread"', '"sprad"', "'sprad"),
        ('"layers": 2', '"layers": "two"', "layers"),
    ],
)
def test_broken_files_are_refused_in_a_line(expectation, tmp_path, old, new, said) -> None:
    path = tmp_path / "guard.json"
    Guard(expectation=expectation).save(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(UsageError) as caught:
        Guard.load(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_too_few_documents() -> None:
    with pytest.raises(
        UsageError, match=r"39 document\(s\): calibrating a guard needs at least 40"
    ):
        Expectation.of_units(documents(np.random.default_rng(1), 39), alpha=0.01, policy=POLICY)


def test_another_policy_or_model_is_refused(expectation: Expectation) -> None:
    guard = Guard(expectation=expectation)
    guard.check(POLICY, layers=2)
    with pytest.raises(UsageError, match="guard for 2 MoE layers, the model has 3"):
        guard.check(POLICY, layers=3)
    with pytest.raises(UsageError, match=r"policy tau = 0.1, but this one has 0.2"):
        guard.check({**POLICY, "tau": 0.2}, layers=2)
    with pytest.raises(UsageError, match=r"alpha"):
        replace(expectation, alpha=0.0)
