"""Several data sets end to end on a tiny model: evaluate, tune --robust, --validate."""

from __future__ import annotations

import json
import random

import pytest

from texts import write_data_set
from var_moe.cli import main


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two data sets as ``a,b``."""
    root, dice = tmp_path_factory.mktemp("sets"), random.Random(5)
    for name in ("one", "two"):
        sizes = {"calibration": 12, "validation": 24, "test": 10}
        write_data_set(root / name, sizes, dice, length=40)
    return f"{root / 'one'},{root / 'two'}"


@pytest.fixture(scope="module")
def common(tiny_model_folder, sets):
    return ["--model", str(tiny_model_folder), "--dataset", sets, "--quiet"]


@pytest.fixture(scope="module")
def profile(common, tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    assert main(["profile", *common, "--output", str(folder)]) == 0
    return folder


def read(path):
    return json.loads(path.read_text())


@pytest.mark.slow
def test_evaluate_shows_each_data_set_apart(common, sets, profile, tmp_path, capsys):
    words = ["evaluate", *common, "--policy", "top_p", "--set", "p=0.6", "--blocks", "1"]
    words += ["--decode_blocks", "0", "--profile", str(profile), "--output", str(tmp_path)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "top_p, each data set" in out
    result = read(tmp_path / "evaluation.json")
    assert [part["dataset"] for part in result["text"]["datasets"]] == sets.split(",")
    (row,) = [row for row in result["rows"] if row["name"] == "top_p"]
    assert [part["dataset"] for part in row["by_dataset"]] == sets.split(",")
    assert sum(part["documents"] for part in row["by_dataset"]) == row["documents"] == 48
    for part in row["by_dataset"]:
        assert {"perplexity", "degradation_upper_95", "experts_per_token"} <= set(part)


@pytest.mark.slow
def test_a_robust_search_and_its_validation(common, sets, profile, tmp_path, capsys):
    words = ["tune", *common, "--policy", "top_p", "--n_calls", "2", "--max_degradation", "5"]
    words += ["--robust", "--profile", str(profile), "--seed", "1", "--output", str(tmp_path)]
    assert main([*words, "--final_samples", "10"]) == 0
    assert "worst data set" in " ".join(capsys.readouterr().out.split())
    metadata = read(tmp_path / "optimization_metadata.json")
    assert metadata["identity"]["robust"]
    assert [part["dataset"] for part in metadata["by_dataset"]] == sets.split(",")
    assert [part["documents"] for part in metadata["by_dataset"]] == [5, 5]
    uppers = {part["dataset"]: part["degradation_upper_95"] for part in metadata["by_dataset"]}
    config = read(tmp_path / "best_config.json")
    (row,) = [row for row in metadata["remeasured"] if row["config"] == config]
    assert row["worst_degradation_upper_95"] == pytest.approx(max(uppers.values()), rel=1e-4)
    assert main(["tune", "--validate", str(tmp_path / "best_config.json"), "--quiet"]) == 0
    found = read(tmp_path / "validation_results.json")
    assert found["robust"]
    assert len(found["by_dataset"]) == 2
    assert found["worst_dataset"] in sets.split(",")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["tune", "--robust"], "--robust judges the worst of several data sets, and 'demo' is one"),
        (["tune", "--dataset", "demo,demo"], "'demo' is given twice"),
        (["tune", "--dataset", "demo,"], "expected a name, or several"),
        (["evaluate", "--dataset", "demo,demo-klingon"], "demo-klingon"),
        (["profile", "--dataset", "demo-kjv,./no.txt"], "no.txt: no such file"),
    ],
)
def test_bad_data_sets_are_refused_in_one_line(words, why, tmp_path, capsys):
    assert main([*words, "--output", str(tmp_path / "out"), "--quiet"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert why in lines[0]
    assert not (tmp_path / "out").exists()
