"""Bad input: one line on stderr that names it, exit code 2, nothing written."""

from __future__ import annotations

import json
import time

import pytest

from var_moe.cli import main


@pytest.fixture
def refused(capsys):
    """Run a command that must be refused; returns its one line."""

    def run(*words, code=2):
        assert main([str(word) for word in words]) == code
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1
        assert captured.err.strip().splitlines()[-1] == lines[0]
        assert "Traceback" not in captured.err
        return lines[0]

    return run


def test_missing_config_file(refused, tmp_path):
    line = refused("tune", "--validate", tmp_path / "no.json")
    assert "no.json: no such VAR configuration" in line


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"frequncy_threshold": 3}, "unknown field 'frequncy_threshold'"),
        ({"confidence_threshold": 1.5}, "confidence_threshold = 1.5: expected a number in (0, 1]"),
        ({"cache_size": 2.5}, "cache_size = 2.5: expected an integer"),
        ([1, 2], "expected a JSON object"),
    ],
)
def test_bad_config_fields(refused, tmp_path, content, expected):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    line = refused("evaluate", "--config", path)
    assert expected in line
    assert "config.json" in line


def test_config_that_is_no_json(refused, tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{")
    assert "not valid JSON" in refused("evaluate", "--config", path)


def test_model_that_is_no_moe(refused, tmp_path, tiny_tokenizer, tiny_text_folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    words = ["--dataset", tiny_text_folder, "--output", tmp_path / "out"]
    line = refused("tune", "--model", tmp_path / "dense", *words)
    assert "'llama'" in line
    assert "not a Mixture of Experts" in line
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def top_1_folder(tmp_path_factory, make_tiny_mixtral, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("top-1")
    make_tiny_mixtral(top_k=1, layers=1).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "words", [["tune"], ["tune", "--policy", "var"], ["tune", "--seeds", "1,2"], ["compare"]]
)
def test_one_expert_per_token(refused, tmp_path, top_1_folder, tiny_text_folder, words):
    output = tmp_path / "out"
    line = refused(
        *(*words, "--model", top_1_folder, "--dataset", tiny_text_folder, "--output", output),
    )
    assert "runs one expert per token: there is nothing to drop" in line
    assert not (output / "profile").exists()


def test_one_expert_per_token_in_a_trace(refused, tmp_path, top_1_folder, tiny_text_folder):
    words = ["--model", top_1_folder, "--dataset", tiny_text_folder, "--output", tmp_path]
    assert main([str(word) for word in ["trace", *words, "--quiet"]]) == 0
    assert "there is nothing to drop" in refused("replay", tmp_path, "--grid", "2")


def test_one_expert_per_token_in_python(tmp_path, top_1_folder, tiny_texts):
    from optimization.hyperparameter_optimization import create_objective_function
    from var_moe.certification.certify import certify
    from var_moe.errors import UsageError
    from var_moe.models.loading import load_model

    loaded = load_model(str(top_1_folder))
    with pytest.raises(UsageError, match="there is nothing to drop"):
        certify(loaded, tmp_path, dataset="demo")
    with pytest.raises(UsageError, match="there is nothing to drop"):
        create_objective_function(
            model=loaded.model, tokenizer=loaded.tokenizer, validation_data=tiny_texts
        )


def test_model_folder_that_is_missing_or_empty(refused, tmp_path):
    assert "no such folder" in refused("profile", "--model", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused("profile", "--model", tmp_path / "empty")


def test_unreachable_hub_is_said_quickly(refused, monkeypatch):
    monkeypatch.setattr("var_moe.hub.reachable", lambda: False)
    start = time.perf_counter()
    line = refused("tune", "--model", "mistralai/Mixtral-8x7B-v0.1")
    assert "out of reach" in line
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("name", ["wikitext", "someone/some_data:config"])
def test_unreachable_dataset(refused, monkeypatch, tiny_model_folder, tmp_path, name):
    monkeypatch.setattr("var_moe.hub.reachable", lambda: False)
    words = ["--dataset", name, "--output", tmp_path / "out"]
    line = refused("tune", "--model", tiny_model_folder, *words)
    assert f"dataset {name!r}" in line


def test_empty_text(refused, tmp_path, tiny_model_folder):
    path = tmp_path / "empty.txt"
    path.write_text("\n\n")
    line = refused("tune", "--model", tiny_model_folder, "--dataset", path, "--output", tmp_path)
    assert "empty.txt: holds no text" in line


def test_text_shorter_than_a_window(refused, tmp_path, tiny_model_folder):
    for split in ("calibration", "validation"):
        (tmp_path / f"{split}.txt").write_text("\f".join(["short text"] * 3))
    words = ["--dataset", tmp_path, "--output", tmp_path / "out"]
    line = refused("evaluate", "--model", tiny_model_folder, *words)
    assert "shorter than one row of 32 tokens" in line


def test_too_few_documents(refused, tmp_path, tiny_model_folder):
    (tmp_path / "validation.txt").write_text("\f".join(["a text of some words"] * 3))
    words = ["--dataset", tmp_path, "--output", tmp_path / "out"]
    line = refused("tune", "--model", tiny_model_folder, *words)
    assert "too few documents" in line
    assert "at least 20 needed" in line


def test_profile_of_another_model(
    refused, tmp_path, tiny_model_folder, tiny_text_folder, make_tiny_mixtral, tiny_tokenizer
):
    other = tmp_path / "other"
    make_tiny_mixtral(layers=2).save_pretrained(other)
    tiny_tokenizer.save_pretrained(other)
    profile = tmp_path / "profile"
    words = ["--dataset", tiny_text_folder, "--output", profile, "--quiet"]
    assert main(["profile", "--model", str(other), *map(str, words)]) == 0
    line = refused(
        *("evaluate", "--model", tiny_model_folder, "--dataset", tiny_text_folder),
        *("--profile", profile, "--output", tmp_path / "out"),
    )
    assert str(other) in line
    assert str(tiny_model_folder) in line
    assert "number of MoE layers" in line


def test_damaged_profile(refused, tmp_path, tiny_model_folder, tiny_text_folder):
    profile = tmp_path / "profile"
    common = ["--model", tiny_model_folder, "--dataset", tiny_text_folder]
    assert main([str(w) for w in ["profile", *common, "--output", profile, "--quiet"]]) == 0
    whole = (profile / "routing_stats.parquet").read_bytes()
    (profile / "routing_stats.parquet").write_bytes(whole[: len(whole) // 2])
    line = refused("evaluate", *common, "--profile", profile, "--output", tmp_path / "out")
    assert "damaged profile" in line


def test_negative_bound(refused):
    assert "max_degradation = -0.1" in refused("tune", "--max_degradation", "-0.1")


def test_output_that_is_a_file(refused, tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    for command in ("tune", "profile", "evaluate"):
        assert "is a file; --output expects a folder" in refused(command, "--output", path)
        assert "is a file" in refused(command, "--output", path / "below")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tune", "--method", "magic"], "magic"),
        (["tune", "--method", "replay", "--policy", "native"], "nothing to tune"),
        (["tune", "--from", "nowhere"], "--from needs --max_degradation"),
        (["tune", "--from", "nowhere", "--max_degradation", "0.1"], "pareto.json"),
        (["tune", "--n_cals", "3"], "--n_cals"),
        (["tune", "--n_calls", "many"], "many"),
        (["tune", "--bounds", "entropy_threshold=2"], "entropy_threshold=2"),
        (["tune", "--bounds", "entropy=0:1"], "entropy"),
        (["tune", "--bounds", "tau=0:1"], "(policy var; --policy takes another)"),
        (["tune", "--n_calls", "0"], "n_calls = 0"),
        (["tune", "--method", "grid", "--n_points", "40"], "n_points = 40: a grid of "),
        (["evaluate", "--preset", "bold"], "preset 'bold'"),
        (["tune", "--dtype", "int4"], "int4"),
        (["profile", "--dataset", "demo-klingon"], "demo-klingon"),
        (["evaluate", "--split", "train"], "split 'train'"),
        (["bogus"], "bogus"),
    ],
)
def test_bad_words(refused, words, expected, tmp_path, tiny_model_folder):
    if words[0] != "bogus":
        words = [*words, "--output", str(tmp_path / "out")]
        if "--dtype" not in words:
            words += ["--model", str(tiny_model_folder)]
    assert expected in refused(*words)


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(Exception, match="no such VAR configuration"):
        main(["tune", "--validate", str(tmp_path / "no.json"), "--debug"])


COMMANDS = ("tune", "profile", "evaluate", "compare", "trace", "analyze", "certify x", "guard x")


@pytest.mark.parametrize("command", [*COMMANDS, "fit-compensation --profile x"])
def test_a_seed_is_checked_by_every_command(refused, command, tmp_path):
    for seed in ("-1", str(2**32), str(2**64)):
        line = refused(*command.split(), "--seed", seed, "--output", tmp_path / "out")
        assert f"seed = {seed}: expected an integer in [0, 4294967295]" in line
    assert "--seed" in refused(*command.split(), "--seed", "1.5")
    path = tmp_path / "options.yaml"
    path.write_text("seed: -1\n")
    assert "seed = -1" in refused(*command.split(), "--options", path)
    assert not (tmp_path / "out").exists()
