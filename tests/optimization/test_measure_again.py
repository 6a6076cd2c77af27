"""Which evaluations are measured again, and who wins, on figures made by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from var_moe.optimization import measure_again as room
from var_moe.optimization.candidate import Candidate
from var_moe.optimization.results import Evaluation

BOUND = 0.01


def evaluation(number, pace, degradation, *, se=0.001):
    return Evaluation(
        params={"frequency_threshold": number},
        score=pace,
        predicted_speedup=pace,
        experts_per_token=3 - pace,
        degradation=degradation,
        degradation_se=se,
        feasible=degradation <= BOUND,
    )


def best_of(*measured):
    last = room.LastMeasurement(None, None, blocks=1)
    last.candidates.extend(measured)
    return last.best


@pytest.fixture
def run(monkeypatch):
    """Measures again where the new text costs `shift` more than the search's; names tried."""

    def start(evaluations, *, shift, at_most=8, closer=None):
        truth = {e.params["frequency_threshold"]: e for e in evaluations}
        tried = []

        def measure(self, config, *, name):
            number = config.settings["frequency_threshold"]
            tried.append(number)
            value = truth[number].degradation + shift
            change = SimpleNamespace(value=value, upper=value + 0.001)
            passed = change.upper < BOUND
            pace = truth[number].predicted_speedup
            speed = SimpleNamespace(speedup=SimpleNamespace(median=pace)) if passed else None
            return room.Remeasured(
                name=name,
                config=config,
                quality=SimpleNamespace(
                    judged=change,
                    report=SimpleNamespace(learned_pct=90, experts_per_token=3 - pace),
                ),
                speed=speed,
                max_degradation=BOUND,
            )

        monkeypatch.setattr(room.LastMeasurement, "measure", measure)
        objective = SimpleNamespace(
            max_degradation=BOUND,
            candidate=lambda params: Candidate(policy="var", settings=params),
        )
        last = room.LastMeasurement(None, objective, blocks=1)
        last.measure_search(evaluations, at_most=at_most, closer=closer)
        return tried, last.best

    return start


LINE = [evaluation(n, 1.0 + n / 100, 0.001 * n) for n in range(1, 15)]
"""The faster, the worse: number n costs n tenths of a percent."""


def test_the_fastest_that_is_likely_to_pass_comes_first(run):
    tried, best = run(LINE, shift=0.0)
    # 8 + 1.645 standard errors is the last below 10 tenths; by its measurement, nothing faster is.
    assert tried == [8]
    assert best.config.settings["frequency_threshold"] == 8


def test_kinder_text_lets_a_near_miss_win(run):
    tried, best = run(LINE, shift=-0.004)
    assert tried[0] == 8
    assert best.config.settings["frequency_threshold"] == 12  # 1.2 - 0.4 + 0.1 is below 1
    assert best.config.settings["frequency_threshold"] == max(tried)


def test_harsher_text_leads_down_to_a_safe_one(run):
    tried, best = run(LINE, shift=0.005)
    assert tried == [8, 3]  # learned from the first: 0.6 above what the search saw
    assert best.config.settings["frequency_threshold"] == 3


def test_where_nothing_passes_the_calmest_is_measured_last(run):
    tried, best = run(LINE, shift=0.02)
    assert best is None
    assert tried[-1] == 1


def test_no_more_than_asked_but_for_the_calmest(run):
    tried, best = run(LINE, shift=0.02, at_most=1)
    assert best is None
    assert tried == [8, 1]


@pytest.mark.parametrize(("upper", "passes"), [(0.0099, True), (BOUND, False), (0.02, False)])
def test_the_bound_itself_is_not_below_the_bound(upper, passes):
    measured = room.Remeasured(
        name="one",
        config=Candidate(policy="var"),
        quality=SimpleNamespace(
            judged=SimpleNamespace(value=0.005, upper=upper),
            report=SimpleNamespace(learned_pct=5, experts_per_token=1.5),
        ),
        speed=SimpleNamespace(speedup=SimpleNamespace(median=1.25)),
        max_degradation=BOUND,
    )
    assert measured.passed is passes
    assert measured.score == pytest.approx(1.35 if passes else -100 * (1 + upper))
    assert (best_of(measured) is not None) is passes


def test_a_lucky_timing_does_not_win():
    def measured(executed, pace):
        change = SimpleNamespace(value=0.005, upper=0.008)
        report = SimpleNamespace(learned_pct=90, experts_per_token=executed)
        return room.Remeasured(
            name=str(executed),
            config=Candidate(policy="var"),
            quality=SimpleNamespace(judged=change, report=report),
            speed=SimpleNamespace(speedup=SimpleNamespace(median=pace)),
            max_degradation=BOUND,
        )

    assert best_of(measured(1.6, 1.4), measured(1.5, 1.2)).name == "1.5"


def test_measurements_that_are_left_go_where_the_forecasts_point(run):
    seen = []

    def closer(measured):
        seen.append([(point["frequency_threshold"], upper) for point, upper in measured])
        return {"frequency_threshold": 8 + len(seen)} if len(seen) <= 2 else None

    tried, best = run(LINE, shift=-0.0015, closer=closer)
    known = len(tried) - 2
    assert tried[known:] == [9, 10]
    assert [len(one) for one in seen] == [known, known + 1, known + 2]
    assert seen[0][0] == (8, pytest.approx(0.008 - 0.0015 + 0.001))
    assert best.config.settings["frequency_threshold"] == 10


def test_proposals_end_with_the_measurements(run):
    tried, _ = run(LINE, shift=0.0, at_most=3, closer=lambda _: {"frequency_threshold": 5})
    assert len(tried) == 3


def test_of_equally_many_pairs_the_compensation_that_costs_less_wins(monkeypatch):
    """And what one compensation costs more on new text is not held against another."""

    def point(tau, name, degradation):
        return Evaluation(
            params={"tau": tau, "compensation": name},
            score=1.0,
            degradation=degradation,
            degradation_se=0.001,
            experts_per_token=2 - tau,
        )

    found = [point(1.0, "means", 0.004), point(1.0, "none", 0.0), point(0.9, "means", 0.001)]

    def measure(self, config, *, name):
        value = 0.0 if config.compensation == "none" else 0.02
        return room.Remeasured(
            name=name,
            config=config,
            quality=SimpleNamespace(
                judged=SimpleNamespace(value=value, upper=value),
                report=SimpleNamespace(
                    learned_pct=100, experts_per_token=2 - config.settings["tau"]
                ),
            ),
            speed=SimpleNamespace(speedup=SimpleNamespace(median=1.5)) if value < BOUND else None,
            max_degradation=BOUND,
        )

    monkeypatch.setattr(room.LastMeasurement, "measure", measure)

    def config(params):
        settings = {"tau": params["tau"]}
        return Candidate(policy="damage", settings=settings, compensation=params["compensation"])

    objective = SimpleNamespace(max_degradation=BOUND, candidate=config)
    seen = []

    def closer(measured):
        seen.append([*measured])

    last = room.LastMeasurement(None, objective, blocks=1)
    last.measure_search(found, at_most=8, closer=closer)
    assert [one.config.compensation for one in last.measured] == ["none"]
    assert seen == [[({"tau": 1.0, "compensation": "none"}, 0.0)]]
    last = room.LastMeasurement(None, objective, blocks=1)
    last.measure_search([found[0], found[2], found[1]], at_most=8)
    assert last.best.config.compensation == "none"
