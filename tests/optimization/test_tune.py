"""`tune` in Python, on tiny random models: what it finds, and every way in which it can end."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from var_moe.errors import UsageError, VarMoeError
from var_moe.evaluation.speed_setting import SpeedSetting
from var_moe.models.loading import LoadedModel
from var_moe.optimization import run as room
from var_moe.optimization.objective import PolicyObjective
from var_moe.optimization.run import tune
from var_moe.optimization.settings import TuneSettings
from var_moe.report.page import write_report


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def small(tiny_text_folder):
    """Settings that make a search take a moment."""
    return {
        "dataset": str(tiny_text_folder),
        "max_samples": 6,
        "final_samples": 8,
        "final_blocks": 1,
        "candidates": 3,
        "calibration_tokens": 600,
        "setting": SpeedSetting(batch_size=1, sequence=32, forwards=1),
        "seed": 1,
    }


@pytest.fixture(scope="module")
def merged(make_tiny_mixtral, tiny_tokenizer):
    """A model whose experts are copies of one, as merging leaves them."""
    model = make_tiny_mixtral(layers=2)
    for layer in model.model.layers:
        for weight in layer.mlp.experts.parameters():
            weight.data[:] = weight.data[:1].clone()
    return LoadedModel.of(model, tiny_tokenizer, name="merged")


@pytest.fixture(scope="module")
def tuned(merged, small, tmp_path_factory):
    """A search without a word on policy, method, space or compensation; and its folder."""
    folder = tmp_path_factory.mktemp("tuned")
    settings = TuneSettings(output=folder, n_calls=3, **small)
    return tune(merged, settings, verbose=False), folder


@pytest.mark.slow
def test_dropping_a_copy_costs_nothing(tuned):
    """With no compensation in place: any other one adds what was not lost."""
    outcome, folder = tuned
    assert read(folder / "best_config.json")["compensation"] == "none"
    assert outcome.best.quality.report.experts_per_token == pytest.approx(1.0, abs=0.05)
    assert outcome.best.quality.judged.value == pytest.approx(0.0, abs=1e-5)
    tried = {row["params"]["compensation"] for row in outcome.result.all_results}
    assert tried == {"none", "means"}
    metadata = read(folder / "optimization_metadata.json")
    assert metadata["settings"]["space"]["compensation"]["choices"] == ["none", "means"]
    known = {row["config"]["compensation"] for row in read(folder / "pareto.json")["points"]}
    assert known <= {"none", "means"}
    write_report(folder)


@pytest.mark.slow
def test_resuming_a_finished_search_goes_on_to_the_number_asked_for(merged, tuned, small, tmp_path):
    _, folder = tuned
    lines = (folder / "optuna_study.log").read_text().splitlines()
    settings = TuneSettings(output=folder, resume=True, n_calls=4, **small)
    outcome = tune(merged, settings, verbose=False)
    assert outcome.result.num_evaluations == 4
    assert (folder / "optuna_study.log").read_text().splitlines()[: len(lines)] == lines
    # And without a number to what it was last begun with.
    outcome = tune(merged, replace(settings, n_calls=None), verbose=False)
    assert outcome.result.num_evaluations == 4
    assert read(folder / "optimization_metadata.json")["settings"]["n_calls"] == 4
    with pytest.raises(
        UsageError, match=r"space \(names\) = \['tau', 'compensation'\], now \['tau'\]"
    ):
        tune(merged, replace(settings, compensation="means"), verbose=False)
    with pytest.raises(UsageError, match=r"settings\.policy = 'damage', now 'top_p'"):
        tune(merged, replace(settings, policy="top_p"), verbose=False)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["damage", "var"])
def test_when_every_evaluation_fails_the_first_cause_is_told(
    merged, tuned, small, tmp_path, monkeypatch, policy
):
    def evaluate(_self, params):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(PolicyObjective, "evaluate", evaluate)
    (tmp_path / "best_config.json").write_text("{}")  # an earlier search's
    settings = TuneSettings(
        output=tmp_path, policy=policy, method="random", n_calls=2, **profiled(small, tuned)
    )
    with pytest.raises(VarMoeError) as caught:
        tune(merged, settings, verbose=False)
    assert "all 2 evaluations failed, the first with: RuntimeError: out of memory" in str(
        caught.value
    )
    assert caught.value.exit_code == 1
    assert len(read(tmp_path / "optimization_results.json")["all_results"]) == 2
    assert not (tmp_path / "best_config.json").exists()
    write_report(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()])
def test_a_last_measurement_that_fails_loses_nothing(
    merged, tuned, small, tmp_path, monkeypatch, error
):
    real, count = room.LastMeasurement, []

    def failing(evaluator, objective, **options):
        quality = evaluator.quality

        def once(*given, **more):
            if count:
                raise error
            count.append(1)
            return quality(*given, **more)

        monkeypatch.setattr(evaluator, "quality", once)
        return real(evaluator, objective, **options)

    monkeypatch.setattr(room, "LastMeasurement", failing)
    words = profiled(small, tuned)
    settings = TuneSettings(
        output=tmp_path, policy="var", method="random", n_calls=2, max_degradation=9, **words
    )
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else VarMoeError
    with pytest.raises(expected) as caught:
        tune(merged, settings, verbose=False)
    if expected is VarMoeError:
        assert "the last measurement failed (RuntimeError: no memory)" in str(caught.value)
    assert len(read(tmp_path / "optimization_metadata.json")["remeasured"]) == 1
    assert read(tmp_path / "optimization_results.json")["all_results"]
    assert not (tmp_path / "best_config.json").exists()
    write_report(tmp_path)
    monkeypatch.setattr(room, "LastMeasurement", real)
    tune(merged, replace(settings, resume=True), verbose=False)
    assert (tmp_path / "best_config.json").exists()


@pytest.mark.slow
def test_a_half_without_documents_is_told(merged, small, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "var_moe.optimization.preparation.halves", lambda documents, equal: (list(documents), [])
    )
    with pytest.raises(UsageError, match="the last measurement, in its half of the pages"):
        tune(merged, TuneSettings(output=tmp_path, **small), verbose=False)


def profiled(small, tuned):
    """The same settings with the profile of an earlier search."""
    return {**small, "profile": tuned[1] / "profile"}


@pytest.mark.parametrize(
    ("given", "policy", "method", "calls"),
    [
        ({}, "damage", "replay", 10),
        ({"policy": "damage"}, "damage", "replay", 10),
        ({"policy": "naee", "method": "grid"}, "naee", "grid", 50),
        ({"method": "bayesian"}, "var", "bayesian", 50),  # the documented script
        ({"policy": "var"}, "var", "replay", 10),
        ({"mode": "plain"}, "var", "replay", 10),
        ({"bounds": ["cache_size=100:200"]}, "var", "replay", 10),
    ],
)
def test_what_is_left_out_is_the_policys_own(tmp_path, given, policy, method, calls):
    settings = TuneSettings(output=tmp_path, **given)
    assert (settings.policy, settings.method, settings.calls) == (policy, method, calls)
    # Changing something else changes none of it.
    assert replace(settings, seed=3).to_dict() == {**settings.to_dict(), "seed": 3}


def test_a_space_of_the_models_own_k(tmp_path):
    settings = TuneSettings(output=tmp_path, policy="fixed_k")
    assert [settings.space_for(top_k)["k"]["high"] for top_k in (2, 4)] == [2, 4]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"policy": "damage", "mode": "plain"}, "mode 'plain' does not belong to policy 'damage'"),
        ({"policy": "native"}, "policy 'native' has nothing to tune"),
        ({"policy": "var", "compensation": "means"}, "needs a policy that drops experts"),
        ({"policy": "damage", "bounds": ["tua=0:1"]}, "unknown name 'tua'; expected tau"),
        ({"n_calls": 0}, "n_calls = 0: expected an integer of at least 1"),
        ({"n_calls": 2.5}, "n_calls = 2.5: expected an integer"),
        ({"max_samples": "3"}, "max_samples = '3': expected an integer"),
        ({"max_degradation": None}, "max_degradation = None: expected a number"),
    ],
)
def test_settings_that_do_not_belong_together(tmp_path, given, says):
    with pytest.raises(UsageError, match=says):
        TuneSettings(output=tmp_path, **given)
