"""``var-moe analyze`` and the scripts of phases 1, 2 and 5, on a tiny random model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from var_moe.cli import main

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.mark.slow
def test_analyze_writes_its_files_and_tells_in_words(common, tmp_path, capsys):
    config = tmp_path / "var.json"
    config.write_text(json.dumps({"frequency_threshold": 1, "entropy_threshold": 5.0}))
    output = tmp_path / "phase5"
    words = ["analyze", *common, "--var_config", str(config), "--n_samples", "12", "--quick"]
    assert main([*words, "--output", str(output), "--quiet"]) == 0
    said = capsys.readouterr().out
    for part in ("Where a forward's time goes", "Scaling", "Roofline", "cost model predicts"):
        assert part in said
    systems = json.loads((output / "systems_analysis.json").read_text())
    assert systems["var"]["config"]["entropy_threshold"] == 5.0
    lengths = {row["sequence"] for row in systems["scaling"] if row["varied"] == "sequence"}
    assert lengths == {64, 128, 256}  # the tiny window
    assert (output / "profile_report.json").is_file()


@pytest.mark.slow
def test_the_scripts_run(common, tmp_path):
    output = tmp_path / "phase1"
    done = script("01_routing_analysis.py", *common, "--output", str(output), "--quiet")
    assert done.returncode == 0, done.stderr
    assert "H1, frequent tokens have lower router entropy:" in done.stdout
    found = json.loads((output / "routing_analysis.json").read_text())
    assert [row["name"] for row in found["hypotheses"]] == ["H1", "H2", "H3"]
    again = tmp_path / "again"
    done = script("01_routing_analysis.py", "--profile", str(output), "--output", str(again))
    same = json.loads((again / "routing_analysis.json").read_text())
    assert same["provenance"]["command"].endswith(f"--profile {output} --output {again}")
    assert {**same, "provenance": found["provenance"]} == found
    for place in (output, again):  # the profile's own figures are shown wherever it lies
        page = (place / "report.html").read_text()
        assert 'data-figure="coverage"' in page
        assert 'data-figure="entropy"' in page
    for name, command in (
        ("02_evaluate_var.py", "evaluate"),
        ("05_systems_analysis.py", "analyze"),
    ):
        assert command in script(name, "--help").stdout


def script(name, *words):
    return subprocess.run(
        [sys.executable, str(EXPERIMENTS / name), *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--var_config", "nowhere.json"], "nowhere.json: no such VAR configuration"),
        (["--n_samples", "1"], "max_samples = 1: expected an integer of at least 2"),
        (["--compensation", "means"], "the configuration names it; expected a folder"),
    ],
)
def test_bad_input_in_one_line(common, capsys, words, said):
    assert main(["analyze", *common, *words, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
