"""The words that every command takes: --json, --options, --config FILE.yaml, --show-config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from var_moe.cli import main
from var_moe.cli.output import CommandResult, run
from var_moe.cli.words import read_words
from var_moe.errors import UsageError, VarMoeError


@pytest.fixture
def options(tmp_path):
    """Write a file of options."""

    def write(text, name="options.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def shown(capsys, *words):
    assert main([*words, "--show-config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_words_are_told_from_a_commands_own():
    words = read_words(["evaluate", "--json", "--max-samples", "3", "--config", "a.json"])
    assert words.rest == ("evaluate", "--max_samples", "3", "--config", "a.json")
    assert words.json
    assert not words.debug
    assert words.options is None
    for given in (["--options", "a.yml"], ["--config", "a.yml"], ["--config=a.yml"]):
        words = read_words(["tune", *given, "--debug"])
        assert words.options == Path("a.yml")
        assert words.rest == ("tune",)


def test_the_home_folder_is_meant_wherever_a_path_is_given(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = options("model: ~/m\nprofile: '~'\ndataset: ~/a,demo, ~/b\nbounds: [tau=~]\n")
    found = shown(capsys, "tune", "--options=~/options.yaml", "--output=~/there")
    assert found == shown(capsys, "tune", "--options", path, "--output", "~/there")
    assert found["output"] == f"{tmp_path}/there"
    assert found["model"] == f"{tmp_path}/m"
    assert found["profile"] == str(tmp_path)
    assert found["dataset"] == f"{tmp_path}/a,demo, {tmp_path}/b"
    assert found["bounds"] == ["tau=~"]
    found = shown(capsys, "report", "~/r", "--output", "~no-such-user/x~y")
    assert (found["results"], found["output"]) == (f"{tmp_path}/r", "~no-such-user/x~y")


def test_words_of_another_program_are_left_alone():
    given = ["lm-eval", "--model_args", "a=b", "--json", "--some-thing"]
    assert read_words(given).rest == tuple(given)


@pytest.mark.parametrize(
    "words", [["--options"], ["--options", "--json"], ["--options", "a.yaml", "--config", "b.yaml"]]
)
def test_options_needs_one_file(words):
    with pytest.raises(UsageError, match="--options"):
        read_words(["tune", *words])


def test_options_come_from_a_file_and_words_win(options, capsys):
    path = options(
        "n-calls: 7\nbounds: [tau=0.1:1]\nfrom: before\nquiet: true\nseed: 5\n"
        "trust-remote-code: true\n"
    )
    found = shown(capsys, "tune", "--config", path, "--seed", "9")
    assert found["n_calls"] == 7
    assert found["bounds"] == ["tau=0.1:1"]
    assert found["from"] == "before"
    assert found["quiet"] is True
    assert found["trust_remote_code"] is True
    assert found["seed"] == 9
    assert found["split"] == "test"  # a default
    assert found["device"] == "auto"  # a default of options that commands share


@pytest.mark.parametrize(
    "words",
    [
        ["tune", "--bounds", "tau=0.1:1", "--bounds", "p=0:1", "--output", "there"],
        ["compare", "--policies", "naee", "ser", "--experts", "1.5", "1.25"],
        ["evaluate", "--config", "mine.json", "--preset", "balanced"],
        ["certify", "results/x", "--alpha", "0.1", "--robust"],
        ["replay", "trace", "--profile", "named/as/a/command"],
        ["replay", "trace", "--grid", "3"],
    ],
)
def test_what_is_shown_can_be_fed_in_again(words, options, capsys):
    found = shown(capsys, *words)
    path = options(yaml.safe_dump(found))
    assert shown(capsys, words[0], "--options", path) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("n_cals: 3", "n_cals"),
        ("n_calls: many", "n_calls"),
        ("n_calls: [1, 2]", "n_calls"),
        ("method: magic", "magic"),
        ("quiet: perhaps", "quiet"),
        ("- n_calls", "expected `option: value`"),
        ("n_calls: [", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_one_line_with_file_and_key(text, said, options, capsys):
    assert main(["tune", "--options", options(text)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert "options.yaml" in lines[0]


def test_a_missing_file_is_said(capsys):
    assert main(["tune", "--options", "none.yaml"]) == 2
    assert "none.yaml: no such file" in capsys.readouterr().err


def test_the_result_is_alone_on_stdout(capsys):
    def command():
        print("a table")
        return CommandResult({"speedup": 1.5, "place": Path("there"), "odd": float("nan")}, code=1)

    assert run(command, as_json=True) == 1
    said = capsys.readouterr()
    assert json.loads(said.out) == {"speedup": 1.5, "place": "there", "odd": None}
    assert said.err == "a table\n"
    assert run(command, as_json=False) == 1
    assert capsys.readouterr().out == "a table\n"


def test_a_failure_with_a_result_prints_it(capsys):
    def command():
        error = VarMoeError("not certified")
        error.result = {"certified": False}
        raise error

    with pytest.raises(VarMoeError):
        run(command, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"certified": False}


def test_json_of_a_profile_is_what_was_saved(common, tmp_path, capsys):
    words = ["profile", *common, "--max_tokens", "600", "--damage_tokens", "0", "--json"]
    assert main([*words, "--output", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == json.loads((tmp_path / "profile.json").read_text())
    assert "confidence" in said.err  # the table


def test_completion_is_installed_on_request(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", "/bin/bash")
    assert main(["--install-completion", "--shell", "bash"]) == 0
    scripts = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("--max_degradation" in path.read_text() for path in scripts)
