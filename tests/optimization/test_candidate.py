"""One type for what a search chooses, a file holds and a command takes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import var_moe
from var_moe.config import PRESETS, VARConfig
from var_moe.errors import UsageError
from var_moe.optimization.candidate import Candidate, load_candidate, preset

SIX = dict(PRESETS["aggressive"])


@pytest.mark.parametrize(
    "values",
    [
        VARConfig(mode="plain").to_dict(),
        {"policy": "top_p", "settings": {"p": 0.7}},
        {"policy": "naee", "settings": {"quantile": 0.3}, "compensation": "means"},
        {"policy": "var", "settings": VARConfig().to_dict(), "compensation": "learned"},
    ],
)
def test_a_file_is_read_and_written_alike(values, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    assert load_candidate(path).to_dict() == values
    path.write_text(json.dumps({"config": values, "degradation": 0.2}))  # as nearest_miss.json
    assert load_candidate(path).to_dict() == values


def test_the_documented_six_fields_are_settings_of_var(tmp_path):
    (tmp_path / "six.json").write_text(json.dumps(SIX))
    found = load_candidate(tmp_path / "six.json")
    assert (found.policy, found.settings) == ("var", VARConfig(**SIX).to_dict())
    assert found == preset("aggressive") == Candidate.of(VARConfig(**SIX))
    assert found == Candidate(policy="var_verified", settings=SIX)
    assert found.documented() == SIX
    assert found.as_best_params() == VARConfig(**SIX)
    assert list(found.to_dict())[:6] == list(SIX)


def test_a_variant_is_its_policy_with_fixed_settings():
    found = Candidate(policy="var_plain", settings=SIX)
    assert found.to_dict() == VARConfig(**SIX, mode="plain").to_dict()
    assert "mode plain" in found.kind
    with pytest.raises(UsageError, match="'var_plain': mode = 'verified': expected 'plain'"):
        Candidate(policy="var_plain", settings={"mode": "verified"})


def test_what_a_profile_must_hold():
    assert preset("balanced").needs == {"table", "residuals"}
    assert preset("balanced", "plain").needs == {"table"}
    assert Candidate(policy="top_p", settings={"p": 0.5}).needs == frozenset()
    helped = Candidate(policy="top_p", settings={"p": 0.5}, compensation="means")
    assert helped.needs == {"compensation"}
    assert helped.make is not None
    assert preset("keep_all").make(None).compensation is None


def test_modes_are_vars_own(tmp_path):
    assert preset("balanced").in_mode("plain").settings["mode"] == "plain"
    assert preset("balanced").in_mode(None) == preset("balanced").in_mode("verified")
    path = tmp_path / "best_config.json"
    path.write_text(json.dumps({"policy": "top_p", "settings": {"p": 0.7}}))
    with pytest.raises(UsageError, match=r"best_config.json: settings of policy 'top_p' have no"):
        load_candidate(path).in_mode("plain")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"cache": 1}, "unknown field 'cache'"),
        ({"policy": "var", "settings": {"cache": 1}}, "unknown field 'cache'"),
        ({"policy": "tau", "settings": {}}, "policy 'tau'"),
        ({"policy": "top_p"}, "expected the entries 'policy' and 'settings'"),
        ([1], "expected a JSON object"),
    ],
)
def test_what_is_none_is_told_with_its_file(values, says, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(UsageError) as caught:
        load_candidate(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert says in str(caught.value)


def test_nobody_else_asks_whether_a_policy_is_var():
    sources = Path(var_moe.__file__).parent.rglob("*.py")
    asking = {p.name for p in sources if re.search(r"isinstance\([^)]*VARConfig", p.read_text())}
    assert asking == {"candidate.py"}
