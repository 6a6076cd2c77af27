"""``tune --policy NAME`` by replay end to end on a tiny model: the search, its files, their use."""

from __future__ import annotations

import json

import pytest

from var_moe.cli import main
from var_moe.optimization.settings import TuneSettings
from var_moe.routing.registry import policy_names, policy_spec

BOUND = "0.5"


@pytest.fixture(scope="module")
def profile(common, tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    assert main(["profile", *common, "--output", str(folder), "--quiet"]) == 0
    return ["--profile", str(folder)]


@pytest.fixture(scope="module")
def tuned(common, profile, tmp_path_factory):
    """A finished search over top_p's one setting; replay is the default."""
    folder = tmp_path_factory.mktemp("results") / "top_p"
    words = ["tune", *common, *profile, "--policy", "top_p", "--max_degradation", BOUND]
    words += ["--n_calls", "4", "--seed", "3", "--output", str(folder), "--quiet"]
    assert main(words) == 0
    return folder


def read(path):
    return json.loads(path.read_text())


@pytest.mark.slow
def test_a_policy_is_searched_by_replay(tuned):
    results = read(tuned / "optimization_results.json")
    assert results["method"] == "replay"
    rows = [row["params"] for row in results["all_results"]]
    assert [set(row) for row in rows] == [{"p", "compensation"}] * 4
    assert {row["compensation"] for row in rows} == {"none", "means"}
    config = read(tuned / "best_config.json")
    assert config["policy"] == "top_p"
    metadata = read(tuned / "optimization_metadata.json")
    assert metadata["settings"]["policy"] == "top_p"
    assert 256 < metadata["replay"]["forecasts"] < 400
    assert all(row["config"]["policy"] == "top_p" for row in metadata["remeasured"])
    assert {path.name for path in tuned.glob("trace*")} == {"trace", "trace_none"}


@pytest.mark.slow
def test_its_front_holds_settings_of_the_policy(tuned):
    points = read(tuned / "pareto.json")["points"]
    assert {point["config"]["policy"] for point in points} == {"top_p"}
    forecast = [point for point in points if not point["verified"]]
    assert forecast  # one may be all: on a random model, dropping experts costs nothing
    for key in ("degradation", "speedup"):
        assert [p[key] for p in forecast] == sorted(p[key] for p in forecast)
    verified = [point["config"] for point in points if point["verified"]]
    remeasured = [row["config"] for row in read(tuned / "optimization_metadata.json")["remeasured"]]
    assert sorted(map(str, verified)) == sorted(map(str, remeasured))
    assert len(set(map(str, verified))) == len(verified)


@pytest.mark.slow
def test_another_bound_and_its_validation(tuned, tmp_path, capsys):
    points = [p for p in read(tuned / "pareto.json")["points"] if p["verified"]]
    bound = str(max(point["degradation_upper_95"] for point in points) + 1e-9)
    words = ["tune", "--from", str(tuned), "--max_degradation", bound]
    assert main([*words, "--output", str(tmp_path)]) == 0
    assert "Fastest verified configuration" in capsys.readouterr().out
    config = tmp_path / "best_config.json"
    fewest = min(points, key=lambda point: point["experts_per_token"])
    assert read(config) == fewest["config"]
    assert main(["tune", "--validate", str(config), "--max_samples", "8", "--quiet"]) == 0
    found = read(tmp_path / "validation_results.json")
    assert found["config"] == fewest["config"]
    assert found["max_degradation"] == float(bound)


@pytest.mark.slow
def test_few_ways_to_decide_end_the_search_early(common, profile, tmp_path):
    words = ["tune", *common, *profile, "--policy", "per_layer_k", "--max_degradation", "5"]
    words += ["--compensation", "none"]
    assert main([*words, "--seed", "1", "--output", str(tmp_path), "--quiet"]) == 0
    results = read(tmp_path / "optimization_results.json")
    # Three layers of K = 2: three to six experts to share out.
    assert results["num_evaluations"] == 4
    notes = read(tmp_path / "optimization_metadata.json")["notes"]
    assert any("ended after 4 evaluations" in note for note in notes)


@pytest.mark.slow
def test_killed_and_resumed(common, profile, tmp_path, killed, finished):
    """--resume goes on to the original number with the points of an unbroken search."""
    folder = tmp_path / "run"
    words = ["tune", *common, *profile, "--policy", "naee", "--n_calls", "6", "--seed", "5"]
    words += ["--max_degradation", BOUND, "--quiet", "--output", str(folder)]
    killed(words, lambda: finished(folder) >= 2)
    log = folder / "optuna_study.log"
    before = log.read_text().splitlines()
    cost = read(folder / "cost_model.json")
    assert main([*words, "--resume"]) == 0
    assert read(folder / "cost_model.json") == cost
    assert log.read_text().splitlines()[: len(before) - 1] == before[:-1]
    rows = read(folder / "optimization_results.json")["all_results"]
    assert len(rows) == len({tuple(sorted(row["params"].items())) for row in rows}) == 6


@pytest.mark.slow
def test_runs_with_folders_of_their_own_share_a_database(common, profile, tmp_path, capsys):
    words = ["tune", *common, *profile, "--policy", "naee", "--seed", "5"]
    words += ["--max_degradation", BOUND, "--quiet", "--storage", f"sqlite:///{tmp_path}/t.db"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([*words, "--output", str(first), "--n_calls", "3"]) == 0
    assert not (first / "optuna_study.log").exists()
    assert main([*words, "--output", str(second)]) == 2
    assert "t.db: holds a search already" in capsys.readouterr().err
    assert main([*words, "--output", str(second), "--resume", "--n_calls", "4"]) == 0
    results = [read(folder / "optimization_results.json") for folder in (first, second)]
    assert results[1]["all_results"][:3] == results[0]["all_results"]
    assert results[1]["num_evaluations"] == 4
    metadata = read(first / "optimization_metadata.json")
    assert metadata["settings"]["storage"] == f"sqlite:///{tmp_path}/t.db"


def test_a_database_that_cannot_be_used_is_one_line(tmp_path, capsys):
    words = ["tune", "--storage", "postgresql://ann:secret@127.0.0.1:9/t", "--output"]
    assert main([*words, str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "postgresql://ann:***@127.0.0.1:9/t" in error


def test_replay_is_the_default_where_a_trace_tells_what_decisions_cost(tmp_path, monkeypatch):
    def method(policy):
        return TuneSettings(policy=policy, output=tmp_path).method

    tunable = [name for name in policy_names() if policy_spec(name).search_space(2)]
    assert {method(name) for name in tunable} == {"replay"}
    monkeypatch.setattr(policy_spec("top_p").load(), "cuts_only", False)
    assert method("top_p") == "bayesian"
