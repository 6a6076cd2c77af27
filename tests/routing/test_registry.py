"""Policies by name: made from a point of their search space and what calibration gave."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from damages import damage_model
from var_moe.config import SEARCH_SPACE
from var_moe.errors import UsageError
from var_moe.optimization.search_space import defaults, dimensions
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.compensation import ResidualMeans
from var_moe.routing.naee import RatioQuantiles
from var_moe.routing.per_layer_k import LayerSensitivity
from var_moe.routing.registry import (
    CALIBRATION,
    PolicySpec,
    make_policy,
    policy_names,
    policy_spec,
    register,
)
from var_moe.routing.simple import NativePolicy
from var_moe.routing.var import RoutingTable

NAMES = policy_names()
PAGE = Path(__file__).parents[2] / "docs" / "policies.md"


def calibration(top_k: int) -> dict[str, Any]:
    leading = (top_k + 1) // 2
    return {
        "table": RoutingTable(
            count=torch.ones(1, 5).double(),
            entropy=torch.ones(1, 5).double(),
            index=torch.arange(leading).expand(1, 5, leading),
            weight=torch.ones(1, 5, leading),
        ),
        "residuals": ResidualMeans(table=(torch.zeros(9, 4),), by_pair=False, experts=8),
        "ratios": RatioQuantiles(top_k=top_k, tokens=1, quantiles=((0.0, 1.0),)),
        "damage": damage_model(layers=1, experts=8, top_k=top_k, vocabulary=5),
        "sensitivity": LayerSensitivity(measure="made up", loss=((0.0,) * top_k,)),
    }


def test_every_policy_is_documented() -> None:
    table = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| [")]
    assert sorted(re.findall(r"`(\w+)`", " ".join(table))) == sorted(NAMES)


@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("name", NAMES)
def test_the_default_of_the_search_space_makes_a_policy(name: str, top_k: int) -> None:
    spec = policy_spec(name)
    space = spec.search_space(top_k)
    if space:
        dimensions(space)
    settings = defaults(space) if space else {}
    policy = make_policy(name, settings, calibration(top_k))
    assert isinstance(policy, RoutingPolicy)
    assert type(policy) is spec.load()
    for corner in ("low", "high"):
        edge = {setting: entry[corner] for setting, entry in space.items()}
        assert isinstance(make_policy(name, edge, calibration(top_k)), RoutingPolicy)


def test_settings_arrive() -> None:
    assert make_policy("fixed_k", {"k": 3}).k == 3
    assert make_policy("naee", {"quantile": 0.25}, calibration(2)).beta == (0.25,)
    assert make_policy("per_layer_k", {"experts_per_token": 2}, calibration(8)).k == (2,)
    ser = make_policy("ser", {"min_experts": 2, "threshold": 0.3})
    assert (ser.min_experts, ser.threshold) == (2, 0.3)
    for mode in ("plain", "verified"):
        var = make_policy(f"var_{mode}", {"entropy_threshold": 0.9}, calibration(2))
        assert (var.config.mode, var.config.entropy_threshold) == (mode, 0.9)


def test_var_is_searched_as_documented() -> None:
    space = policy_spec("var_verified").search_space(2)
    assert space == SEARCH_SPACE
    space["cache_size"]["high"] = 1  # a copy: nobody else sees this
    assert policy_spec("var_plain").search_space(2) == SEARCH_SPACE


def test_a_policy_says_what_it_needs() -> None:
    assert policy_spec("var_plain").needs == ("table",)
    assert policy_spec("naee").needs == ("ratios",)
    assert policy_spec("top_p").needs == ()
    for name, given in (("naee", {}), ("naee", {"ratios": None}), ("per_layer_k", {})):
        needed = policy_spec(name).needs[0]
        with pytest.raises(UsageError, match=f"policy '{name}' needs '{needed}': ") as error:
            make_policy(name, {}, given)
        assert CALIBRATION[needed] in str(error.value)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("fixed-k", {}, r"policy 'fixed-k': did you mean 'fixed_k'\? expected one of native, "),
        ("var_verify", {}, r"did you mean 'var_verified'\?"),
        ("xyz", {}, r"policy 'xyz': expected one of native, "),
        ("fixed_k", {"n": 1}, r"FixedKPolicy: unknown setting 'n'; expected k$"),
        ("fixed_k", {}, r"FixedKPolicy: setting 'k' is missing"),
        ("native", {"k": 1}, r"NativePolicy: unknown setting 'k'; expected none"),
        ("naee", {"ratios": 1}, r"NAEEPolicy: unknown setting 'ratios'; expected quantile"),
        ("top_p", {"p": 2}, r"TopPPolicy\.p = 2: expected a number in \(0, 1\]"),
        ("var_plain", {"mode": "verified"}, r"'var_plain': mode = 'verified': expected 'plain'"),
        ("var_plain", {"cache": 1}, r"VARConfig: unknown field 'cache'"),
    ],
)
def test_mistakes_are_named(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_policy(name, settings, calibration(2))


def test_a_name_is_taken_once() -> None:
    native = PolicySpec(name="native", target="elsewhere:Other", summary="another one")
    with pytest.raises(UsageError, match="policy 'native' is registered already"):
        register(native)
    with pytest.raises(UsageError, match="policy 'new' asks for 'tables'; expected one of table"):
        register(PolicySpec(name="new", target="elsewhere:New", summary="", needs=("tables",)))
    assert policy_names() == NAMES
    assert policy_spec("native").load() is NativePolicy


@pytest.mark.parametrize("one", [np.int64(1), np.int32(1), np.array(1), torch.tensor(1)])
def test_numbers_of_arrays_are_numbers(one: Any) -> None:
    assert make_policy("fixed_k", {"k": one}, {}).k == 1  # type: ignore[attr-defined]
    policy = make_policy("var_plain", {"cache_size": one}, calibration(2))
    assert json.dumps(policy.config.to_dict())  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", [None, -1, 0.5, "x"])
def test_dice_need_a_seed(seed: Any) -> None:
    with pytest.raises(UsageError, match=r"RandomSkipPolicy\.seed = "):
        make_policy("random_skip", {"share": 0.5, "seed": seed})


def test_other_things_than_names_and_mappings_are_refused() -> None:
    with pytest.raises(UsageError, match="policy None: expected one of"):
        policy_spec(None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"calibration is str: .* RoutingProfile.calibration"):
        make_policy("naee", {"quantile": 0.5}, "results/profile")  # type: ignore[arg-type]
