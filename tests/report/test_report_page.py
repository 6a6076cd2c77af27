"""The page: what it holds, what it leaves out, and that nothing in it can break it."""

from __future__ import annotations

import json
import re

import pytest

from var_moe.errors import UsageError
from var_moe.report.blocks import figure_json, render
from var_moe.report.page import build_report, write_report

ALL = ["certificate", "held-out", "search", "layers", "speed", "routing", "origin"]


def names(folder):
    return [section.name for section in build_report(folder).sections]


def test_a_whole_results_folder_gives_every_section(with_profile):
    assert names(with_profile) == ALL


@pytest.mark.parametrize(
    ("file", "section"),
    [
        ("certificate.json", "certificate"),
        ("validation_results.json", "held-out"),
        ("cost_model.json", "speed"),
        ("profile/routing_stats.parquet", "routing"),
    ],
)
def test_what_is_missing_is_left_out(with_profile, file, section):
    (with_profile / file).unlink()
    assert names(with_profile) == [name for name in ALL if name != section]


def test_a_missing_front_leaves_the_rest_of_its_figure(sample):
    (sample / "pareto.json").unlink()
    figure = next(p for p in build_report(sample).pictures if p.name == "speedup-degradation")
    assert "front, forecast" not in [trace.name for trace in figure.figure.data]
    assert "certified" in [trace.name for trace in figure.figure.data]


@pytest.mark.parametrize(
    "files",
    [
        ["evaluation"],
        ["comparison"],
        ["stability"],
        ["systems_analysis"],
        ["systems_analysis", "profile_report"],
        ["routing_analysis"],
    ],
)
def test_every_command_has_a_report(alone, files):
    report = build_report(alone(*files))
    assert report.headline.answers
    assert len(report.sections) == 2  # its own, and where it comes from


def test_policies_have_a_figure_for_each_compensation(alone):
    folder = alone("comparison")
    rows = json.loads((folder / "comparison.json").read_text())["rows"]
    figures = [p for p in build_report(folder).pictures if p.name.startswith("policies-experts")]
    kinds = {row["compensation"] for row in rows}
    assert {p.name.removeprefix("policies-experts-") for p in figures} == kinds
    assert len({tuple(p.figure.layout.yaxis.range) for p in figures}) == 1
    drawn = sum(len(trace.x) for p in figures for trace in p.figure.data if trace.mode != "text")
    assert drawn == len(rows)


def test_tiers_are_shown_where_there_are_any(change, sample):
    def headings():
        return next(
            block.headings
            for part in build_report(sample).sections
            for block in part.blocks
            if getattr(block, "title", "").startswith("Measured on text")
        )

    assert "fast / cached / learned, %" not in headings()
    rows = json.loads((sample / "optimization_metadata.json").read_text())["remeasured"]
    change("optimization_metadata", remeasured=[{**rows[0], "learned_pct": 60.0}, *rows[1:]])
    assert "fast / cached / learned, %" in headings()


def test_a_profile_alone_has_a_report(with_profile):
    assert names(with_profile / "profile") == ["routing", "origin"]


def test_a_profile_of_another_hash_is_not_shown(with_profile):
    path = with_profile / "profile" / "profile.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hash": "other"}))
    assert "routing" not in names(with_profile)


def test_what_an_earlier_search_left_is_named_and_not_shown(change, sample):
    """Another model or text was searched in the folder since."""
    known = json.loads((sample / "optimization_metadata.json").read_text())
    change("optimization_metadata", identity={**known["identity"], "profile_hash": "x"})
    report = build_report(sample)
    assert not {"certificate", "held-out"} & set(names(sample))
    (left_out,) = (section for section in report.sections if section.name == "left-out")
    assert "certificate.json: of another profile" in str(left_out)
    assert "validation_results.json: of another profile" in str(left_out)
    assert "With 95% confidence" not in str(report.headline)


def test_nothing_is_taken_from_a_network(with_profile):
    page = write_report(with_profile).read_text(encoding="utf-8")
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.S)  # plotly names sites inside
    named = re.findall(r"""(?:src|href)\s*=\s*["']?([^\s"'>]+)""", outside)
    assert [one for one in named if not one.startswith(("#", "data:"))] == []
    assert not re.findall(r"@import|url\(", outside)
    assert page.count("<script>") == 2


def test_every_figure_is_placed_once_and_has_its_data(with_profile):
    page = write_report(with_profile).read_text(encoding="utf-8")
    placed = re.findall(r'data-figure="([^"]+)"', page)
    data = re.findall(r'<script type="application/json" id="figure-([^"]+)">(.+)</script>', page)
    assert len(placed) == len(set(placed)) == len(data) == 7
    assert sorted(placed) == sorted(name for name, _ in data)
    for _, text in data:
        assert json.loads(text)["data"]


def test_names_from_outside_cannot_break_out(change):
    folder = change("best_config", note="")
    evil = "</script><img src=x onerror=alert(1)>"
    path = folder / "optimization_metadata.json"
    metadata = json.loads(path.read_text())
    metadata["identity"]["model"] = evil
    metadata["remeasured"][0]["name"] = evil
    metadata["notes"] = [evil]
    path.write_text(json.dumps(metadata))
    page = render(build_report(folder))
    assert evil not in page
    assert "<img src=x" not in page
    assert "&lt;/script&gt;" in page


def test_figures_survive_as_json(sample):
    for picture in build_report(sample).pictures:
        text = figure_json(picture)
        assert "</" not in text
        assert json.loads(text)["layout"]["height"] > 0


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(UsageError, match="nothing to report"):
        build_report(tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        build_report(tmp_path / "nowhere")


def test_a_part_without_what_it_belongs_to_is_refused(sample):
    (sample / "optimization_metadata.json").unlink()
    with pytest.raises(UsageError, match=r"optimization_metadata\.json is missing"):
        build_report(sample)


def test_a_failed_report_leaves_the_old_one(sample):
    path = write_report(sample)
    before = path.read_bytes()
    (sample / "pareto.json").write_text("{")
    with pytest.raises(UsageError):
        write_report(sample)
    assert path.read_bytes() == before
    assert [one.name for one in sample.glob(".report*")] == []


REFUSED = {"certified": False, "tests": [], "claims": [], "by_dataset": []}


@pytest.fixture
def without_answer(sample, change):
    """A search and a certification that both ended with nothing."""
    certificate = json.loads((sample / "certificate.json").read_text())
    gone = ("certified_config", "certified_name")
    certificate = {k: v for k, v in certificate.items() if k not in gone} | REFUSED
    (sample / "certificate.json").write_text(json.dumps(certificate))
    metadata = json.loads((sample / "optimization_metadata.json").read_text())
    search = {**metadata["search"], "nearest_miss": {"config": {"policy": "damage"}}}
    rows = [{**row, "passed": False, "speedup": None} for row in metadata["remeasured"]]
    change("optimization_metadata", answer="All violate it.", search=search, remeasured=rows)
    for name in ("best_config", "validation_results"):
        (sample / f"{name}.json").unlink()
    return change("optimization_results", best_params=None)


def test_a_search_and_a_certification_with_nothing_have_a_report(without_answer):
    top = build_report(without_answer).headline
    assert [answer.tone for answer in top.answers] == ["bad", "bad"]
    assert top.configuration == {"policy": "damage"}
    (without_answer / "certificate.json").unlink()
    assert len(build_report(without_answer).headline.answers) == 1


def test_a_refused_certificate_alone_has_a_report(without_answer):
    for name in ("optimization_results", "optimization_metadata", "pareto"):
        (without_answer / f"{name}.json").unlink()
    assert build_report(without_answer).sections[0].name == "certificate"


@pytest.mark.parametrize("best", [{"x": 1.0}, None])
def test_a_search_that_a_program_saved_has_a_report(best, tmp_path):
    from var_moe.optimization.results import OptimizationResult, save_optimization_results

    result = OptimizationResult(
        best_params=best or {"x": 2.0},
        best_score=0.5,
        evaluations=(),
        optimization_time=1.0,
        converged=False,
        method="random",
        seed=3,
        extra={} if best else {"nearest_miss": {"degradation": 0.5}},
    )
    save_optimization_results(result, tmp_path)
    top = build_report(tmp_path).headline
    assert top.configuration == best
    assert ("0.5" in top.answers[0].sentence) == bool(best)


def test_another_bounds_answer_has_a_report(sample):
    metadata = json.loads((sample / "optimization_metadata.json").read_text())
    for path in sample.glob("*.json"):
        path.unlink()
    metadata |= {"answer": "Fastest verified configuration: 1.2x", "answered_from": "there"}
    (sample / "optimization_metadata.json").write_text(json.dumps(metadata))
    assert build_report(sample).headline.answers[0].sentence == metadata["answer"]


def test_a_guard_has_a_report(tmp_path):
    rows = [
        {"text": name, "documents": 50, "alarm_at": at} for name, at in (("own", None), ("kjv", 7))
    ]
    (tmp_path / "guard_check.json").write_text(json.dumps({"schema_version": 1, "checks": rows}))
    report = build_report(tmp_path)
    assert report.headline.answers[0].sentence == "own: no alarm; kjv: alarm."
    assert [one.name for one in report.sections] == ["guard", "origin"]


@pytest.mark.parametrize(
    ("file", "text", "line"),
    [
        ("certificate.json", '{"schema_version": 1', "certificate.json: not valid JSON"),
        ("certificate.json", '{"schema_version": 9}', "certificate.json: schema_version 9"),
        ("pareto.json", "[]", "pareto.json: expected an object"),
        (
            "certificate.json",
            '{"schema_version": 1}',
            "certificate.json: not as this version of var_moe writes it ('certified' is missing)",
        ),
        ("cost_model.json", "{}", "cost_model.json: not a cost model ('seconds')"),
        (
            "pareto.json",
            '{"schema_version": 1, "points": 3}',
            "pareto.json: not as this version of var_moe writes it ('int' object is not",
        ),
        ("profile/profile.json", "[]", "profile.json: expected an object"),
        ("profile/routing_stats.parquet", "PAR1", "routing_stats.parquet: not a table of a"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong_in_it(with_profile, file, text, line):
    (with_profile / file).write_text(text)
    with pytest.raises(UsageError) as found:
        build_report(with_profile)
    assert line in str(found.value)
    assert "\n" not in str(found.value)
