"""The commands end to end, on a tiny random model and tiny local text."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from var_moe.cli import main
from var_moe.evaluation.speed_setting import SpeedSetting

RESULT_KEYS = {"best_score", "optimization_time", "num_evaluations", "converged", "all_results"}


@pytest.fixture(scope="module")
def tuned(common, tmp_path_factory):
    """One finished search, for the tests that look at its files."""
    folder = tmp_path_factory.mktemp("results") / "phase3"
    words = ["tune", *common, "--policy", "var", "--n_calls", "6", "--max_degradation", "0.5"]
    words += ["--seed", "3"]
    assert main([*words, "--output", str(folder), "--quiet"]) == 0
    return folder


def read(path):
    return json.loads(path.read_text())


def test_tune_writes_the_documented_files(tuned):
    results = read(tuned / "optimization_results.json")
    assert results.keys() >= RESULT_KEYS
    assert results["num_evaluations"] == len(results["all_results"]) == 6
    for row in results["all_results"]:
        assert row.keys() >= {
            "params",
            "score",
            "degradation",
            "speedup",
            "fast_pct",
            "cached_pct",
            "learned_pct",
            "experts_per_token",
            "state",
        }
    config = read(tuned / "best_config.json")
    assert list(config)[:6] == [
        "frequency_threshold",
        "entropy_threshold",
        "confidence_threshold",
        "cache_size",
        "cache_ttl_seconds",
        "context_window_size",
    ]
    metadata = read(tuned / "optimization_metadata.json")
    assert metadata["baseline"]["perplexity"] > 1
    assert metadata["profile"]["hash"] == read(tuned / "profile" / "profile.json")["hash"]
    assert metadata["settings"]["seed"] is not None or metadata["seed"] is not None
    summary = (tuned / "optimization_summary.txt").read_text()
    for word in ("best", "baseline", "conservative", "balanced", "aggressive"):
        assert word in summary


def test_best_was_measured_again_and_keeps_its_bound(tuned):
    metadata = read(tuned / "optimization_metadata.json")
    config = read(tuned / "best_config.json")
    same = [row for row in metadata["remeasured"] if row["config"] == config]
    assert same
    assert same[0]["degradation_upper_95"] < 0.5
    fewest = min(row["experts_per_token"] for row in metadata["remeasured"] if row["passed"])
    assert same[0]["experts_per_token"] == fewest


def test_tune_searches_by_replay_and_leaves_its_front(tuned):
    results = read(tuned / "optimization_results.json")
    assert results["method"] == "replay"
    metadata = read(tuned / "optimization_metadata.json")
    assert metadata["replay"]["forecasts"] > 2000
    points = read(tuned / "pareto.json")["points"]
    assert [p["degradation"] for p in points] == sorted(p["degradation"] for p in points)
    forecast = [p for p in points if not p["verified"]]
    speeds = [p["speedup"] for p in forecast]
    assert speeds == sorted(speeds)
    verified = [p["config"] for p in points if p["verified"]]
    remeasured = [row["config"] for row in metadata["remeasured"]]
    assert sorted(map(str, remeasured)) == sorted(map(str, verified))
    assert read(tuned / "cost_model.json")["seconds"]["pair_s"] >= 0


@pytest.mark.slow
def test_another_bound_is_answered_from_the_front(tuned, tmp_path, capsys):
    upper = sorted(
        point["degradation_upper_95"]
        for point in read(tuned / "pareto.json")["points"]
        if point["verified"]
    )
    bound = str(upper[1] + 1e-9)
    words = ["tune", "--from", str(tuned), "--max_degradation", bound]
    assert main([*words, "--output", str(tmp_path / "answer")]) == 0
    assert "Fastest verified configuration" in capsys.readouterr().out
    config = tmp_path / "answer" / "best_config.json"
    assert read(config)["confidence_threshold"] > 0
    # It can be validated as it lies there, with the search's profile.
    assert main(["tune", "--validate", str(config), "--max_samples", "8", "--quiet"]) == 0
    assert read(config.parent / "validation_results.json")["max_degradation"] == float(bound)
    if upper[0] > 0:  # on a random model, dropping experts may even help
        tight = ["tune", "--from", str(tuned), "--max_degradation", str(upper[0])]
        assert main(tight) == 2
        assert "no verified configuration keeps" in capsys.readouterr().err


def test_an_answer_that_its_own_search_did_not_time(tmp_path, capsys):
    """A candidate over the bound of its search is measured, but not timed; it may keep another."""
    about = {"verified": True, "config": {"policy": "top_p", "settings": {"p": 0.7}}}
    points = [
        {
            **about,
            "name": name,
            "degradation": change,
            "degradation_upper_95": change + 0.002,
            "speedup": timed and 1.2,
            "speedup_95": timed and [1.1, 1.3],
            "experts_per_token": 2 - 10 * change,
        }
        for name, change, timed in (("kept", 0.005, True), ("over", 0.015, None))
    ]
    front = {"schema_version": 1, "points": points}
    (tmp_path / "pareto.json").write_text(json.dumps(front))
    (tmp_path / "optimization_metadata.json").write_text("{}")
    for bound, said in (("0.01", ": 1.200 [1.100, 1.300] times as"), ("0.02", ": not timed at")):
        assert main(["tune", "--from", str(tmp_path), "--max_degradation", bound]) == 0
        assert said in capsys.readouterr().out


@pytest.mark.slow
def test_a_grid_of_forecasts(common, tuned, tmp_path):
    words = ["tune", *common, "--method", "grid", "--n_points", "3", "--n_calls", "2"]
    words += ["--max_degradation", "0.5", "--profile", str(tuned / "profile"), "--seed", "1"]
    assert main([*words, "--output", str(tmp_path), "--quiet"]) == 0
    results = read(tmp_path / "optimization_results.json")
    assert results["num_evaluations"] == 2
    assert read(tmp_path / "optimization_metadata.json")["replay"]["forecasts"] >= 729
    for row in results["all_results"]:
        assert row["params"]["cache_size"] in (100, 2550, 5000)


@pytest.mark.slow
def test_the_documented_script_keeps_its_method(common, tuned, tmp_path):
    script = "experiments/03_hyperparameter_optimization.py"
    words = [*common, "--n_calls", "2", "--max_degradation", "0.5", "--quiet"]
    words += ["--profile", str(tuned / "profile"), "--output", str(tmp_path)]
    (tmp_path / "pareto.json").write_text("{}")  # as an earlier search by replay left it
    subprocess.run([sys.executable, script, *words], check=True, capture_output=True)
    assert read(tmp_path / "optimization_results.json")["method"] == "bayesian"
    assert not (tmp_path / "pareto.json").exists()


@pytest.mark.slow
def test_validate_on_the_test_split(tuned, common, capsys):
    """Model, text and bound are those of the search, unless others are given."""
    assert main(["tune", "--validate", str(tuned / "best_config.json"), "--quiet"]) == 0
    found = read(tuned / "validation_results.json")
    assert found["max_degradation"] == 0.5
    assert found["model"]["name"] == common[1]
    assert found["random_skip"]["experts_per_token"] == pytest.approx(
        found["experts_per_token"], abs=0.05
    )
    assert found["text"]["split"] == "test"
    assert len(found["runs"]) >= 3
    assert [row["met"] in (True, False) for row in found["criteria"]] == [True] * 4
    for key in ("baseline_perplexity", "perplexity", "degradation", "speedup", "speedup_95"):
        assert found[key]
    assert "Success criteria" in capsys.readouterr().out


@pytest.mark.slow
def test_validating_on_the_searchs_own_text_says_so(tuned, common, tmp_path, capsys):
    words = ["tune", "--validate", str(tuned / "best_config.json"), "--split", "validation"]
    assert main([*words, "--max_samples", "5", "--output", str(tmp_path), "--quiet"]) == 0
    said = "this text is what the search chose on, so it is not held out"
    assert read(tmp_path / "validation_results.json")["notes"][0] == said
    assert said in capsys.readouterr().out


def test_validate_refuses_another_profile(tuned, common, tmp_path, capsys):
    other = tmp_path / "profile"
    words = ["profile", *common, "--max_tokens", "300", "--output", str(other), "--quiet"]
    assert main(words) == 0
    words = ["tune", "--validate", str(tuned / "best_config.json"), *common]
    assert main([*words, "--profile", str(other), "--quiet"]) == 2
    assert "not the profile that" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluate_compares_presets(common, tuned, tmp_path, capsys):
    words = ["evaluate", *common, "--profile", str(tuned / "profile"), "--output", str(tmp_path)]
    words += ["--preset", "balanced", "--preset", "keep_all", "--blocks", "2", "--quiet"]
    assert main([*words, "--decode_blocks", "0"]) == 0
    rows = {row["name"]: row for row in read(tmp_path / "evaluation.json")["rows"]}
    assert rows.keys() == {"baseline", "balanced", "keep_all"}
    assert rows["keep_all"]["experts_per_token"] == 2.0
    assert abs(rows["keep_all"]["degradation"]) < 1e-5
    assert rows["balanced"]["experts_per_token"] < 2.0
    out = capsys.readouterr().out
    assert "experts" in out
    assert "2.000" in out


@pytest.mark.slow
def test_evaluate_takes_any_policy_and_times_generation(common, tuned, tmp_path, capsys):
    words = ["evaluate", *common, "--profile", str(tuned / "profile"), "--output", str(tmp_path)]
    words += ["--policy", "naee", "--set", "quantile=0.25", "--blocks", "1", "--decode_blocks", "1"]
    assert main([*words, "--max_samples", "10", "--quiet"]) == 0
    rows = {row["name"]: row for row in read(tmp_path / "evaluation.json")["rows"]}
    assert rows.keys() == {"baseline", "naee"}
    assert rows["naee"]["config"] == {"quantile": 0.25}
    assert rows["naee"]["experts_per_token"] == pytest.approx(1.75, abs=0.05)
    assert [one["batch_size"] for one in rows["naee"]["decode"]] == [1, 16]
    for one in rows["naee"]["decode"]:
        assert one["new_tokens"] == SpeedSetting().new_tokens
        assert 0.1 < one["speedup"] < 10
    assert "Generation, greedy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--policy", "nae"], "did you mean 'naee'"),
        (["--set", "quantile=1"], "--set belongs to --policy"),
        (["--policy", "naee", "--set", "quantile"], "expected name=value"),
        (["--policy", "naee", "--set", "quantil=1"], "unknown setting 'quantil'"),
        (["--policy", "naee", "--set", "quantile=7"], "NAEEPolicy.quantile = 7"),
        (["--decode_blocks", "-1"], "decode_blocks = -1"),
    ],
)
def test_evaluate_refuses_in_one_line(common, tuned, words, message, tmp_path, capsys):
    profile = ["--profile", str(tuned / "profile"), "--output", str(tmp_path / "o"), "--quiet"]
    assert main(["evaluate", *common, *words, *profile]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.slow
def test_nothing_feasible_is_said_and_saved(common, tmp_path, capsys):
    """On a random model every cut costs more than this bound."""
    words = ["tune", *common, "--n_calls", "3", "--max_degradation", "1e-9", "--method", "random"]
    words += ["--bounds", "confidence_threshold=0.5:0.55", "--bounds", "frequency_threshold=0:1"]
    code = main([*words, "--seed", "1", "--output", str(tmp_path), "--quiet"])
    assert code == 1
    error = capsys.readouterr().err
    assert "All configurations violate constraint" in error
    assert error.count("\n") == 1
    miss = read(tmp_path / "nearest_miss.json")
    assert miss["config"]["frequency_threshold"] >= 0
    assert (tmp_path / "optimization_results.json").is_file()
    assert not (tmp_path / "best_config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["random", "bayesian", "replay"])
def test_killed_and_resumed(common, tmp_path, method, killed, finished):
    """kill -9 loses at most the running evaluation; --resume goes on to the original number."""
    folder = tmp_path / "run"
    words = ["tune", *common, "--method", method, "--n_calls", "8", "--seed", "5"]
    words += ["--max_degradation", "0.5", "--output", str(folder), "--quiet"]
    killed(words, lambda: finished(folder) >= 3)
    assert main([*words, "--resume"]) == 0
    resumed = read(folder / "optimization_results.json")["all_results"]
    assert len(resumed) == 8
    points = [json.dumps(row["params"], sort_keys=True) for row in resumed]
    assert len(set(points)) == 8
    if method == "random":
        whole = tmp_path / "whole"
        words[words.index(str(folder))] = str(whole)
        assert main(words) == 0
        unbroken = read(whole / "optimization_results.json")["all_results"]
        assert [row["params"] for row in unbroken] == [row["params"] for row in resumed]
        assert [row["degradation"] for row in unbroken] == pytest.approx(
            [row["degradation"] for row in resumed], rel=1e-6
        )


def test_the_documented_script_is_the_same_command():
    script = "experiments/03_hyperparameter_optimization.py"
    found = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, check=True
    )
    for option in ("--method", "--n_calls", "--n_points", "--max_degradation", "--validate"):
        assert option in found.stdout


@pytest.mark.slow
def test_a_six_field_file_is_validated_in_the_mode_asked_for(tuned, common, tmp_path):
    config = read(tuned / "best_config.json")
    documented = tmp_path / "six.json"
    documented.write_text(json.dumps(dict(list(config.items())[:6])))
    words = ["tune", "--validate", str(documented), *common, "--mode", "plain", "--quiet"]
    words += ["--profile", str(tuned / "profile"), "--max_degradation", "0.5"]
    assert main([*words, "--output", str(tmp_path)]) == 0
    found = read(tmp_path / "validation_results.json")["config"]
    assert (found["mode"], found["residuals"]) == ("plain", None)


def test_a_ready_profile_is_shown(tuned, capsys):
    assert main(["profile", "--profile", str(tuned / "profile")]) == 0
    assert "entropy (nats)" in capsys.readouterr().out


@pytest.mark.slow
def test_text_that_was_profiled_is_marked(common, tuned, tmp_path, capsys):
    words = ["evaluate", *common, "--profile", str(tuned / "profile"), "--output", str(tmp_path)]
    assert (
        main([*words, "--split", "calibration", "--blocks", "1", "--decode_blocks", "0", "--quiet"])
        == 0
    )
    assert "this text was profiled" in capsys.readouterr().out


@pytest.mark.slow
def test_compare_writes_table_and_picture(common, tmp_path, capsys):
    out = tmp_path / "compare"
    words = ["compare", *common, "--policies", "naee,ser", "--experts", "1.5", "--blocks", "1"]
    assert main([*words, "--max-samples", "12", "--output", str(out), "--quiet"]) == 0
    shown = capsys.readouterr().out
    result = read(out / "comparison.json")
    assert [row["name"] for row in result["rows"]] == ["random_skip", "naee", "ser"]
    for row in result["rows"]:
        assert row["name"] in shown
        assert row["experts_per_token"] == pytest.approx(1.5, abs=0.1)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "At 1.5 experts per token" in page
    assert 'data-figure="policies-experts"' in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--policies", "nae"], "did you mean 'naee'"),
        (["--policies", "native"], "no strength to vary"),
        (["--blocks", "-1"], "blocks = -1: expected an integer of at least 0"),
        (["--experts", "3"], "experts = 3"),
        (["--max_degradation", "-1"], "max_degradation"),
    ],
)
def test_compare_refuses_in_one_line(common, words, message, tmp_path, capsys):
    assert main(["compare", *common, *words, "--output", str(tmp_path / "o"), "--quiet"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.slow
def test_a_comparison_is_measured_again_on_other_text(common, tuned, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    rest = [*common, "--profile", str(tuned / "profile"), "--blocks", "0", "--quiet"]
    words = ["compare", *rest, "--policies", "naee", "--compensation", "none,means"]
    assert main([*words, "--experts", "1.5", "--output", str(first)]) == 0
    again = ["compare", *rest, "--from", str(first), "--split", "test", "--output"]
    assert main([*again, str(second)]) == 0
    before, after = read(first / "comparison.json"), read(second / "comparison.json")
    for name in ("name", "settings", "compensation", "target_experts_per_token"):
        assert [row[name] for row in before["rows"]] == [row[name] for row in after["rows"]]
    assert before["text"]["data_hash"] != after["text"]["data_hash"]
    assert before["baseline"]["perplexity"] != after["baseline"]["perplexity"]
    # Some of it only.
    assert main([*again, str(tmp_path / "third"), "--compensation", "means"]) == 0
    rows = read(tmp_path / "third" / "comparison.json")["rows"]
    assert [row["name"] for row in rows] == ["random_skip + means", "naee + means"]
    capsys.readouterr()
    # Not over itself, nor with other policies, another profile or another compensation.
    for words, message in (
        ([*again, str(first)], "would overwrite --from"),
        ([*again, str(second), "--policies", "ser"], "do not belong to --from"),
        (["compare", *rest, "--from", str(tmp_path), "--output", str(second)], "no comparison"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err
    for field, message in (
        ({"profile_hash": "0" * 64}, "measured with profile 000000000000"),
        ({"compensation_hashes": {"means": "0"}}, "compensation 'means' was another one"),
    ):
        (tmp_path / "forged").mkdir(exist_ok=True)
        (tmp_path / "forged" / "comparison.json").write_text(json.dumps(before | field))
        words = ["compare", *rest, "--from", str(tmp_path / "forged"), "--output", str(second)]
        assert main(words) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_another_policy_is_tuned_saved_and_validated(common, tuned, tmp_path, capsys):
    profile = str(tuned / "profile")
    words = ["tune", *common, "--policy", "naee", "--n_calls", "6", "--max_degradation", "0.5"]
    words += ["--profile", profile, "--seed", "1", "--output", str(tmp_path), "--quiet"]
    assert main(words) == 0
    config = read(tmp_path / "best_config.json")
    assert config["policy"] == "naee"
    assert 0 <= config["settings"]["quantile"] <= 1
    results = read(tmp_path / "optimization_results.json")
    names = {"quantile", "compensation"}
    assert [set(row["params"]) for row in results["all_results"]] == [names] * 6
    assert "policy naee" in (tmp_path / "optimization_summary.txt").read_text()
    capsys.readouterr()
    assert main(["tune", "--validate", str(tmp_path / "best_config.json"), "--quiet"]) == 0
    found = read(tmp_path / "validation_results.json")
    assert found["config"] == config
    assert found["experts_per_token"] < 2.0


@pytest.mark.slow
def test_a_policy_of_few_settings_is_tried_out(common, tuned, tmp_path):
    words = ["tune", *common, "--policy", "fixed_k", "--max_degradation", "5", "--quiet"]
    words += ["--profile", str(tuned / "profile"), "--seed", "1", "--output", str(tmp_path)]
    assert main(words) == 0
    results = read(tmp_path / "optimization_results.json")
    points = [tuple(row["params"].values()) for row in results["all_results"]]
    assert sorted(points) == [(1, "means"), (1, "none"), (2, "means"), (2, "none")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--policy", "nae"], "did you mean 'naee'"),
        (["--policy", "native"], "nothing to tune"),
        (["--policy", "naee", "--mode", "plain"], "leave one out"),
        (["--policy", "naee", "--bounds", "p=0:1"], "unknown name 'p'; expected quantile"),
    ],
)
def test_tune_refuses_policies_in_one_line(common, words, message, tmp_path, capsys):
    assert main(["tune", *common, *words, "--output", str(tmp_path / "o"), "--quiet"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.slow
def test_decode_is_an_objective_as_prefill_is(common, tuned, tmp_path, capsys):
    """And --validate measures what the search did, unless it is told otherwise."""
    words = [*common, "--profile", str(tuned / "profile"), "--output", str(tmp_path), "--quiet"]
    asked = ["--objective", "decode", "--batch", "2", "--n_calls", "1", "--max_degradation", "0.9"]
    assert main(["tune", *words, *asked]) == 0
    setting = read(tmp_path / "optimization_metadata.json")["settings"]["setting"]
    assert (setting["objective"], setting["batch_size"]) == ("decode", 2)
    cost = read(tmp_path / "cost_model.json")["setting"]
    assert (cost["objective"], cost["batch_size"]) == ("decode", 2)
    again = ["tune", "--validate", str(tmp_path / "best_config.json"), "--quiet"]
    assert main(again) == 0
    assert read(tmp_path / "validation_results.json")["setting"]["objective"] == "decode"
    assert main([*again, "--objective", "prefill", "--batch", "1"]) == 0
    setting = read(tmp_path / "validation_results.json")["setting"]
    assert (setting["objective"], setting["batch_size"]) == ("prefill", 1)


def test_a_batch_of_nothing_is_refused(common, capsys):
    for command in ("tune", "compare"):
        assert main([command, *common, "--batch", "0"]) == 2
        assert "batch_size = 0" in capsys.readouterr().err
