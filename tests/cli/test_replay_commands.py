"""``trace`` and ``replay`` end to end on a tiny model: files, tables, refusals, kill and resume."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest

from var_moe import RoutingProfile, RoutingTrace, TraceReplay, VARConfig
from var_moe.cli import main
from var_moe.cli.main import _what_is_kept
from var_moe.evaluation.cost import TERMS, CostModel
from var_moe.evaluation.speed_setting import SpeedSetting


@pytest.fixture(scope="module")
def traced(common, tmp_path_factory):
    """A trace with the profile that was made for it."""
    folder = tmp_path_factory.mktemp("traced") / "trace"
    words = ["trace", *common, "--max_samples", "12", "--output", str(folder), "--quiet"]
    assert main(words) == 0
    return folder


@pytest.fixture
def copied(traced, tmp_path):
    """A trace of one's own, to be spoilt; its profile lies in it."""
    return shutil.copytree(traced, tmp_path / "trace")


@pytest.fixture
def refused(capsys):
    """Run a command that must be refused; returns its one line."""

    def run(*words):
        capsys.readouterr()
        asked = list(map(str, words))
        assert main(asked if "--quiet" in asked else [*asked, "--quiet"]) == 2
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1
        return error

    return run


def cost_model(*, layers=3, top_k=2):
    return CostModel(
        seconds=dict(zip(TERMS, (1e-3, 1e-6, 2e-6, 1e-4, 2e-4, 1e-7, 3e-7), strict=True)),
        baseline=0.05,
        setting=SpeedSetting(),
        layers=layers,
        experts=8,
        top_k=top_k,
        error=0.01,
    )


def read(path):
    return json.loads(path.read_text())


def test_trace_says_what_it_recorded(common, tmp_path, capsys):
    words = ["trace", *common, "--max_tokens", "900", "--seed", "4", "--output", str(tmp_path)]
    assert main(words) == 0
    shown = capsys.readouterr()
    trace = RoutingTrace.load(tmp_path)
    assert f"recording in {tmp_path}" in shown.err
    assert trace.tokens == 900
    for words in ("entropy (nats)", "perplexity", "MiB", f"Trace: {tmp_path}", "Profile: "):
        assert words in shown.out
    assert "tracing the router" in shown.err


def test_decisions_alone(common, traced, tmp_path, capsys):
    profile = str(traced / "profile")
    out = tmp_path / "trace"
    words = ["trace", *common, "--decisions_only", "--max_samples", "8", "--profile", profile]
    assert main([*words, "--output", str(out), "--quiet"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "perplexity" not in shown.out
    assert RoutingTrace.load(out).damage == {}
    words = ["replay", str(out), "--profile", profile, "--output", str(tmp_path / "r"), "--quiet"]
    assert main(words) == 0
    assert "recorded with --decisions_only" in capsys.readouterr().out
    assert read(tmp_path / "r" / "replay.json")["rows"][0]["predicted_degradation"] is None
    assert main([*words, "--grid", "2"]) == 0
    assert read(tmp_path / "r" / "replay.json")["front"] == []


def test_replay_of_configurations(traced, tmp_path, capsys):
    """The profile is found in the trace's folder; figures are those of the library."""
    file = tmp_path / "mine.json"
    mine = VARConfig(confidence_threshold=0.6, context_window_size=1, frequency_threshold=2)
    mine.save(file)
    out = tmp_path / "out"
    words = ["replay", str(traced), "--config", str(file), "--preset", "balanced", "aggressive"]
    assert main([*words, "--output", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "balanced" in shown
    assert "no cost_model.json beside the trace" in shown
    result = read(out / "replay.json")
    assert result["schema_version"] == 1
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [str(file), "balanced", "aggressive"]
    profile = RoutingProfile.load(traced / "profile")
    found = TraceReplay(RoutingTrace.load(traced), profile).evaluate(mine)
    assert rows[str(file)]["predicted_degradation"] == pytest.approx(found.degradation)
    assert rows[str(file)]["experts_per_token_by_layer"] == found.report.experts_per_layer()
    assert rows[str(file)]["predicted_speedup"] is None
    assert result["profile"]["hash"] == profile.hash
    assert [row["config"]["context_window_size"] for row in rows.values()] == [1, 4, 4]
    assert not (out / "replay.csv").exists()


def test_a_cost_model_predicts_speedups(traced, copied, tmp_path):
    """It is found beside the trace, as a tuning run leaves it."""
    model = cost_model()
    (tmp_path / "cost_model.json").write_text(json.dumps(model.to_dict()))
    words = ["replay", str(copied), "--preset", "balanced", "--output", str(tmp_path / "out")]
    assert main(words) == 0
    result = read(tmp_path / "out" / "replay.json")
    (row,) = result["rows"]
    assert result["notes"] == []
    replay = TraceReplay(RoutingTrace.load(traced), RoutingProfile.load(traced / "profile"))
    report = replay.evaluate(VARConfig.preset("balanced")).report
    assert row["predicted_speedup"] == pytest.approx(model.speedup(report, residual=True))


@pytest.mark.parametrize("mode", ["verified", "plain"])
def test_replay_of_a_grid(traced, copied, tmp_path, mode, capsys):
    (tmp_path / "cost_model.json").write_text(json.dumps(cost_model().to_dict()))
    words = ["replay", str(copied), "--grid", "2", "--mode", mode, "--output", str(tmp_path)]
    words += ["--max_degradation", "0.5", "--quiet"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "that no other beats" in shown
    table = pd.read_csv(tmp_path / "replay.csv")
    assert len(table) == 64
    result = read(tmp_path / "replay.json")
    front = result["front"]
    changes = [row["predicted_degradation"] for row in front]
    speedups = [row["predicted_speedup"] for row in front]
    assert changes == sorted(changes)
    assert speedups == sorted(speedups)
    assert speedups[-1] == pytest.approx(table["predicted_speedup"].max())
    assert [row["feasible"] for row in front] == [change <= 0.5 for change in changes]
    assert {row["config"]["mode"] for row in front} == {mode}
    replay = TraceReplay(RoutingTrace.load(traced), RoutingProfile.load(traced / "profile"))
    one = replay.evaluate(VARConfig.from_dict(front[-1]["config"]))
    assert one.degradation == pytest.approx(changes[-1])


@pytest.mark.slow
def test_killed_and_resumed(common, traced, tmp_path, killed):
    """kill -9 loses at most the shard that is being made; the same command goes on."""
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    words = ["trace", *common, "--profile", str(traced / "profile"), "--quiet"]
    words += ["--tokens_per_batch", "128", "--output"]
    killed([*words, str(folder)], (folder / "trace-00001.safetensors").exists)
    first = folder / "trace-00000.safetensors"
    assert first.exists()
    assert not (folder / "trace.json").exists()
    before = first.stat().st_mtime_ns
    assert main([*words, str(folder)]) == 0
    assert first.stat().st_mtime_ns == before
    assert main([*words, str(whole)]) == 0
    one, other = RoutingTrace.load(folder), RoutingTrace.load(whole)
    assert len(list(folder.glob("trace-*.safetensors"))) > 3
    assert not list(folder.glob(".*.tmp"))
    for name, column in other.columns().items():
        assert column.equal(one.columns()[name]), name


def test_an_interrupted_trace_is_said_to_go_on():
    assert _what_is_kept(["trace"]) == "; the same command goes on where it stopped"
    assert _what_is_kept(["replay", "x"]) == "; nothing was written"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_tokens", "0"], "max_tokens = 0: expected an integer of at least 1"),
        (["--max_samples", "0"], "max_samples = 0"),
        (["--tokens_per_batch", "-3"], "tokens_per_batch = -3"),
        (["--split", "train"], "split 'train'"),
    ],
)
def test_trace_refuses_in_one_line(common, words, message, tmp_path, refused):
    assert message in refused("trace", *common, *words, "--output", tmp_path / "o", "--quiet")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--grid", "0"], "grid = 0: expected an integer of at least 1"),
        (["--grid", "40"], "grid = 40: a grid of "),
        (["--grid", "2", "--preset", "balanced"], "leave --config and --preset out"),
        (["--preset", "bold"], "preset 'bold'"),
        (["--config", "no.json"], "no.json: no such VAR configuration"),
        (["--max_degradation", "-1"], "max_degradation"),
    ],
)
def test_replay_refuses_in_one_line(traced, words, message, tmp_path, refused):
    assert message in refused("replay", traced, *words, "--output", tmp_path / "o", "--quiet")
    assert not (tmp_path / "o").exists()


def test_missing_trace_and_profile(traced, copied, tmp_path, refused):
    shutil.rmtree(copied / "profile")
    assert "give one with --profile" in refused("replay", copied)
    profile = traced / "profile"
    line = refused("replay", tmp_path / "none", "--profile", profile)
    assert "no such trace folder; make one with `var-moe trace`" in line
    (copied / "trace.json").unlink()
    assert "the recording did not end" in refused("replay", copied, "--profile", profile)


def test_truncated_trace(copied, refused):
    shard = copied / "trace-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    line = refused("replay", copied)
    assert "trace-00000.safetensors: damaged or truncated shard" in line
    head = copied / "trace.json"
    head.write_text(head.read_text()[:100])
    assert "not valid JSON" in refused("replay", copied)


@pytest.mark.parametrize(
    ("changes", "fault"), [({"layers": 2}, "number of MoE layers"), ({"top_k": 3}, "top-k")]
)
def test_profile_of_another_model_or_k(
    traced, tiny_text_folder, make_tiny_mixtral, tiny_tokenizer, tmp_path, refused, changes, fault
):
    other, profile = tmp_path / "other", tmp_path / "profile"
    make_tiny_mixtral(**changes).save_pretrained(other)
    tiny_tokenizer.save_pretrained(other)
    words = ["--dataset", str(tiny_text_folder), "--output", str(profile), "--quiet"]
    assert main(["profile", "--model", str(other), *words, "--max_tokens", "300"]) == 0
    line = refused("replay", traced, "--profile", profile, "--output", tmp_path / "out")
    assert fault in line
    assert str(other) in line
    assert read(traced / "trace.json")["model"] in line


def test_another_profile_of_the_same_model(traced, common, tmp_path, refused):
    profile = tmp_path / "profile"
    words = ["profile", *common, "--max_tokens", "300", "--output", str(profile), "--quiet"]
    assert main(words) == 0
    line = refused("replay", traced, "--profile", profile, "--output", tmp_path / "out")
    assert read(profile / "profile.json")["hash"][:12] in line
    assert read(traced / "profile" / "profile.json")["hash"][:12] in line


def test_cost_model_of_another_shape(copied, tmp_path, refused):
    file = tmp_path / "cost_model.json"
    file.write_text(json.dumps(cost_model(top_k=4).to_dict()))
    line = refused("replay", copied, "--output", tmp_path / "out")
    assert "top_k = 4" in line
    assert "top_k = 2" in line
    file.write_text("{}")
    assert "not a cost model" in refused("replay", copied)


@pytest.mark.slow
def test_a_trace_with_timings_lets_a_replay_predict_speedups(common, traced, tmp_path, capsys):
    folder = tmp_path / "trace"
    words = ["trace", *common, "--max_samples", "6", "--timings", "--quiet"]
    words += ["--profile", str(traced / "profile"), "--output", str(folder)]
    assert main(words) == 0
    assert (folder / "cost_model.json").is_file()
    words = ["replay", str(folder), "--profile", str(traced / "profile"), "--preset", "balanced"]
    assert main([*words, "--output", str(tmp_path / "replay"), "--quiet"]) == 0
    (row,) = json.loads((tmp_path / "replay" / "replay.json").read_text())["rows"]
    assert row["predicted_speedup"] > 0
    capsys.readouterr()
