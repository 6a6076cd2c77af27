"""The documented objective and API on a tiny model."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from var_moe.config import VARConfig
from var_moe.errors import UsageError
from var_moe.optimization.methods import random_search
from var_moe.optimization.results import OptimizationResult


@pytest.fixture(scope="module")
def tiny(make_tiny_mixtral, tiny_tokenizer, tiny_texts):
    model = make_tiny_mixtral(layers=2)
    return {"model": model, "tokenizer": tiny_tokenizer, "texts": tiny_texts[:16]}


@pytest.fixture(scope="module")
def objective(tiny):
    return create(tiny, max_quality_degradation=0.5)


def create(tiny, **options):
    from optimization.hyperparameter_optimization import create_objective_function

    options = {"validation_data": tiny["texts"], **options}
    return create_objective_function(model=tiny["model"], tokenizer=tiny["tokenizer"], **options)


@pytest.mark.slow
def test_the_documented_snippet(tiny, tmp_path):
    from optimization.hyperparameter_optimization import (
        SEARCH_SPACE,
        bayesian_optimization,
        create_objective_function,
        grid_search,
        save_optimization_results,
    )

    objective = create_objective_function(
        model=tiny["model"],
        tokenizer=tiny["tokenizer"],
        validation_data=tiny["texts"],
        baseline_perplexity=300.0,
        baseline_throughput=5000.0,
        max_quality_degradation=0.5,
    )
    small = {name: {**entry} for name, entry in SEARCH_SPACE.items()}
    for name in list(small)[1:]:
        small[name]["low"] = small[name]["high"] = small[name]["default"]
    result = grid_search(
        objective_fn=objective, search_space=small, n_points_per_dim=2, verbose=False
    )
    assert result.num_evaluations == 2
    result = bayesian_optimization(
        objective_fn=objective, search_space=SEARCH_SPACE, n_calls=3, verbose=False
    )
    save_optimization_results(result, tmp_path)
    assert result.best_params.frequency_threshold >= 0
    assert result.num_evaluations == 3
    measured = {str(row["config"]): row for row in result.extra["remeasured"]}
    best = measured[str(result.best_params.to_dict())]
    assert best["passed"]
    assert result.best_score >= best["speedup"]  # the re-measured one
    assert result.optimization_time > 0
    assert result.converged in (True, False)
    assert (tmp_path / "best_config.json").is_file()


def test_score_follows_the_documented_formula(objective, monkeypatch):
    found = objective.evaluate({"confidence_threshold": 0.9})
    assert found.feasible
    bonus = max(0.0, (15 - found.learned_pct) / 100)
    assert found.score == pytest.approx(found.speedup + bonus)
    monkeypatch.setattr(objective, "max_degradation", -1.0)
    over = objective.evaluate({"confidence_threshold": 0.9})
    assert over.score == pytest.approx(-100 * (1 + over.degradation))
    assert over.speedup is None
    assert over.predicted_speedup > 0


def test_evaluations_repeat_exactly(objective):
    one, two = (objective.evaluate({"confidence_threshold": 0.7}) for _ in range(2))
    assert one.degradation == two.degradation
    assert one.experts_per_token == two.experts_per_token


def test_wrong_baselines_are_warned_about_with_both_figures(tiny, caplog):
    with caplog.at_level(logging.WARNING):
        objective = create(tiny, baseline_perplexity=123.0)
    measured = objective.evaluator.baseline_losses.perplexity
    text = caplog.text
    assert "baseline_perplexity given as 123" in text
    assert f"{measured:.4g}" in text


def test_half_calibrates_and_this_is_logged(tiny, caplog):
    with caplog.at_level(logging.WARNING):
        objective = create(tiny)
    assert "8 of the 16 documents calibrate, the other 8 are scored" in caplog.text
    assert len(objective.evaluator.documents) == 8


@pytest.mark.parametrize("kind", ["dataset", "tensor", "list of tensors"])
def test_other_forms_of_validation_data(tiny, kind):
    if kind == "dataset":
        import datasets

        data = datasets.Dataset.from_dict({"text": tiny["texts"][:8]})
    else:
        data = torch.randint(1, 300, (8, 50), generator=torch.Generator().manual_seed(0))
        data = list(data) if kind == "list of tensors" else data
    objective = create(tiny, validation_data=data)
    assert len(objective.evaluator.documents) == 4


@pytest.mark.parametrize("data", [[], "one text", [1.5, 2.5], None])
def test_bad_validation_data(tiny, data):
    with pytest.raises(UsageError, match="validation_data"):
        create(tiny, validation_data=data)


def test_negative_bound(tiny):
    with pytest.raises(UsageError, match="max_degradation = -1"):
        create(tiny, max_quality_degradation=-1)


def test_a_dense_model_is_refused(tiny):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    with pytest.raises(UsageError, match="not a Mixture of Experts"):
        create({**tiny, "model": LlamaForCausalLM(config)})


def test_a_doubtful_speedup_is_measured_again(objective, monkeypatch):
    """A figure far from what the executed pairs predict is not believed at once."""
    evaluator = objective.evaluator
    predicted = evaluator.predicted_speedup(1.5)
    real, blocks = evaluator.speed, []

    def lucky_first(policy, **options):
        blocks.append(options["blocks"])
        speed = real(policy, **options)
        if len(blocks) > 1:
            return speed
        ratio = dataclasses.replace(speed.speedup, median=3 * predicted)
        return dataclasses.replace(speed, speedup=ratio)

    monkeypatch.setattr(evaluator, "speed", lucky_first)
    found = objective.evaluate({"confidence_threshold": 0.7})
    assert blocks == [objective.blocks, 3 * objective.blocks]
    assert found.speedup < 2.5 * predicted


@pytest.mark.slow
def test_the_best_is_measured_again_on_all_documents_and_in_its_own_mode(tiny):
    objective = create(tiny, max_quality_degradation=0.5, max_samples=5, mode="plain")
    assert len(objective.evaluator.documents) == 5
    result = random_search(objective, n_calls=3, verbose=False, seed=0)
    assert result.best_params.mode == "plain"
    assert {row["documents"] for row in result.extra["remeasured"]} == {len(tiny["texts"]) // 2}
    with pytest.raises(UsageError, match="mode = 'verified': the objective measures mode 'plain'"):
        random_search(objective, n_calls=1, verbose=False, mode="verified")


def test_where_the_upper_bound_breaks_the_limit_the_default_is_returned(objective, monkeypatch):
    point = {"frequency_threshold": 0, "confidence_threshold": 0.5, "entropy_threshold": 1.5}
    searched = OptimizationResult(
        best_params=VARConfig(),
        best_score=1.5,
        optimization_time=1.0,
        evaluations=(objective.evaluate(point),),
        converged=False,
    )
    # Whatever a random model does, it can't do this.
    monkeypatch.setattr(objective, "max_degradation", -0.99)
    found = objective.confirm(searched)
    assert found.best_params == VARConfig()
    assert found.best_score < 0
    assert found.extra["nearest_miss"]["config"]["frequency_threshold"] == 0


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"max_samples": 1}, "max_samples = 1: expected an integer of at least 2"),
        ({"max_samples": 2.5}, "max_samples = 2.5: expected an integer"),
        ({"baseline_perplexity": float("nan")}, "baseline_perplexity = nan: expected a number"),
        ({"baseline_throughput": "x"}, "baseline_throughput = 'x': expected a number"),
        ({"max_quality_degradation": None}, "max_degradation = None: expected a number"),
        ({"profile": "results/profile"}, "profile: expected a RoutingProfile"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tiny, given, line):
    with pytest.raises(UsageError, match=line):
        create(tiny, **given)
