"""Several seeds end to end on a tiny model: `tune --seeds`."""

from __future__ import annotations

import json

import pytest

from var_moe.cli import main


@pytest.fixture(scope="module")
def search(common):
    """The command of a search, without its seeds and folder; every bound is kept."""
    words = ["--policy", "top_p", "--n_calls", "2", "--max_degradation", "5", "--quiet"]
    return ["tune", *common, *words, "--max_samples", "6", "--final_samples", "6"]


@pytest.fixture(scope="module")
def seeded(search, tmp_path_factory):
    """Two seeds in one command, which makes its profile itself."""
    folder = tmp_path_factory.mktemp("seeds")
    assert main([*search, "--seeds", "3,1", "--output", str(folder)]) == 0
    return folder


def read(path):
    return json.loads(path.read_text())


@pytest.mark.slow
def test_each_seed_has_its_folder_and_shares_the_rest(seeded):
    names = {path.name for path in seeded.iterdir()}
    assert {"run_1", "run_3", "profile", "trace", "cost_model.json", "report.html"} <= names
    for seed in (1, 3):
        run = seeded / f"run_{seed}"
        assert (run / "best_config.json").is_file()
        assert not {path.name for path in run.iterdir()} & {"profile", "trace", "cost_model.json"}
        assert read(run / "optimization_metadata.json")["seed"] == seed


@pytest.mark.slow
def test_finished_seeds_are_left_alone_and_the_table_is_made_again(search, seeded, capsys):
    first = seeded / "run_1" / "optimization_results.json"
    written, report = first.stat().st_mtime_ns, read(seeded / "stability.json")
    assert [row["seed"] for row in report["runs"]] == [1, 3]
    capsys.readouterr()
    assert main([*search, "--seeds", "3,1", "--output", str(seeded), "--resume"]) == 0
    assert first.stat().st_mtime_ns == written
    assert read(seeded / "stability.json")["runs"] == report["runs"]
    lines = capsys.readouterr().out.splitlines()
    for row in report["runs"]:
        shown = next(line for line in lines if line.strip(" │").startswith(f"{row['seed']} "))
        assert f"{row['experts_per_token']:.3f}" in shown
        assert f"{row['speedup']:.3f} [" in shown
    assert any(line.strip(" │").startswith("spread ") for line in lines)


@pytest.mark.slow
def test_a_run_can_be_validated_and_its_profile_is_found(seeded):
    config = seeded / "run_1" / "best_config.json"
    assert main(["tune", "--validate", str(config), "--max_samples", "8", "--quiet"]) == 0
    assert (config.parent / "validation_results.json").is_file()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--seeds", "1"], "--seeds 1: expected two different seeds"),
        (["--seeds", "1,1"], "--seeds 1,1: expected two different"),
        (["--seeds", "1,x"], "--seeds '1,x': expected numbers with commas"),
        (["--seeds", "1,-2"], "seed = -2"),
        (["--seeds", "1,2", "--seed", "0"], "--seeds and --seed do not belong together"),
        (["--seeds", "1,2", "--validate", "x"], "--seeds belongs to a search"),
        (["--seeds", "1,2", "--from", "x"], "--seeds belongs to a search"),
    ],
)
def test_bad_seeds_are_refused_in_one_line(search, tmp_path, capsys, words, why):
    assert main([*search, *words, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.strip().splitlines()
    assert why in line
    assert not (tmp_path / "out").exists()
