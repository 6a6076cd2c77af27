"""``var-moe report``."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from var_moe.cli import main

SAMPLE = Path(__file__).parents[1] / "report" / "sample"


@pytest.fixture
def results(tmp_path):
    return Path(shutil.copytree(SAMPLE, tmp_path / "results"))


def test_the_page_goes_into_the_folder(results, capsys):
    assert main(["report", str(results)]) == 0
    assert capsys.readouterr().out == f"Report: {results / 'report.html'}\n"
    assert "fastest configuration" in (results / "report.html").read_text(encoding="utf-8")


def test_without_plotly_the_command_says_what_to_install(results, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly", None)
    assert main(["report", str(results)]) == 2
    assert capsys.readouterr().err == (
        "error: a report needs plotly: pip install 'var-moe[report]'\n"
    )
    assert not (results / "report.html").exists()


@pytest.mark.slow
def test_without_plotly_a_search_ends_with_a_note(common, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly", None)
    words = ["--policy", "top_p", "--n_calls", "1", "--max_degradation", "5", "--quiet"]
    words += ["--max_samples", "4", "--final_samples", "4", "--output", str(tmp_path)]
    assert main(["tune", *common, *words]) == 0
    (note,) = [line for line in capsys.readouterr().err.splitlines() if "plotly" in line]
    assert note.startswith("Note: no report was made (")
    assert "pip install 'var-moe[report]'" in note
    assert (tmp_path / "best_config.json").is_file()


def test_the_page_goes_where_it_is_told(results, tmp_path):
    assert main(["report", str(results), "--output", str(tmp_path / "mine.html")]) == 0
    assert (tmp_path / "mine.html").is_file()
    assert not (results / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: no such folder"),
        ([str(SAMPLE.parent)], "nothing to report"),
        ([str(SAMPLE), "--figures", "bmp", "--output", "{tmp}/x.html"], "figure format 'bmp'"),
    ],
)
def test_bad_input_gets_one_line(words, message, tmp_path, capsys):
    assert main(["report", *(word.format(tmp=tmp_path) for word in words)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_json_names_the_files(results, capsys):
    assert main(["report", str(results), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["report"], found["figures"]) == (str(results / "report.html"), [])


def test_its_options_can_be_fed_in_again(results, tmp_path, capsys):
    assert main(["report", str(results), "--show-config"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert main(["report", "--options", str(tmp_path / "mine.yaml")]) == 0
    assert (results / "report.html").is_file()
