"""The page: what it holds, what it leaves out, and that nothing in it can break it."""

from __future__ import annotations

import json
import re

import pytest

from var_moe.errors import UsageError
from var_moe.report.page import build_report, figure_json, render, write_report

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


def test_winners_that_are_one_need_no_figure(alone):
    folder = alone("stability")
    path = folder / "stability.json"
    found = json.loads(path.read_text())
    for run in found["runs"]:
        run["experts_per_token"] = 1.5
    path.write_text(json.dumps(found))
    assert [p.name for p in build_report(folder).pictures] == ["seeds-speeds"]


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
    assert len(placed) == len(set(placed)) == len(data) >= 8
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


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("pareto.json", "{", "pareto.json: not valid JSON"),
        ("pareto.json", "[]", "pareto.json: expected an object"),
        ("certificate.json", '{"schema_version": 9}', "certificate.json: schema_version 9"),
        ("certificate.json", '{"schema_version": 1}', "not as this version of var_moe writes it"),
    ],
)
def test_a_broken_file_is_named(sample, file, text, message):
    (sample / file).write_text(text)
    with pytest.raises(UsageError, match=message):
        build_report(sample)


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
