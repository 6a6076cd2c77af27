"""``fit-compensation --heal`` end to end on a tiny model, and what is refused at once."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from var_moe.calibration.fitted_files import load_compensation
from var_moe.cli import main

QUICK = ["--rank", "4", "--regress_tokens", "0", "--tokens", "1500", "--rate", "0.01"]
HEAL = ["--heal", "router,norms", "--heal_tokens", "1500", "--heal_rate", "0.001", "--control"]


@pytest.fixture(scope="module")
def common(tiny_model_folder, tiny_text_folder):
    return ["--model", str(tiny_model_folder), "--dataset", str(tiny_text_folder), "--quiet"]


@pytest.fixture(scope="module")
def profile(common, tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    assert main(["profile", *common, "--output", str(folder)]) == 0
    return folder


def test_healed_weights_are_fitted_saved_and_used(common, profile, tmp_path, capsys, monkeypatch):
    from var_moe.calibration import heal

    monkeypatch.setattr(heal, "better", lambda ratio: True)  # whatever so little text comes to
    place = tmp_path / "healed"
    words = ["fit-compensation", *common, *QUICK, *HEAL, "--profile", str(profile)]
    assert main([*words, "--output", str(place)]) == 0
    told = capsys.readouterr().out
    assert "router,norms" in told
    assert "control (" in told
    head = json.loads((place / "compensation.json").read_text())
    names = [step["name"] for step in head["heal"]["steps"]]
    assert names == ["compensation", "router,norms"]
    assert head["heal"]["control"]["steps"] == head["heal"]["steps"][1]["steps"]
    assert head["healed"]["file"] == "healed.safetensors"
    assert not list(tmp_path.glob(".*checkpoint*"))
    found = load_compensation(place)
    assert found.compensation.healed.hash == head["healed"]["hash"]
    assert found.damage.compensation is found.compensation
    output = tmp_path / "evaluation"
    words = ["evaluate", *common, "--profile", str(profile), "--output", str(output)]
    words += ["--policy", "damage", "--compensation", str(place), "--blocks", "1"]
    assert main(words) == 0
    row = json.loads((output / "evaluation.json").read_text())["rows"][1]
    assert row["experts_per_token"] < 2

    # Spoilt or missing files are named.
    capsys.readouterr()
    path = place / "healed.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-4] + b"\0\0\x80?")
    assert main(words) == 2
    assert "healed weights are not those of its head" in capsys.readouterr().err
    path.unlink()
    assert main(words) == 2
    assert "healed.safetensors: missing" in capsys.readouterr().err


def test_a_step_that_does_not_help_is_told_and_left_out(
    common, profile, tmp_path, capsys, monkeypatch
):
    from var_moe.calibration import heal

    monkeypatch.setattr(heal, "better", lambda ratio: False)
    words = ["fit-compensation", *common, *QUICK, "--profile", str(profile)]
    words += ["--heal", "norms", "--heal_tokens", "400", "--output", str(tmp_path / "c")]
    assert main(words) == 0
    assert "norms: not kept" in capsys.readouterr().out
    head = json.loads((tmp_path / "c" / "compensation.json").read_text())
    assert head["healed"] is None
    assert load_compensation(tmp_path / "c").compensation.healed is None


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--heal", "routers"], "--heal 'routers': expected some of router, norms, lora"),
        (["--control"], "belong to --heal"),
        (["--heal_tokens", "5"], "belong to --heal"),
        (["--heal", "norms", "--heal_rate", "0"], "heal rate = 0.0: expected a number above 0"),
    ],
)
def test_bad_words(words, line, common, profile, capsys):
    assert main(["fit-compensation", *common, "--profile", str(profile), *words]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


def test_missing_peft_is_one_line(common, profile, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    words = ["fit-compensation", *common, "--profile", str(profile), "--heal", "lora"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "pip install 'var-moe[heal]'" in error
    assert error.count("\n") == 1


def test_healing_survives_saving_with_a_profile(profile, tmp_path, common):
    """A profile that is saved takes its healed compensation along."""
    from dataclasses import replace

    from var_moe.calibration.fitted_files import FittedCompensation
    from var_moe.calibration.healed_files import healed_head
    from var_moe.calibration.profile import RoutingProfile
    from var_moe.routing.healed import Healed

    known = RoutingProfile.load(profile)
    damage = known.damages["means"]
    change = {"model.norm.weight": (torch.full((64,), 0.5),)}
    compensation = replace(damage.compensation, healed=Healed(change))
    fitted = FittedCompensation(
        damage=replace(damage, compensation=compensation),
        head={**known.head, "healed": healed_head(compensation.healed, None)},
    )
    known.with_compensation(fitted).save(tmp_path)
    again = RoutingProfile.load(tmp_path)
    assert again.learned.compensation.hash == compensation.hash
    known.with_compensation(FittedCompensation(damage=damage, head=dict(known.head))).save(tmp_path)
    assert not (tmp_path / "compensation" / "healed.safetensors").exists()
