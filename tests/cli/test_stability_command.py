"""Several seeds end to end on a tiny model: `tune --seeds`, the shell loop, `stability`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from var_moe.cli import main


@pytest.fixture(scope="module")
def profile(common, tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    assert main(["profile", *common, "--output", str(folder), "--quiet"]) == 0
    return folder


@pytest.fixture(scope="module")
def search(common):
    """The command of a search, without its seeds and folder; every bound is kept."""
    words = ["--policy", "top_p", "--n_calls", "2", "--max_degradation", "5", "--quiet"]
    return ["tune", *common, *words, "--max_samples", "6", "--final_samples", "6"]


@pytest.fixture(scope="module")
def seeded(search, tmp_path_factory):
    """Three seeds in one command, which makes its profile itself."""
    folder = tmp_path_factory.mktemp("seeds")
    assert main([*search, "--seeds", "3,1,2", "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def refused(capsys):
    """Run a command that must be refused; returns its one line."""

    def run(*words):
        assert main([str(word) for word in words]) == 2
        captured = capsys.readouterr()
        lines = captured.err.strip().splitlines()
        assert len(lines) == 1, captured.err
        assert captured.out == ""
        return lines[0]

    return run


def read(path):
    return json.loads(path.read_text())


def test_each_seed_has_its_folder_and_shares_the_rest(seeded):
    names = {path.name for path in seeded.iterdir()}
    assert {"run_1", "run_2", "run_3", "profile", "trace", "cost_model.json"} <= names
    for seed in (1, 2, 3):
        run = seeded / f"run_{seed}"
        assert (run / "best_config.json").is_file()
        assert not {path.name for path in run.iterdir()} & {"profile", "trace", "cost_model.json"}
        assert read(run / "optimization_metadata.json")["seed"] == seed


def test_the_report(seeded):
    report = read(seeded / "stability.json")
    assert report["schema_version"] == 1
    assert report["seeds"] == [1, 2, 3]
    scores = [row["best_score"] for row in report["runs"]]
    found = report["best_score"]
    assert found["mean"] == pytest.approx(sum(scores) / 3)
    assert (found["min"], found["max"]) == (min(scores), max(scores))
    assert report["criterion"]["met"] == (found["spread_relative"] < 0.03)
    (p,) = report["parameters"]
    configs = [read(seeded / f"run_{seed}" / "best_config.json") for seed in (1, 2, 3)]
    assert p["values"] == [config["settings"]["p"] for config in configs]
    agreement = report["agreement"]
    assert [row["seed"] for row in agreement["winners"]] == [1, 2, 3]
    assert [pair["seeds"] for pair in agreement["pairs"]] == [[1, 2], [1, 3], [2, 3]]
    assert agreement["decisions"] == 3 * agreement["trace"]["tokens"]
    for pair in agreement["pairs"]:
        one, other = (p["values"][seed - 1] for seed in pair["seeds"])
        assert (pair["alike_pct"] == 100.0) >= (one == other)
        assert 0 < pair["alike_pct"] <= 100
    for pair in report["perplexity_differences"]:
        one, other = (report["runs"][seed - 1] for seed in pair["seeds"])
        by_hand = (1 + other["degradation"]) / (1 + one["degradation"]) - 1
        assert pair["perplexity_difference_relative"] == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.slow
def test_the_shell_loop_is_read_as_well(search, profile, tmp_path, capsys):
    for seed in (1, 2):
        words = [*search, "--seed", str(seed), "--profile", str(profile)]
        assert main([*words, "--output", str(tmp_path / f"run_{seed}")]) == 0
    capsys.readouterr()
    folders = [str(path) for path in sorted(tmp_path.glob("run_*"))]
    assert main(["stability", *folders]) == 0
    out = capsys.readouterr().out
    assert "best score: mean" in out
    assert "Settings of the winners" in out
    assert "decisions alike" in " ".join(out.split())  # titles wrap at long paths
    report = read(tmp_path / "stability.json")
    assert report["seeds"] == [1, 2]
    assert len(report["agreement"]["pairs"]) == 1


def test_folders_of_seeds_are_read_by_the_command(seeded, tmp_path, capsys):
    folders = [str(seeded / f"run_{seed}") for seed in (2, 1)]
    assert main(["stability", *folders, "--output", str(tmp_path)]) == 0
    out = " ".join(capsys.readouterr().out.split())  # titles wrap
    for words in ("best score: mean", "Settings of the winners", "decisions alike", "Saved: "):
        assert words in out
    report = read(tmp_path / "stability.json")
    assert report["seeds"] == [1, 2]  # by seed, whatever the order given
    whole = read(seeded / "stability.json")["agreement"]
    assert report["agreement"]["pairs"] == whole["pairs"][:1]


@pytest.mark.slow
def test_fresh_seeds_are_recorded(search, profile, tmp_path):
    words = [*search, "--repeats", "2", "--profile", str(profile), "--output", str(tmp_path)]
    assert main(words) == 0
    seeds = read(tmp_path / "seeds.json")["seeds"]
    assert read(tmp_path / "stability.json")["seeds"] == sorted(seeds)
    assert all((tmp_path / f"run_{seed}" / "best_config.json").is_file() for seed in seeds)


@pytest.mark.slow
def test_a_run_can_be_validated_and_its_profile_is_found(seeded, capsys):
    config = seeded / "run_1" / "best_config.json"
    assert main(["tune", "--validate", str(config), "--max_samples", "8", "--quiet"]) == 0
    assert (config.parent / "validation_results.json").is_file()


@pytest.mark.slow
def test_killed_and_resumed(search, profile, tmp_path):
    """kill -9 in a later seed: what is finished is left alone, the rest is done."""
    words = [*search, "--seeds", "1,2,3", "--profile", str(profile), "--output", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "var_moe.cli", *words], env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 180
    plan, later = tmp_path / "seeds.json", tmp_path / "run_2" / "trials.jsonl"
    while time.monotonic() < deadline and not (later.exists() and '"score"' in later.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read(plan)["finished"] == [1]
    first = tmp_path / "run_1" / "optimization_results.json"
    written, trials = first.stat().st_mtime_ns, later.read_text()
    assert main([*words, "--resume"]) == 0
    assert first.stat().st_mtime_ns == written
    assert later.read_text().startswith(trials)  # gone on with, not begun anew
    assert read(plan)["finished"] == [1, 2, 3]
    assert read(tmp_path / "stability.json")["seeds"] == [1, 2, 3]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--seeds", "1"], "1 seed: a spread over seeds needs at least 2"),
        (["--seeds", "1,1"], "seeds: 1 is given twice"),
        (["--seeds", "1,x"], "--seeds '1,x': expected numbers with commas"),
        (["--seeds", "1,-2"], "seed = -2"),
        (["--seeds", "1,2", "--seed", "0"], "--seeds and --seed do not belong together"),
        (["--seeds", "1,2", "--repeats", "3"], "--seeds and --repeats do not belong together"),
        (["--repeats", "1"], "repeats = 1: a spread over seeds needs at least 2"),
        (["--repeats", "0"], "repeats = 0: a spread over seeds needs at least 2"),
    ],
)
def test_bad_seeds_are_refused_in_one_line(refused, search, tmp_path, words, why):
    assert why in refused(*search, *words, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("other", ["--validate", "--from"])
def test_seeds_belong_to_a_search(refused, other, tmp_path):
    line = refused("tune", other, tmp_path, "--seeds", "1,2")
    assert "--seeds and --repeats belong to a search" in line


def test_runs_that_do_not_belong_together_are_refused(refused, seeded, tmp_path):
    one = seeded / "run_1"
    assert "1 run: a spread over seeds" in refused("stability", one)
    assert "are both of seed 1" in refused("stability", one, one)
    assert "nowhere: no such folder" in refused("stability", one, tmp_path / "nowhere")
    assert "no optimization_metadata.json" in refused("stability", one, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    for path in (seeded / "run_2").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    metadata = read(other / "optimization_metadata.json")
    metadata["settings"]["max_degradation"] = 0.02
    (other / "optimization_metadata.json").write_text(json.dumps(metadata))
    line = refused("stability", one, other, "--output", tmp_path)
    assert "max_degradation = 0.02, and" in line
    assert not (tmp_path / "stability.json").exists()
