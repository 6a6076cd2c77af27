"""Bad input to ``certify``: one line that names it, exit code 2, nothing written."""

from __future__ import annotations

import json

import pytest
from certification_helpers import skip

from var_moe.cli import main


@pytest.fixture
def refused(capsys):
    def run(*words):
        assert main(["certify", *map(str, words)]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert [line for line in lines if line.startswith("error:")] == lines[-1:]
        return lines[-1]

    return run


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--max_degradation", "0"], "max_degradation = 0.0: expected a number in (0, "),
        (["--max_degradation", "-1"], "max_degradation = -1"),
        (["--alpha", "0"], "alpha = 0.0: expected a number in (0, 0.5)"),
        (["--alpha", "0.5"], "alpha = 0.5"),
        (["--alpha", "nan"], "alpha = nan"),
        (["--candidates", "0"], "candidates = 0: expected an integer in [1, 10]"),
        (["--candidates", "11"], "candidates = 11"),
        (["--blocks", "-1"], "blocks = -1"),
        (["--max_samples", "1"], "max_samples = 1: expected an integer of at least 2"),
        (["--max_learned_pct", "0"], "max_learned_pct = 0"),
        (["--dataset", "demo-klingon"], "demo-klingon"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--bogus", "1"], "--bogus"),
    ],
)
def test_bad_words(refused, results, words, more, expected):
    folder = results(skip(0.1))
    before = sorted(folder.iterdir())
    given = [] if more[0] in ("--dataset", "--model") else words
    assert expected in refused(folder, *given, *more)
    assert sorted(folder.iterdir()) == before


def test_too_few_blocks_for_a_speedup_bound(refused, results, words, made_up):
    folder = results(skip(0.1))
    line = refused(folder, *words, "--blocks", "5")
    assert "blocks = 5: a speedup bound at 1% needs at least 7 blocks" in line
    assert [path.name for path in folder.iterdir()] == ["best_config.json"]


def test_no_such_folder(refused, tmp_path):
    assert "none: no such folder" in refused(tmp_path / "none")


def test_an_empty_folder(refused, tmp_path):
    assert "neither pareto.json nor best_config.json" in refused(tmp_path)


def test_a_configuration_that_is_wrong(refused, results):
    assert "unknown field 'frequncy'" in refused(results({"frequncy": 3}))
    assert "'random_skip'" in refused(results({"policy": "random_skp", "settings": {}}))


def test_no_profile(refused, results):
    assert "no profile beside it" in refused(results(skip(0.1)))


def test_a_damaged_ledger(refused, results, words):
    folder = results(skip(0.1))
    (folder / "certify_ledger.json").write_text("{")
    assert "certify_ledger.json: not valid JSON" in refused(folder, *words)


def test_too_little_text(refused, results, words, certify_text, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for split in ("calibration", "validation", "certify"):
        lines = (certify_text / f"{split}.jsonl").read_text().splitlines()
        (text / f"{split}.jsonl").write_text("\n".join(lines[:18]) + "\n")
    words = [str(text) if word == str(certify_text) else word for word in words]
    line = refused(results(skip(0.1)), *words, "--blocks", "0")
    assert "too few pages for ordering candidates: 9, at least 10 needed" in line


def test_output_that_is_a_file(refused, results, tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    assert "is a file; --output expects a folder" in refused(results(skip(0.1)), "--output", path)


def test_the_search_says_model_text_and_bound(refused, results):
    """What was tuned is what is certified, where nothing else is said."""
    folder = results(skip(0.1))
    known = {"identity": {"model": "/no/model"}, "settings": {"max_degradation": 0.0}}
    (folder / "optimization_metadata.json").write_text(json.dumps(known))
    assert "/no/model" in refused(folder)
    assert "max_degradation = 0" in refused(folder, "--model", "demo")
