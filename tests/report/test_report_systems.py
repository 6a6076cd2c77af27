"""The systems analysis and the hypotheses: the page says what the files say."""

from __future__ import annotations

import json

import pytest

from var_moe.errors import UsageError
from var_moe.report.folder import read_results
from var_moe.report.headline import BAD, GOOD, headline
from var_moe.report.routing import coverage_figure, hypotheses_section
from var_moe.report.systems import (
    components_figure,
    roofline_table,
    scaling_figure,
    systems_section,
)


@pytest.fixture
def place(alone):
    return alone("systems_analysis", "profile_report")


@pytest.fixture
def found(place):
    return json.loads((place / "systems_analysis.json").read_text())


def rewrite(place, found):
    (place / "systems_analysis.json").write_text(json.dumps(found))
    return read_results(place)


def table(section, title):
    return next(block for block in section.blocks if getattr(block, "title", "") == title)


def test_parts_of_a_forward_add_up_to_what_was_measured(place):
    parts = json.loads((place / "profile_report.json").read_text())
    figure = components_figure(parts).figure
    for arm, at in (("baseline", 0), ("var", 1)):
        drawn = sum(trace.x[at] for trace in figure.data)
        assert drawn == pytest.approx(parts[arm]["forward"]["mean_ms"], rel=0.02)


def test_scaling_has_a_line_for_what_was_varied(found):
    lines = {trace.name: trace for trace in scaling_figure(found).figure.data}
    assert list(lines["sequence varied"].x) == [512, 1024, 2048, 4096]
    assert list(lines["batch size varied"].text) == ["1 x 256", "2 x 256", "4 x 256", "8 x 256"]
    row = found["scaling"][0]
    assert lines["sequence varied"].y[0] == row["speedup"]
    assert lines["sequence varied"].error_y.array[0] == row["speedup_95"][1] - row["speedup"]


def test_the_roofline_says_what_is_reached_and_what_bounds(found):
    made = roofline_table(found)
    rows = {row[0]: dict(zip(made.headings, row, strict=True)) for row in made.rows}
    roof = found["roofline"]["var"]
    reached = f"{roof['achieved_flops_per_second'] / 1e9:,.1f} ({roof['share_of_gemm']:.0%})"
    assert rows["VAR"]["GFLOP/s (of a matrix product)"] == reached
    assert rows["VAR"]["bound by"] == roof["bound"]
    assert rows["unmodified"]["ms"] == f"{found['baseline']['avg_time_ms']:.1f}"


def test_bottlenecks_are_named_with_what_to_do(place, found):
    found["bottlenecks"] = [
        {"name": "slowdown", "severity": "high", "evidence": "0.8x", "recommendation": "stop"}
    ]
    rows = table(systems_section(rewrite(place, found)), "What bounds it").rows
    assert rows == [("high", "slowdown", "0.8x", "stop")]


def test_what_does_no_harm_is_no_bottleneck_at_the_top(place, found):
    names = {row["severity"]: row["name"] for row in found["bottlenecks"]}
    sentence = headline(rewrite(place, found)).answers[0].sentence
    assert names["medium"].replace("_", " ") in sentence
    assert names["info"].replace("_", " ") not in sentence


def test_without_bottlenecks_the_page_says_so(place, found):
    found["bottlenecks"] = []
    results = rewrite(place, found)
    titles = [getattr(block, "title", "") for block in systems_section(results).blocks]
    assert "What bounds it" not in titles
    assert headline(results).answers[0].sentence.endswith("No bottleneck was found.")


@pytest.mark.parametrize(("low", "tone"), [(1.01, GOOD), (0.99, BAD)])
def test_a_speedup_is_good_news_when_its_interval_is(place, found, low, tone):
    found["comparison"]["actual_speedup_95"][0] = low
    assert headline(rewrite(place, found)).answers[0].tone == tone


def test_parts_without_an_analysis_are_refused(alone):
    with pytest.raises(UsageError, match="nothing to report"):
        read_results(alone("profile_report"))


def test_hypotheses_keep_their_verdicts_and_the_default_stands_on_its_line(alone):
    place = alone("routing_analysis")
    found = json.loads((place / "routing_analysis.json").read_text())
    rows = table(hypotheses_section(read_results(place)), "Hypotheses").rows
    assert [(row[0], row[-1]) for row in rows] == [
        (one["name"], one["verdict"]) for one in found["hypotheses"]
    ]
    *lines, default = coverage_figure(found).figure.data
    line = next(one for one in lines if one.name == "frequency_threshold 50")
    assert default.y[0] == pytest.approx(line.y[list(line.x).index(0.5)])
