"""VARConfig: documented fields, presets, JSON, one clear line for what is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest

from var_moe.config import DOCUMENTED_FIELDS, PRESETS, VARConfig, check_seed
from var_moe.errors import UsageError

DOCUMENTED = {
    "frequency_threshold": 50,
    "entropy_threshold": 0.5,
    "confidence_threshold": 0.8,
    "cache_size": 1000,
    "cache_ttl_seconds": 60,
    "context_window_size": 4,
}


def test_documented_fields_come_first_with_their_defaults():
    assert dict(list(VARConfig().to_dict().items())[:6]) == DOCUMENTED
    assert VARConfig().documented() == DOCUMENTED
    assert VARConfig().mode == "verified"


def test_presets_are_the_documented_ones():
    assert [tuple(PRESETS[name].values()) for name in PRESETS] == [
        (100, 0.3, 0.9, 500, 30, 4),
        (50, 0.5, 0.8, 1000, 60, 4),
        (25, 0.7, 0.7, 2000, 120, 4),
    ]
    assert list(PRESETS) == ["conservative", "balanced", "aggressive"]
    assert tuple(PRESETS["balanced"]) == DOCUMENTED_FIELDS
    assert VARConfig.preset("balanced") == VARConfig()


def test_a_six_field_file_loads(tmp_path):
    path = tmp_path / "best_config.json"
    path.write_text(json.dumps(DOCUMENTED))
    assert VARConfig.load(path) == VARConfig()


def test_round_trip(tmp_path):
    config = VARConfig(mode="plain", cache_scope="document", cache_ttl_seconds=0.5)
    config.save(tmp_path / "c.json")
    assert VARConfig.load(tmp_path / "c.json") == config


def test_residuals_follow_the_mode():
    assert VARConfig().uses_residuals
    assert not VARConfig(mode="plain").uses_residuals
    assert not VARConfig(residuals=False).uses_residuals


@pytest.mark.parametrize(
    "values",
    [
        {"frequency_threshold": 0, "entropy_threshold": 0.0, "cache_size": 0},
        {"confidence_threshold": 1.0, "context_window_size": 1, "cache_ttl_seconds": 0.001},
    ],
)
def test_valid_is_wider_than_searched(values):
    VARConfig(**values)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frequency_threshold", -1),
        ("frequency_threshold", 1.5),
        ("frequency_threshold", True),
        ("entropy_threshold", -0.1),
        ("entropy_threshold", float("nan")),
        ("confidence_threshold", 0),
        ("confidence_threshold", 1.01),
        ("cache_size", "many"),
        ("cache_ttl_seconds", 0),
        ("context_window_size", 0),
        ("mode", "fast"),
        ("cache_scope", "global"),
        ("residuals", "yes"),
    ],
)
def test_bad_values_are_named(field, value):
    with pytest.raises(UsageError) as caught:
        VARConfig(**{field: value})
    message = str(caught.value)
    assert f"VARConfig.{field} = {value!r}: expected" in message
    assert "\n" not in message


def test_residuals_in_plain_mode_are_refused():
    with pytest.raises(UsageError, match="residual means need the router's own choice"):
        VARConfig(mode="plain", residuals=True)


def test_unknown_preset():
    with pytest.raises(UsageError, match="conservative, balanced, aggressive"):
        VARConfig.preset("bold")


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64, 1.5, True, "3"])
def test_a_seed_is_checked_wherever_it_is_taken(seed):
    from var_moe.calibration.fit_compensation import FitSettings
    from var_moe.certification.plan import CertifySettings
    from var_moe.evaluation.batching import drawn
    from var_moe.optimization.preparation import sample_documents
    from var_moe.optimization.settings import TuneSettings

    line = rf"^seed = {seed!r}: expected an integer in \[0, 4294967295\]"
    for take in (
        check_seed,
        lambda seed: TuneSettings(seed=seed),
        lambda seed: CertifySettings(seed=seed),
        lambda seed: FitSettings(seed=seed),
        lambda seed: drawn([], 5, seed),
        lambda seed: sample_documents([None, None], 1, seed),
    ):
        with pytest.raises(UsageError, match=line):
            take(seed)
    assert check_seed(2**32 - 1) == 2**32 - 1
    assert check_seed(None) is None


def test_numbers_of_numpy_become_pythons_own():
    config = VARConfig.from_dict({"cache_size": np.int64(7), "entropy_threshold": np.float32(0.5)})
    assert config == VARConfig(cache_size=7, entropy_threshold=0.5)
    assert json.dumps(config.to_dict())
