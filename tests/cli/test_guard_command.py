"""``var-moe guard`` end to end on a tiny random model."""

from __future__ import annotations

import json
import random

import pytest

from var_moe.cli import main
from var_moe.routing.guard import Guard

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def text(tiny_texts, tmp_path_factory):
    """Enough documents for a calibration."""
    dice = random.Random(5)
    words = " ".join(tiny_texts).split()
    folder = tmp_path_factory.mktemp("many")
    for name, number in (("calibration", 20), ("validation", 120)):
        texts = [" ".join(dice.choices(words, k=dice.randint(10, 30))) for _ in range(number)]
        lines = "".join(json.dumps({"text": line}) + "\n" for line in texts)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def results(tiny_model_folder, text, tmp_path_factory):
    """A results folder with a configuration and its profile."""
    folder = tmp_path_factory.mktemp("results")
    chosen = {"policy": "top_p", "settings": {"p": 0.75}}
    (folder / "best_config.json").write_text(json.dumps(chosen))
    words = ["profile", "--model", str(tiny_model_folder), "--dataset", str(text)]
    assert main([*words, "--output", str(folder / "profile"), "--quiet"]) == 0
    return folder


def test_calibrates_and_checks(results, tiny_model_folder, text, tmp_path, capsys) -> None:
    words = ["guard", str(results), "--model", str(tiny_model_folder), "--dataset", str(text)]
    words += ["--output", str(tmp_path), "--action", "fallback", "--check", str(text), "--quiet"]
    assert main(words) == 0
    guard = Guard.load(tmp_path / "guard.json")
    assert guard.action == "fallback"
    assert guard.expectation.head["documents"] == 60
    assert guard.expectation.policy["p"] == 0.75
    check = json.loads((tmp_path / "guard_check.json").read_text())
    assert [row["documents"] for row in check["checks"]] == [60, 120]
    assert check["checks"][0]["alarm_at"] is None
    assert check["checks"][0]["departure"]["agreement_by_tier"] == {"fast": None, "cached": None}
    out = capsys.readouterr().out
    assert "On other text" in out
    assert "other half" in out
    assert "guard_check.json" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max_samples", "30"], "30 document(s): calibrating a guard needs at least 40"),
        (["--alpha", "0"], "alpha = 0.0: expected a number in (0, 0.5]"),
        (["--check", "nowhere.txt"], "nowhere.txt"),
        (["--tolerance", "-1"], "Guard.tolerance = -1.0"),
    ],
)
def test_one_line_for_what_is_wrong(
    results, tiny_model_folder, text, tmp_path, capsys, words, said
) -> None:
    common = ["guard", str(results), "--model", str(tiny_model_folder), "--dataset", str(text)]
    code = main([*common, "--output", str(tmp_path), "--quiet", *words])
    error = capsys.readouterr().err
    assert code == 2
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "guard.json").exists()
