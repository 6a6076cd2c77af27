"""``var-moe lm-eval`` on a task of its own, a tiny model and no network."""

from __future__ import annotations

import copy
import json
import shutil

import pytest

from var_moe.cli import main

pytest.importorskip("lm_eval")

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A multiple-choice task as a YAML file beside its data."""
    folder = tmp_path_factory.mktemp("task")
    rows = [
        {"question": "the router sends a", "choices": [" token", " list"], "answer": 0},
        {"question": "order and group", "choices": [" dict", " by value"], "answer": 1},
        {"question": "select from", "choices": [" where", " cache"], "answer": 1},
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny_choice.yaml").write_text(TASK.format(data=data))
    return folder


@pytest.fixture(scope="module")
def results(common, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    words = ["profile", *common, "--max_tokens", "900", "--damage_tokens", "0", "--quiet"]
    assert main([*words, "--output", str(folder / "profile")]) == 0
    config = {"policy": "top_p", "settings": {"p": 0.6}}
    (folder / "best_config.json").write_text(json.dumps(config))
    assert main(["export", str(folder)]) == 0
    return folder


def harness(model, config, task, output):
    words = ["--model", "var-moe", "--model_args", f"pretrained={model},var_config={config}"]
    words += ["--tasks", "tiny_choice", "--include_path", str(task), "--device", "cpu"]
    assert main(["lm-eval", *words, "--output_path", str(output)]) == 0
    return json.loads(next(output.rglob("results*.json")).read_text())


@pytest.mark.slow
def test_an_exported_folder_and_a_configuration_answer_alike(common, results, task, tmp_path):
    found = [
        harness(common[1], config, task, tmp_path / str(number))
        for number, config in enumerate((results / "export", results / "best_config.json"))
    ]
    one, other = (result["results"]["tiny_choice"] for result in found)
    assert one == other
    assert 0 <= one["acc,none"] <= 1
    assert 1 <= found[0]["config"]["var_moe"]["experts_per_token"] < 2


@pytest.mark.slow
def test_without_a_configuration_it_is_refused(common, task, capsys):
    words = ["--model", "var-moe", "--model_args", f"pretrained={common[1]}"]
    words += ["--tasks", "tiny_choice", "--include_path", str(task)]
    assert main(["lm-eval", *words]) == 2
    assert "var_config is missing" in capsys.readouterr().err


@pytest.mark.slow
def test_a_token_without_an_embedding_is_refused_before_the_work(
    common, results, task, tiny_tokenizer, tmp_path, capsys
):
    model, data = tmp_path / "model", tmp_path / "data.jsonl"
    shutil.copytree(common[1], model)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    row = {"question": "<|im_start|>the router", "choices": [" token", " list"], "answer": 0}
    data.write_text(json.dumps(row) + "\n")
    (tmp_path / "tiny_choice.yaml").write_text(TASK.format(data=data))
    tokenizer.save_pretrained(model)
    config = tmp_path / "best_config.json"
    config.write_text(json.dumps({"policy": "top_p", "settings": {"p": 0.6}}))
    words = ["profile", "--model", str(model), *common[2:], "--damage_tokens", "0", "--quiet"]
    assert main([*words, "--output", str(tmp_path / "profile")]) == 0
    words = ["--model", "var-moe", "--model_args", f"pretrained={model},var_config={config}"]
    words += ["--tasks", "tiny_choice", "--include_path", str(tmp_path), "--device", "cpu"]
    assert main(["lm-eval", *words]) == 2
    assert "token '<|im_start|>' has id 300, and the model's embedding" in capsys.readouterr().err
