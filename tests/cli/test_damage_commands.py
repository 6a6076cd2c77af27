"""Damage-aware skipping end to end on a tiny random model: the default of ``tune``."""

from __future__ import annotations

import json

import pytest

from var_moe.cli import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tuned(common, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "phase3"
    words = ["tune", *common, "--n_calls", "5", "--max_degradation", "0.5", "--seed", "3"]
    assert main([*words, "--output", str(folder), "--quiet"]) == 0
    return folder


@pytest.fixture(scope="module")
def learned(common, tuned, tmp_path_factory):
    """The folder of a compensation that was fitted for a moment."""
    place = tmp_path_factory.mktemp("learned") / "compensation"
    words = ["fit-compensation", *common, "--profile", str(tuned / "profile")]
    words += ["--regress_tokens", "40000", "--tokens", "2000", "--damage_tokens", "3000"]
    assert main([*words, "--output", str(place), "--quiet"]) == 0
    return place


def read(path):
    return json.loads(path.read_text())


def test_tune_chooses_a_tau(tuned):
    config = read(tuned / "best_config.json")
    assert config["policy"] == "damage"
    assert config["compensation"] in ("none", "means")  # what costs less on this random model
    assert 1e-7 <= config["settings"]["tau"] <= 1
    metadata = read(tuned / "optimization_metadata.json")
    assert metadata["identity"]["compensation_hash"]
    assert (tuned / "profile" / "damage.safetensors").is_file()
    assert not (tuned / "profile" / "damage_pass").exists()
    assert read(tuned / "pareto.json")["points"]


def test_what_was_tuned_is_validated(tuned, capsys):
    words = ["tune", "--validate", str(tuned / "best_config.json"), "--max_samples", "8"]
    assert main([*words, "--quiet"]) == 0
    found = read(tuned / "validation_results.json")
    assert found["config"]["policy"] == "damage"
    assert found["experts_per_token"] < 2
    capsys.readouterr()


def test_a_fitted_compensation_serves_tune_and_evaluate(common, tuned, learned, tmp_path):
    words = ["tune", *common, "--compensation", str(learned), "--n_calls", "3", "--quiet"]
    words += ["--profile", str(tuned / "profile"), "--max_degradation", "0.5", "--seed", "1"]
    assert main([*words, "--output", str(tmp_path)]) == 0
    assert read(tmp_path / "best_config.json")["compensation"] == "learned"
    # Not the profile's own, so that it must be named again.
    words = ["tune", "--validate", str(tmp_path / "best_config.json"), "--max_samples", "8"]
    words += ["--profile", str(tuned / "profile"), "--quiet"]
    assert main(words) == 2
    assert main([*words, "--compensation", str(learned)]) == 0
    words = ["evaluate", *common, "--policy", "top_p", "--set", "p=0.7", "--blocks", "1"]
    words += ["--compensation", str(learned), "--profile", str(tuned / "profile")]
    words += ["--decode_blocks", "1", "--max_samples", "8", "--quiet"]
    assert main([*words, "--output", str(tmp_path / "evaluate")]) == 0


def test_policies_side_by_side_with_and_without(common, tuned, learned, tmp_path, capsys):
    words = ["compare", *common, "--policies", "damage,naee,var_plain", "--experts", "1.5"]
    words += ["--compensation", f"none,means,{learned}", "--blocks", "0", "--quiet"]
    words += ["--profile", str(tuned / "profile"), "--output", str(tmp_path)]
    assert main([*words, "--max_samples", "20"]) == 0
    rows = read(tmp_path / "comparison.json")["rows"]
    found = {(row["policy"], row["compensation"]) for row in rows}
    for name in ("none", "means", "learned"):
        assert {("damage", name), ("naee", name), ("random_skip", name)} <= found
        assert ("var_plain", name) not in found
    assert all(row["speedup"] is None for row in rows)
    assert "damage + learned" in {row["name"] for row in rows}
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compensation", "nowhere"], "--compensation nowhere: expected none, means, learned"),
        (["--policy", "var", "--compensation", "means"], "needs a policy that drops experts"),
        (["--compensation", "learned"], "; fit one with `var-moe fit-compensation"),
    ],
)
def test_refusals_in_one_line(common, tuned, words, message, tmp_path, capsys):
    given = ["tune", *common, "--profile", str(tuned / "profile"), "--quiet", *words]
    assert main([*given, "--output", str(tmp_path / "o")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in line
