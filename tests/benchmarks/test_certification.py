"""The simulation of certificates, small: what it promises, and that it can tell."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.certification import simulation
from benchmarks.certification.__main__ import main
from benchmarks.certification.population import POPULATIONS, STRESS, Recorded, draw
from benchmarks.certification.simulation import BOUND, Plan

PLAN = Plan(studies=300, pages=(300,), resamples=499)


@pytest.fixture(scope="module")
def recorded():
    return Recorded.load()


@pytest.fixture(scope="module")
def found(recorded):
    return simulation.false_certifications(recorded, PLAN)


def test_recorded_pages_hold_their_sections(recorded):
    assert len(recorded.tokens) >= 300
    assert 100 < recorded.page.max() + 1 < len(recorded.tokens)
    tokens = recorded.by_page(recorded.tokens)
    assert tokens.sum() == recorded.tokens.sum()
    for name in recorded.change:
        assert recorded.residuals(name).sum() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", [*POPULATIONS, *STRESS])
def test_the_truth_of_a_population_is_what_it_says(recorded, name):
    """At the bound Z has mean zero, within four standard errors of many pages."""
    z = draw(
        recorded,
        name,
        pages=4000,
        studies=50,
        truth=BOUND,
        bound=BOUND,
        rng=np.random.default_rng(1),
    )
    assert abs(z.mean()) < 4 * z.std() / np.sqrt(z.size)


def test_a_ratio_below_the_bound_is_below_zero(recorded):
    rng = np.random.default_rng(1)
    z = draw(recorded, "verified 0.80", pages=4000, studies=50, truth=0.003, bound=BOUND, rng=rng)
    expected = (np.log(1.003) - np.log(1.01)) * recorded.by_page(recorded.tokens).mean()
    assert z.mean() == pytest.approx(expected, rel=0.03)


def test_certificates_err_as_seldom_as_they_say(found):
    for row in found:
        if not row["stress"]:
            # Of 300 studies at 5%, more than 24 are seen once in 40 times.
            assert row["fixed"]["rate"] <= 24 / 300, row
    usual = [row["fixed"]["rate"] for row in found if not row["stress"]]
    assert np.mean(usual) <= 0.05


def test_the_naive_way_and_the_tests_alone_are_seen_to_err(found):
    assert all(0.35 < row["naive"]["rate"] < 0.65 for row in found)
    by_name = {row["population"]: row for row in found}
    skewed = by_name["heavy tails, skewed (t3)"]
    assert skewed["t"]["rate"] > 0.06
    assert skewed["bootstrap"]["rate"] > 0.06


def test_the_best_of_fifty_is_seldom_what_it_seems(recorded):
    plan = Plan(studies=60, pages=(200,), resamples=199)
    (row,) = simulation.best_of_many(recorded, plan)
    assert row["naive_best"]["rate"] > 0.65
    assert row["certificate"]["rate"] <= 0.15


def test_a_good_configuration_is_certified(recorded):
    plan = Plan(studies=60, pages=(300,), resamples=199)
    rows = simulation.power(recorded, plan)
    power = {(row["population"], row["truth"]): row for row in rows}
    clear = power["verified 0.80", 0.003]
    assert clear["fixed"]["rate"] == 1.0
    narrow = power["verified 0.72", 0.008]
    assert 0.6 < narrow["fixed"]["rate"] < 1.0


@pytest.mark.slow
def test_the_command_writes_both_files(tmp_path, capsys):
    assert main(["--studies", "5", "--output", str(tmp_path)]) == 0
    saved = json.loads((tmp_path / "simulation.json").read_text())
    assert saved["studies"] == 5
    assert "## Power" in (tmp_path / "simulation.md").read_text()
    assert "Do certificates hold" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--losses", "none.csv"], "none.csv: no such table of losses"),
        (["--record"], "--record needs --profile"),
        (["--studies", "0"], "--studies 0: expected at least 1"),
    ],
)
def test_bad_words(tmp_path, capsys, words, expected):
    assert main([*words, "--output", str(tmp_path)]) == 2
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
