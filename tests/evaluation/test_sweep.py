"""Policies at equal experts per token: where they are turned to, and what the control costs."""

from __future__ import annotations

import pytest

from var_moe.calibration.calibrate import with_damages
from var_moe.calibration.collect import collect_profile
from var_moe.data.documents import TextDocument
from var_moe.data.encoding import encode
from var_moe.errors import UsageError
from var_moe.evaluation.evaluator import Evaluator
from var_moe.evaluation.speed_setting import SpeedSetting
from var_moe.evaluation.sweep import (
    REACHED,
    check_targets,
    control_at,
    require_policies,
    sweep,
    timed,
)
from var_moe.models.loading import LoadedModel
from var_moe.routing.registry import policy_names, policy_spec


@pytest.fixture(scope="module")
def loaded(make_tiny_mixtral, tiny_tokenizer):
    return LoadedModel.of(make_tiny_mixtral(), tiny_tokenizer, name="tiny")


@pytest.fixture(scope="module")
def documents(tiny_texts, tiny_tokenizer):
    return encode([TextDocument(str(i), "s", t) for i, t in enumerate(tiny_texts)], tiny_tokenizer)


@pytest.fixture(scope="module")
def profile(loaded, documents):
    found = collect_profile(loaded, documents[:30], dataset="t", data_hash="h", max_tokens=None)
    return with_damages(
        loaded, found, documents[:30], data={"dataset": "t", "data_hash": "h"}, tokens=2_000
    )


@pytest.fixture(scope="module")
def evaluator(loaded, documents):
    setting = SpeedSetting(batch_size=2, sequence=32, forwards=1)
    return Evaluator(loaded, documents[30:42], setting=setting)


def swept(evaluator, profile, names, targets):
    return list(sweep(evaluator, evaluator, names, profile.calibration(), targets=targets))


@pytest.mark.slow
def test_each_policy_runs_as_many_experts_as_wanted(evaluator, profile):
    names = ("random_skip", "var_verified")
    rows = swept(evaluator, profile, names, (1.75, 1.25))
    wanted = {(name, target) for name in names for target in (1.75, 1.25)}
    assert {(row["policy"], row["target_experts_per_token"]) for row in rows} == wanted
    for row in rows:
        target = row["target_experts_per_token"]
        assert row["experts_per_token"] == pytest.approx(target, rel=REACHED)
        assert row["speedup"] is None
    assert timed(evaluator, rows[0], profile.calibration(), blocks=1)["blocks"] == 1
    assert {row["dial"] for row in rows if row["policy"] == "var_verified"} == {
        "presets",
        "confidence",
    }
    assert "var_verified (presets)" in {row["name"] for row in rows}


def test_a_policy_has_no_point_where_it_can_not_go(evaluator, profile):
    assert swept(evaluator, profile, ("fixed_k",), (1.5,)) == []
    (row,) = swept(evaluator, profile, ("fixed_k",), (1.0,))
    assert row["settings"] == {"k": 1}
    assert row["experts_per_token"] == 1.0
    # Three layers: the budgets are thirds.
    (row,) = swept(evaluator, profile, ("per_layer_k",), (4 / 3,))
    assert row["experts_per_token"] == pytest.approx(4 / 3)


def test_the_control_lies_on_straight_lines():
    def row(policy, experts, cost):
        return {"policy": policy, "experts_per_token": experts, "degradation": cost}

    rows = [row("random_skip", 1.5, 0.04), row("random_skip", 1.0, 0.2), row("naee", 1, 9)]
    assert control_at(rows, 1.75, 2) == pytest.approx(0.02)
    assert control_at(rows, 1.25, 2) == pytest.approx(0.12)
    assert control_at(rows, 2.0, 2) == 0.0
    assert control_at(rows, 0.9, 2) is None


def test_targets(evaluator):
    assert check_targets(None, 2) == (1.75, 1.5, 1.25)
    assert check_targets(None, 8) == (7.0, 6.0, 5.0)
    assert check_targets(None, 1) == (1.0,)
    assert check_targets([1.2, 1.8], 2) == (1.8, 1.2)
    with pytest.raises(UsageError, match=r"experts = 2\.5: expected a number in"):
        check_targets([2.5], 2)


def test_policies_that_can_be_compared():
    assert require_policies(["naee", "ser", "naee"]) == ("naee", "ser")
    with pytest.raises(UsageError, match="did you mean 'naee'"):
        require_policies(["nae"])
    with pytest.raises(UsageError, match="'native' has no strength to vary"):
        require_policies(["native"])


@pytest.mark.parametrize("top_k", [2, 8])
@pytest.mark.parametrize("name", [n for n in policy_names() if policy_spec(n).sweeps(2)])
def test_settings_of_a_sweep_are_its_policys(name, top_k, profile):
    """Every setting can be built, whatever K; those that need no calibration of that K."""
    spec = policy_spec(name)
    for turn in spec.sweeps(top_k).values():
        for strength in (0.0, 0.3, 0.5, 1.0):
            settings = turn(strength)
            if not ({"ratios", "sensitivity", "damage"} & set(spec.needs) and top_k == 8):
                spec.make(settings, profile.calibration())
            space = spec.search_space(top_k)
            assert set(settings) == set(space)
            for key, value in settings.items():
                low, high = space[key]["low"], space[key]["high"]
                slack = 0.05 if key == "confidence_threshold" else 1e-9
                assert low - slack <= value <= high + slack
