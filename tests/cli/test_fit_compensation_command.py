"""``profile`` with damages, ``fit-compensation``, and what a program does with them."""

from __future__ import annotations

import json

import pytest
import torch

from var_moe.calibration import calibrate
from var_moe.calibration.fitted_files import COMPENSATION_FILE, DAMAGE_FILE, FOLDER, HEAD_FILE
from var_moe.calibration.profile import RoutingProfile
from var_moe.cli import main
from var_moe.data.text import load_text
from var_moe.errors import VarMoeError
from var_moe.execution.session import routed
from var_moe.models.loading import load_model
from var_moe.routing.registry import make_policy

FAST = ["--rank", "4", "--regress_tokens", "0", "--tokens", "2000", "--rate", "0.01", "--quiet"]


@pytest.fixture(scope="module")
def folder(common, tmp_path_factory):
    """A profile with damages, and a compensation beside it."""
    place = tmp_path_factory.mktemp("profile")
    assert main(["profile", *common, "--output", str(place), "--quiet"]) == 0
    assert main(["fit-compensation", *common, "--profile", str(place), *FAST]) == 0
    return place


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail in one line, with exit code 2."""

    def run(*words):
        assert main([str(word) for word in words]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        *before, line = said.strip().splitlines()
        assert line.startswith("error:")
        assert not any(other.startswith("error:") for other in before)
        return line

    return run


def test_the_files(folder):
    assert {path.name for path in folder.iterdir()} == {
        "routing_stats.parquet",
        "residuals.safetensors",
        "peers.json",
        "profile.json",
        DAMAGE_FILE,
        FOLDER,
        "report.html",
    }
    names = {path.name for path in (folder / FOLDER).iterdir()}
    assert names == {COMPENSATION_FILE, DAMAGE_FILE, HEAD_FILE}
    head = json.loads((folder / FOLDER / HEAD_FILE).read_text())
    fit = head["fit"]
    held = fit["held_out_divergence_nats"]
    assert held["fitted"] < min(held["start"], held["nothing"])
    assert (fit["rank"], head["top_k"], head["layers"]) == (4, 2, 3)
    assert head["profile_hash"] == json.loads((folder / "profile.json").read_text())["hash"]


def test_a_program_routes_with_the_loaded_profile(folder, tiny_model_folder, tiny_text_folder):
    loaded = load_model(str(tiny_model_folder))
    profile = RoutingProfile.load(folder)
    profile.check_loaded(loaded)
    assert list(profile.damages) == ["none", "means"]
    text = load_text(str(tiny_text_folder), "validation").documents[0].text
    ids = torch.tensor([loaded.tokenizer(text)["input_ids"]])
    with torch.inference_mode():
        whole = loaded.model(ids).logits
    for name in ("none", "means", "learned", None):
        calibration = profile.calibration(name)
        kept = []
        for tau in (0.0, 0.01, 1.0):
            policy = make_policy("damage", {"tau": tau}, calibration)
            with torch.inference_mode(), routed(loaded.model, policy, backend="sorted") as session:
                found = loaded.model(ids).logits
            kept.append(session.report().experts_per_token)
            assert torch.equal(found, whole) == (tau == 0)
        assert kept == sorted(kept, reverse=True)
        assert kept[0] == 2
        assert kept[2] < 1.6
        compensation = policy.compensation
        assert (compensation and compensation.rank) == {"none": None, "means": 0}.get(name, 4)
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids).logits, whole)


def test_without_a_damage_pass(common, tmp_path, capsys):
    words = ["profile", *common, "--output", str(tmp_path), "--damage-tokens", "0", "--quiet"]
    assert main(words) == 0
    assert not (tmp_path / DAMAGE_FILE).exists()
    assert RoutingProfile.load(tmp_path).damages == {}


@pytest.mark.slow
def test_to_another_folder(common, folder, tmp_path, capsys):
    place = tmp_path / "mine"
    words = ["fit-compensation", *common, "--profile", str(folder), "--output", str(place), *FAST]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "Compensation of rank 4 after" in said
    assert f"Saved: {place}" in said.replace("\n", "")
    assert {path.name for path in place.iterdir()} == {COMPENSATION_FILE, DAMAGE_FILE, HEAD_FILE}
    assert list(tmp_path.iterdir()) == [place]  # no checkpoint is left


def test_a_fit_that_does_not_help_saves_nothing(common, folder, tmp_path, capsys):
    place = tmp_path / "mine"
    words = ["fit-compensation", *common, "--profile", str(folder), "--output", str(place), *FAST]
    words[words.index("--rate") + 1] = "100"
    assert main(words) != 0
    assert "nothing was saved" in capsys.readouterr().err.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_killed_in_the_last_damage_pass(common, folder, tmp_path, monkeypatch, capsys):
    """What has been learned is still there: the command goes on and ends the same."""
    place = tmp_path / "mine"
    words = ["fit-compensation", *common, "--profile", str(folder), "--output", str(place), *FAST]
    record, passes = calibrate.record_trace, []

    def kill(*args, **options):
        passes.append(options["compensation"])
        if len(passes) == 2:
            raise VarMoeError("killed")
        return record(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "record_trace", kill)
        assert main(words) != 0
    assert [path.name for path in tmp_path.iterdir()] == [".mine.checkpoint.pt"]
    steps = []
    descend = "var_moe.calibration.fit_compensation._Fit._step"
    with monkeypatch.context() as patch:
        patch.setattr(descend, lambda *args: steps.append(args))
        assert main(words) == 0
    assert steps == []
    one, two = (json.loads((f / HEAD_FILE).read_text()) for f in (place, folder / FOLDER))
    assert one["hash"] == two["hash"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--rank", "-1"], "rank = -1"),
        (["--tokens", "-1"], "tokens = -1"),
        (["--rate", "-0.5"], "rate = -0.5"),
        (["--rate", "nan"], "rate = nan"),
        (["--damage-tokens", "0"], "damage_tokens = 0"),
        (["--damage-tokens", "-5"], "damage_tokens = -5"),
        (["--split", "train"], "split 'train'"),
        (["--dtype", "int4"], "int4"),
    ],
)
def test_bad_words(refused, words, expected, common, folder, tmp_path):
    given = ["fit-compensation", *common, "--profile", folder, "--output", tmp_path / "out"]
    assert expected in refused(*given, "--quiet", *words)
    assert not (tmp_path / "out").exists()


def test_a_bad_model_or_profile(refused, common, folder, tmp_path):
    missing = ["--model", "./no-model", *common[2:], "--profile", folder, "--quiet"]
    assert "no-model" in refused("fit-compensation", *missing)
    words = ["fit-compensation", *common, "--quiet", "--profile"]
    assert "no such profile folder" in refused(*words, tmp_path / "none")
    assert "routing profile" in refused(*words, tmp_path)


def test_a_profile_of_another_model(
    refused, folder, tmp_path, make_tiny_mixtral, tiny_tokenizer, tiny_text_folder
):
    other = tmp_path / "other"
    make_tiny_mixtral(layers=2).save_pretrained(other)
    tiny_tokenizer.save_pretrained(other)
    words = ["--model", other, "--dataset", tiny_text_folder, "--profile", folder, "--quiet"]
    line = refused("fit-compensation", *words, "--output", tmp_path / "out")
    assert "does not fit model" in line
    assert "number of MoE layers" in line


def test_too_little_text(refused, common, folder, tmp_path):
    (tmp_path / "calibration.txt").write_text("\f".join(["a few words of text"] * 3))
    words = ["--model", common[1], "--dataset", tmp_path, "--profile", folder, "--quiet"]
    line = refused("fit-compensation", *words, "--output", tmp_path / "out")
    assert "too few to fit on some" in line


def test_negative_damage_tokens_of_a_profile(refused, common, tmp_path):
    words = ["profile", *common, "--output", tmp_path, "--damage-tokens", "-1"]
    assert "damage_tokens = -1" in refused(*words)


def test_a_model_with_nothing_to_drop(
    refused, tmp_path, make_tiny_mixtral, tiny_tokenizer, tiny_text_folder
):
    model, place = tmp_path / "model", tmp_path / "profile"
    make_tiny_mixtral(top_k=1, layers=1).save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    common = ["--model", str(model), "--dataset", str(tiny_text_folder)]
    assert main(["profile", *common, "--output", str(place), "--quiet"]) == 0
    assert not (place / DAMAGE_FILE).exists()
    line = refused("fit-compensation", *common, "--profile", place, *FAST)
    assert "runs one expert per token: there is nothing to drop" in line
