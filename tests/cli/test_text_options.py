"""``--text_column`` on every command that takes a data set, and what its text is refused for."""

from __future__ import annotations

import json

import pytest

from var_moe.cli import main
from var_moe.cli.main import build_app
from var_moe.cli.words import normalise

TAKING = ["tune", "certify", "guard", "profile", "evaluate", "compare", "trace", "analyze"]


@pytest.fixture
def table(tmp_path, tiny_texts):
    """Ids beside numbers: no column is clearly the text."""
    path = tmp_path / "x.jsonl"
    rows = [{"id": f"identity_{i}", "body": [1], "n": i} for i in range(len(tiny_texts))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("command", [*TAKING, "fit-compensation"])
def test_every_command_with_a_data_set_takes_it(command):
    arguments = build_app()[command].assemble_argument_collection()
    names = normalise([name for argument in arguments for name in argument.names])
    assert names.index("--text_column") == names.index("--dataset") + 1


@pytest.mark.parametrize("way", ["words", "suffix", "file"])
def test_the_column_is_named_and_recorded(way, table, tiny_model_folder, tmp_path, capsys):
    words = ["profile", "--model", str(tiny_model_folder), "--damage_tokens", "0", "--quiet"]
    words += ["--max_tokens", "100", "--output", str(tmp_path / "out")]
    assert main([*words, "--dataset", table]) == 2
    assert "no column 'text'; it has id, body, n; name the one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "o.yaml").write_text("text_column: id\n")
    more = {
        "words": ["--dataset", table, "--text-column", "id"],
        "suffix": ["--dataset", f"{table}::id"],
        "file": ["--dataset", table, "--options", str(tmp_path / "o.yaml")],
    }
    assert main([*words, *more[way]]) == 0
    head = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert head["dataset"] == f"{table}::id"
    assert head["tokens"] == 100


def test_a_column_without_its_data_set_is_refused(capsys):
    assert main(["profile", "--text_column", "body"]) == 2
    assert "--text_column body needs the --dataset that has it" in capsys.readouterr().err
