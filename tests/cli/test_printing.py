"""What is printed: names as they are, in every encoding, to readers that may be gone."""

from __future__ import annotations

import io
import json
import os
import shlex
import sys

import pytest
from rich.table import Table

from var_moe.cli import main
from var_moe.cli.output import StageProgress
from var_moe.terminal import show

NAMES = ("set[/v2]", "runs/[final] v2", "[red]", ":warning: it's", "名前", "two  spaces")
FILES = {"profile.json", "report.html", "routing_stats.parquet"}


@pytest.fixture
def front(tmp_path):
    """A finished search, as far as `tune --from` asks for it."""

    def make(name):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        point = {
            "verified": True,
            "config": {"policy": "top_p", "settings": {"p": 0.7}},
            "name": name,
            "degradation": 0.005,
            "degradation_upper_95": 0.007,
            "speedup": 1.2,
            "speedup_95": [1.1, 1.3],
            "experts_per_token": 1.9,
        }
        front = {"schema_version": 1, "points": [point]}
        (folder / "pareto.json").write_text(json.dumps(front))
        (folder / "optimization_metadata.json").write_text("{}")
        return folder

    return make


@pytest.mark.parametrize("name", NAMES)
def test_names_are_printed_as_they_are_and_quoted_for_a_shell(name, front, capsys):
    folder = front(name)
    assert main(["tune", "--from", str(folder), "--max_degradation", "0.01"]) == 0
    said = capsys.readouterr().out
    config = str(folder / "bound_1pct" / "best_config.json")
    assert f"│ {name} " in said  # a cell of the table
    assert f"Saved: {config}" in said.splitlines()
    *_, line = said.splitlines()
    words = shlex.split(line.removeprefix("Next: "))
    assert words == ["var-moe", "tune", "--validate", config]


def test_a_title_and_a_line_hold_no_markup():
    out = io.StringIO()
    table = Table(title="of [/v2] :warning:")
    table.add_column("[bold]head[/bold]")
    show("line [/v2] " + "long " * 40, table, stream=out)
    assert out.getvalue().splitlines()[0] == "line [/v2] " + "long " * 40
    assert "of [/v2] :warning:" in out.getvalue()
    assert "[bold]head[/bold]" in out.getvalue()


def test_a_bar_takes_a_stage_with_brackets(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with StageProgress() as progress:
        progress("playing set[/v2]", 1, 2)
        progress.say("of set[/v2]")
    assert "of set[/v2]" in capsys.readouterr().err


@pytest.fixture
def profiled(common, tmp_path, monkeypatch):
    """Profile with another stdout; returns the exit code and what is in the folder."""

    def run(stdout, *words):
        monkeypatch.setattr(sys, "stdout", stdout)
        folder = tmp_path / "名前"
        words = ("profile", *common, "--max_tokens", "600", "--damage_tokens", "0", *words)
        code = main([*words, "--output", str(folder)])
        return code, {path.name for path in folder.iterdir()}

    return run


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_every_encoding_prints_every_name(encoding, profiled):
    raw = io.BytesIO()
    code, files = profiled(io.TextIOWrapper(raw, encoding=encoding))
    assert code == 0
    assert files >= FILES
    name = "名前" if encoding == "utf-8" else r"\u540d\u524d"
    assert "Profile: " in raw.getvalue().decode(encoding)
    assert f"{name}/report.html" in raw.getvalue().decode(encoding)


def test_a_closed_pipe_ends_nothing(profiled, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as stdout:
        code, files = profiled(stdout)
    assert code == 0
    assert files >= FILES
    assert "error" not in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
@pytest.mark.parametrize("words", [(), ("--json",)])
def test_a_full_disk_below_stdout_is_one_line(words, profiled, capsys):
    with open("/dev/full", "w", encoding="utf-8") as stdout:  # noqa: PTH123
        code, files = profiled(stdout, *words)
    assert code == 1
    assert files >= FILES
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: stdout cannot be written (No space left")
    assert said.count("error") == 1


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_stream_leads_nowhere(stream, profiled, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None if stream == "stderr" else sys.stderr)
    code, files = profiled(None if stream == "stdout" else sys.stdout)
    assert code == 0
    assert files >= FILES


@pytest.mark.parametrize("name", ["[/x]", "[final", "{1}"])
def test_a_name_with_brackets_is_no_json(name, capsys):
    assert main(["report", name]) == 2
    assert f"error: {name}: no such folder" in capsys.readouterr().err
