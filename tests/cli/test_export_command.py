"""``var-moe export`` on a results folder that is written by hand around a real profile."""

from __future__ import annotations

import json

import pytest
import torch

from var_moe import load_candidate, load_model, routed
from var_moe.calibration.profile import RoutingProfile
from var_moe.cli import main

CONFIG = {"policy": "damage", "settings": {"tau": 0.01}, "compensation": "means"}


@pytest.fixture(scope="module")
def results(common, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    words = ["profile", *common, "--max_tokens", "900", "--damage_tokens", "600", "--quiet"]
    assert main([*words, "--output", str(folder / "profile")]) == 0
    (folder / "best_config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def certificate(results):
    """One for this configuration; tests change what it says."""
    profile = RoutingProfile.load(results / "profile")
    fitted = load_candidate(results / "best_config.json").make(profile).compensation
    path = results / "certificate.json"
    found = {
        "certified": True,
        "certified_name": "best",
        "certified_config": CONFIG,
        "confirmatory": True,
        "sentence": "With 95% confidence, it holds.",
        "not_claimed": ["Other text."],
        "alpha": 0.05,
        "max_degradation": 0.01,
        "text": {},
        "hashes": {"profile": profile.hash, "compensation": {"best": fitted.hash}},
    }
    path.write_text(json.dumps(found))
    yield found, path
    path.unlink()


def exported(results, tmp_path, *words):
    assert main(["export", str(results), "--output", str(tmp_path), *words]) == 0
    return (tmp_path / "README.md").read_text()


def test_the_folder_decides_as_the_results_did(results, common, tmp_path, capsys):
    card = exported(results, tmp_path)
    assert "not certified" in capsys.readouterr().out
    assert "not certified" in card
    assert common[1] not in card  # a model's place on this machine is nobody's business
    loaded = load_model(common[1])
    profile = RoutingProfile.load(results / "profile")
    own = load_candidate(results / "best_config.json").make(profile)
    ids = torch.arange(90).reshape(2, 45)
    logits = []
    for policy in (own, str(tmp_path)):
        with torch.no_grad(), routed(loaded, policy) as session:
            logits.append(loaded.model(input_ids=ids).logits)
            assert session.report().experts_per_token < 2
    assert torch.equal(*logits)


def test_json_is_alone_on_stdout(results, tmp_path, capsys):
    exported(results, tmp_path, "--json")
    said = capsys.readouterr()
    found = json.loads(said.out)
    written = json.loads((tmp_path / "var_moe.json").read_text())
    assert {**written, "folder": str(tmp_path)} == found
    assert "Next:" in said.err


def test_the_card_quotes_the_certificate(results, certificate, tmp_path):
    card = exported(results, tmp_path)
    assert "With 95% confidence, it holds." in card
    assert "- Other text." in card
    assert "not certified" not in card


@pytest.mark.parametrize(
    "change",
    [
        {"certified": False},
        {"certified_config": {**CONFIG, "settings": {"tau": 0.02}}},
        {"hashes": {"profile": "another", "compensation": {}}},
        {"certified_name": "front 1"},
    ],
)
def test_a_certificate_of_something_else_is_not_quoted(results, certificate, tmp_path, change):
    found, path = certificate
    path.write_text(json.dumps({**found, **change}))
    assert "not certified" in exported(results, tmp_path)


def test_a_compensation_fitted_anew_is_refused(results, tmp_path, capsys):
    metadata = results / "optimization_metadata.json"
    metadata.write_text(json.dumps({"identity": {"compensation_hash": "f" * 64}}))
    try:
        assert main(["export", str(results), "--output", str(tmp_path)]) == 2
    finally:
        metadata.unlink()
    assert "was searched with compensation ffffffffffff" in capsys.readouterr().err


def test_missing_results_are_said(tmp_path, capsys):
    assert main(["export", str(tmp_path / "none")]) == 2
    assert "none: no such folder" in capsys.readouterr().err
