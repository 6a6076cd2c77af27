"""A command that ends before all is measured: what it says, keeps and reports."""

from __future__ import annotations

import json

import pytest

from var_moe.analysis import pipeline
from var_moe.cli import main
from var_moe.evaluation import sweep
from var_moe.evaluation.evaluator import Evaluator
from var_moe.optimization import preparation

KEEPS = "keeps what was measured, without "


@pytest.fixture
def fails(monkeypatch):
    """Let a function fail at its n-th call."""

    def patch(owner, name, *, at=1, error=RuntimeError):
        before, calls = getattr(owner, name), []

        def failing(*args, **options):
            calls.append(args)
            if len(calls) == at:
                raise error("out of memory")
            return before(*args, **options)

        monkeypatch.setattr(owner, name, failing)

    return patch


@pytest.fixture
def kept(common, tmp_path, capsys):
    """Run a command that must end early; returns its file and its last line."""

    def run(file, *words, code=1):
        out = tmp_path / "out"
        assert main([*words, *common, "--output", str(out), "--quiet"]) == code
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert KEEPS in line
        assert str(out / file) in line
        found = json.loads((out / file).read_text())
        assert found["incomplete"] in line
        assert main(["report", str(out)]) == 0
        assert f"{file}: without {found['incomplete']}" in (out / "report.html").read_text("utf-8")
        return found

    return run


EVALUATE = ("evaluate", "--preset", "keep_all", "--policy", "top_p", "--max_samples", "6")


def test_a_failure_while_generating_keeps_quality_and_throughput(kept, fails):
    fails(Evaluator, "speed", at=3)
    found = kept("evaluation.json", *EVALUATE, "--blocks", "1")
    assert found["incomplete"] == "generation"
    assert [row["name"] for row in found["rows"]] == ["baseline", "keep_all", "top_p"]
    for row in found["rows"]:
        assert row["perplexity"] > 1
        assert row["throughput_tps"] > 0


def test_an_interrupt_while_timing_keeps_the_quality_of_all(kept, fails):
    fails(Evaluator, "speed", at=2, error=KeyboardInterrupt)
    found = kept("evaluation.json", *EVALUATE, "--blocks", "1", code=130)
    assert found["incomplete"] == "throughput, generation"
    assert all(row["perplexity"] > 1 for row in found["rows"])
    assert "throughput_tps" in found["rows"][1]
    assert "throughput_tps" not in found["rows"][2]


def test_a_failure_while_scoring_names_the_policies_that_wait(kept, fails):
    fails(Evaluator, "quality", at=2)
    found = kept("evaluation.json", *EVALUATE, "--blocks", "1", "--decode_blocks", "0")
    assert found["incomplete"] == "top_p, throughput"


def test_what_is_kept_is_the_json_answer(common, fails, tmp_path, capsys):
    fails(Evaluator, "speed", at=3)
    words = [*EVALUATE, *common, "--blocks", "1", "--output", str(tmp_path), "--quiet", "--json"]
    assert main(words) == 1
    assert json.loads(capsys.readouterr().out)["incomplete"] == "generation"


def test_a_whole_result_does_not_call_itself_incomplete(common, tmp_path):
    words = [*EVALUATE, *common, "--blocks", "1", "--decode_blocks", "0", "--quiet"]
    assert main([*words, "--output", str(tmp_path)]) == 0
    assert "incomplete" not in json.loads((tmp_path / "evaluation.json").read_text())


def test_compare_keeps_its_points(kept, fails):
    fails(sweep, "timed", at=2)
    words = ["compare", "--policies", "top_p", "--experts", "1.5", "--max_samples", "6"]
    found = kept("comparison.json", *words, "--blocks", "1")
    assert [row["speedup"] is None for row in found["rows"]] == [False, True]


def test_validate_keeps_quality_and_the_runs_before(kept, fails, config):
    fails(Evaluator, "speed", at=3)
    words = ["tune", "--validate", str(config), "--split", "validation", "--max_samples", "6"]
    found = kept("validation_results.json", *words)
    assert found["incomplete"] == "throughput after 2 of 3 runs"
    assert found["degradation"] is not None
    assert found["random_skip"]["experts_per_token"] > 0
    assert len(found["runs"]) == 2


@pytest.mark.slow
def test_analyze_keeps_its_parts(kept, fails, config, tmp_path):
    fails(pipeline, "measure_scaling")
    words = ["analyze", "--quick", "--var_config", str(config), "--n_samples", "6"]
    found = kept("systems_analysis.json", *words)
    assert found["comparison"]["actual_speedup"] > 0
    assert found["var"]["kind"].startswith("policy top_p")
    assert (tmp_path / "out" / "profile_report.json").is_file()


@pytest.fixture
def config(common, tmp_path):
    """A configuration with a profile beside it."""
    folder = tmp_path / "found"
    words = ["profile", *common, "--damage_tokens", "0", "--output", str(folder / "profile")]
    assert main([*words, "--quiet"]) == 0
    (folder / "c.json").write_text(json.dumps({"policy": "top_p", "settings": {"p": 0.8}}))
    return folder / "c.json"


# -- what is known at the start is said at the start ------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "--compensation", "none,means,learned"], "'means': expected one of none"),
        (["evaluate", "--policy", "naee", "--compensation", "learned"], "'learned'"),
        (["evaluate", "--policy", "naee", "--compensation", "means"], "K = 2 alone"),
    ],
)
def test_a_compensation_that_there_can_not_be(
    words, message, make_tiny_mixtral, tiny_tokenizer, common, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "four"
    make_tiny_mixtral(top_k=4).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    monkeypatch.setattr(preparation, "collect_profile", None)  # profiling would be too late
    rest = ["--model", str(folder), *common[2:], "--output", str(tmp_path / "o"), "--quiet"]
    assert main([*words, *rest]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "--split", "tset"], "split 'tset'"),
        (["compare", "--split", "tset"], "split 'tset'"),
        (["analyze", "--split", "tset"], "split 'tset'"),
        (["trace", "--split", "tset"], "split 'tset'"),
        (["profile", "--split", "tset"], "split 'tset'"),
        (["evaluate", "--policy", "naee", "--set", "q=1"], "unknown setting 'q'"),
        (["evaluate", "--policy", "var_plain", "--set", "cache=1"], "unknown field 'cache'"),
        (["evaluate", "--profile", "NOWHERE"], "no such profile folder"),
        (["trace", "--profile", "NOWHERE"], "no such profile folder"),
    ],
)
def test_the_model_is_not_loaded_for_nothing(words, message, common, tmp_path, monkeypatch, capsys):
    def loaded(*_, **__):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("var_moe.models.loading.load_model", loaded)
    assert main([*words, *common, "--output", str(tmp_path / "o"), "--quiet"]) == 2
    assert message in capsys.readouterr().err


# -- what is not needed is not made -----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "--preset", "keep_all", "--decode_blocks", "0"],
        ["evaluate", "--policy", "ser", "--decode_blocks", "0"],
        ["compare", "--policies", "top_p,ser", "--experts", "1.5"],
    ],
)
def test_no_profile_where_nothing_needs_it(words, common, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "collect_profile", None)
    monkeypatch.setattr(preparation, "with_damages", None)
    rest = ["--blocks", "1", "--max_samples", "8", "--output", str(tmp_path), "--quiet"]
    assert main([*words, *common, *rest]) == 0
    assert not (tmp_path / "profile").exists()
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["profile_hash"] is None


def test_no_backward_pass_where_no_damage_is_needed(common, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "with_damages", None)
    words = ["evaluate", *common, "--policy", "naee", "--decode_blocks", "0", "--blocks", "1"]
    assert main([*words, "--max_samples", "8", "--output", str(tmp_path), "--quiet"]) == 0
    assert not list((tmp_path / "profile").glob("damage*"))
