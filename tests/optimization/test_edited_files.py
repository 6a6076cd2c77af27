"""Result files that were edited by hand, or are of another version: one line names the file."""

from __future__ import annotations

import json

import pytest
from results_folders import write_run

from var_moe.cli import main
from var_moe.errors import UsageError
from var_moe.optimization.candidate import load_candidate
from var_moe.optimization.results import CONFIG_FILE, METADATA_FILE
from var_moe.optimization.selection import answer_from
from var_moe.optimization.validation import profile_beside

POINT = {
    "verified": True,
    "name": "balanced",
    "config": {"policy": "top_p", "settings": {"p": 0.7}},
    "degradation": 0.001,
    "degradation_upper_95": 0.002,
    "experts_per_token": 1.5,
    "speedup": 1.2,
    "speedup_95": [1.1, 1.3],
}


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def write_front(folder, **changes):
    front = {"schema_version": 1, "points": [{**POINT, **changes}]}
    (folder / "pareto.json").write_text(json.dumps(front))


@pytest.mark.parametrize("changed", [{"settings": 3}, {"profile": "x"}])
def test_metadata_beside_a_front(tmp_path, capsys, changed):
    folder = write_run(tmp_path / "run", seed=1)
    write_front(folder)
    (folder / "profile").mkdir()
    edit(folder / METADATA_FILE, **changed)
    assert main(["tune", "--from", str(folder), "--max_degradation", "0.02"]) == 2
    assert f"{METADATA_FILE}: not as this version" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changed",
    [
        {"degradation_upper_95": [None]},
        {"degradation_upper_95": "0.002"},
        {"config": {"policy": "top_p"}},
        {"config": None},
    ],
)
def test_a_front(tmp_path, changed):
    write_front(tmp_path, **changed)
    with pytest.raises(UsageError, match=r"pareto\.json: "):
        answer_from(tmp_path, 0.02)


@pytest.mark.parametrize("value", ["x", 3, []])
def test_what_the_metadata_say_of_the_profile(tmp_path, value):
    folder = write_run(tmp_path / "run", seed=1)
    edit(folder / METADATA_FILE, profile=value)
    if value == []:
        assert profile_beside(folder / CONFIG_FILE) is None
        return
    with pytest.raises(UsageError, match=METADATA_FILE):
        profile_beside(folder / CONFIG_FILE)


@pytest.mark.parametrize(
    "changed", [{"policy": "top_q"}, {"settings": {"p": "0.7"}}, {"settings": {"q": 1}}]
)
def test_an_error_in_a_configuration_names_its_file(tmp_path, changed):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**POINT["config"], **changed}))
    with pytest.raises(UsageError, match=r"mine\.json: "):
        load_candidate(path).make(None)
