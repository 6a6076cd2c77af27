"""Every command that takes a configuration takes any file that a command wrote."""

from __future__ import annotations

import json
import shutil

import pytest

from var_moe import RoutingProfile
from var_moe.certification import certify as certification
from var_moe.cli import main
from var_moe.evaluation import guarding
from var_moe.evaluation.evaluator import Evaluator
from var_moe.models.loading import load_model
from var_moe.optimization import preparation
from var_moe.optimization.preparation import read_text
from var_moe.tracing.record import record_trace

SIX = {
    "frequency_threshold": 5,
    "entropy_threshold": 1.5,
    "confidence_threshold": 0.6,
    "cache_size": 100,
    "cache_ttl_seconds": 60,
    "context_window_size": 2,
}
WHOLE = {**SIX, "mode": "verified", "residuals": True, "cache_scope": "document"}
KINDS = {
    "six": SIX,
    "whole": WHOLE,
    "policy": {"policy": "top_p", "settings": {"p": 0.7}},
    "compensated": {"policy": "naee", "settings": {"quantile": 0.3}, "compensation": "means"},
    "certified": {"policy": "native", "settings": {}},
    "miss": {"config": WHOLE, "degradation": 0.2},
    "miss of a policy": {"config": {"policy": "top_p", "settings": {"p": 0.7}}, "degradation": 0.2},
    "plain": {**SIX, "mode": "plain"},
    "variant": {"policy": "var_plain", "settings": SIX},
    "compensated VAR": {"policy": "var", "settings": SIX, "compensation": "means"},
    "tuned": None,  # what `tune` left
}


class ReachedError(Exception):
    """A command has made its policies and would measure them now."""


@pytest.fixture(scope="module")
def tuned(common, tmp_path_factory):
    """What a search of the default policy leaves: configuration, profile, and its own trace."""
    folder = tmp_path_factory.mktemp("contract") / "results"
    place = folder / "profile"
    assert main(["profile", *common, "--output", str(place), "--quiet"]) == 0
    profile, loaded = RoutingProfile.load(place), load_model(common[1], dtype="float32")
    parts = profile.calibration("means")
    text = read_text(common[3], "validation", loaded)
    record_trace(
        loaded,
        text.documents[:10],
        dataset=text.dataset,
        data_hash=text.data_hash,
        folder=folder / "trace",
        profile=profile,
        compensation=parts["compensation"],
        predictor=parts["damage"],
    )
    best = {"policy": "damage", "settings": {"tau": 0.01}, "compensation": "means"}
    (folder / "best_config.json").write_text(json.dumps(best))
    return folder


@pytest.fixture
def unmeasured(monkeypatch):
    """Measuring is where a command ends."""

    def reached(*_args, **_options):
        raise ReachedError

    monkeypatch.setattr(Evaluator, "baseline_backend", property(reached))
    monkeypatch.setattr(Evaluator, "quality", reached)
    monkeypatch.setattr(Evaluator, "speed", reached)
    monkeypatch.setattr(guarding, "calibrate_guard", reached)
    monkeypatch.setattr(certification, "order_candidates", reached)


@pytest.fixture(params=KINDS)
def config(request, tuned, tmp_path):
    """The file in a copy of the search's folder, in the place of its best configuration."""
    folder = shutil.copytree(tuned, tmp_path / "results")
    if KINDS[request.param] is not None:
        (folder / "best_config.json").write_text(json.dumps(KINDS[request.param]))
    return folder / "best_config.json"


def evaluated(config):
    return ["evaluate", "--config", str(config), "--blocks", "1", "--decode_blocks", "0"]


def replayed(config):
    return ["replay", str(config.parent / "trace"), "--config", str(config)]


COMMANDS = {
    "evaluate": evaluated,
    "analyze": lambda config: ["analyze", "--var_config", str(config)],
    "validate": lambda config: ["tune", "--validate", str(config)],
    "guard": lambda config: ["guard", str(config.parent)],
    "certify": lambda config: ["certify", str(config.parent), "--max_degradation", "0.1"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_measuring_command_takes_it(command, config, common, tmp_path, unmeasured, capsys):
    words = [*COMMANDS[command](config), *common, "--output", str(tmp_path / "out"), "--quiet"]
    assert main(words) == 1
    assert "ReachedError" in capsys.readouterr().err


def test_replay_takes_it(config, tmp_path, capsys):
    assert main([*replayed(config), "--output", str(tmp_path / "out")]) == 0
    (row,) = json.loads((tmp_path / "out" / "replay.json").read_text())["rows"]
    assert 1 <= row["experts_per_token"] <= 2
    assert row["predicted_degradation"] is not None


def test_export_and_the_harness_take_it(config, common, tmp_path):
    pytest.importorskip("lm_eval")
    from var_moe.lm_eval import policy_for

    place = tmp_path / "out"
    assert main(["export", str(config.parent), "--output", str(place)]) == 0
    loaded = load_model(common[1], dtype="float32")
    assert type(policy_for(loaded, str(config))) is type(policy_for(loaded, str(place)))


def test_the_profile_beside_a_configuration_is_taken(
    tuned, common, tmp_path, unmeasured, monkeypatch, capsys
):
    monkeypatch.setattr(preparation, "collect_profile", None)  # a fresh one would fail
    words = [*evaluated(tuned / "best_config.json"), *common, "--output", str(tmp_path), "--quiet"]
    assert main(words) == 1
    assert "ReachedError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "CONFIG", "--mode", "plain"], "settings of policy 'damage' have no mode"),
        (["--policy", "top_p", "--mode", "plain"], "--mode plain belongs to VAR"),
        (["--config", "CONFIG", "--set", "tau=1"], "--set belongs to --policy"),
        (["--config", "CONFIG", "--compensation", "means"], "the configuration names it"),
    ],
)
def test_what_does_not_combine_is_said(words, message, tuned, common, tmp_path, capsys):
    words = [word.replace("CONFIG", str(tuned / "best_config.json")) for word in words]
    assert main(["evaluate", *common, *words, "--output", str(tmp_path / "o"), "--quiet"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_trace_that_does_not_know_the_policy_is_said(tuned, common, tmp_path, capsys):
    trace, config = tmp_path / "trace", tuned / "best_config.json"
    words = ["trace", *common, "--profile", str(tuned / "profile"), "--max_samples", "4"]
    assert main([*words, "--output", str(trace), "--quiet"]) == 0
    words = ["replay", str(trace), "--profile", str(tuned / "profile"), "--config", str(config)]
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert str(config) in error
    assert "take the trace of its own search" in error
