"""A results folder of a real search on the demo, cut to a few points, and others beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

HERE = Path(__file__).parent


@pytest.fixture
def sample(tmp_path):
    """A search with its certificate and its measurement on test; no profile."""
    return Path(shutil.copytree(HERE / "sample", tmp_path / "sample"))


@pytest.fixture
def with_profile(sample):
    """The same with a small profile beside it."""
    place = sample / "profile"
    place.mkdir()
    head = json.loads((sample / "optimization_metadata.json").read_text())["profile"]
    (place / "profile.json").write_text(json.dumps(head))
    draw = np.random.default_rng(0)
    pd.DataFrame(
        {
            "layer": np.repeat([0, 1], 50),
            "token_id": np.tile(np.arange(50), 2),
            "frequency": draw.integers(1, 1000, 100),
            "mean_entropy": draw.uniform(0.2, 2.0, 100),
            "routing_consistency": draw.uniform(0.3, 1.0, 100),
        }
    ).to_parquet(place / "routing_stats.parquet")
    return sample


@pytest.fixture
def alone(tmp_path):
    """A folder with a file of the other commands, or with several that belong together."""

    def make(*names: str) -> Path:
        place = tmp_path / names[0]
        place.mkdir()
        for name in names:
            shutil.copy(HERE / "others" / f"{name}.json", place)
        return place

    return make


@pytest.fixture
def change(sample):
    """Change a file of the sample."""

    def apply(name: str, **entries: object) -> Path:
        path = sample / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
        return sample

    return apply


@pytest.fixture
def six_thresholds(sample):
    """The sample as a bayesian search of VAR's thresholds, of which one alone matters."""
    draw = np.random.default_rng(1)
    space = {
        "frequency_threshold": {"type": "int", "low": 10, "high": 200, "default": 50},
        "entropy_threshold": {"type": "float", "low": 0.1, "high": 1.5, "default": 0.5},
        "confidence_threshold": {"type": "float", "low": 0.5, "high": 0.95, "default": 0.8},
    }
    results = json.loads((sample / "optimization_results.json").read_text())
    rows = []
    for _ in range(40):
        confidence = float(draw.uniform(0.5, 0.95))
        params = {
            "frequency_threshold": int(draw.integers(10, 200)),
            "entropy_threshold": float(draw.uniform(0.1, 1.5)),
            "confidence_threshold": confidence,
        }
        speedup, degradation = 2.0 - confidence, 0.03 * (0.95 - confidence)
        feasible = degradation < 0.01
        row = {**results["all_results"][0], "params": params, "speedup": speedup}
        row |= {"degradation": degradation, "feasible": feasible}
        rows.append({**row, "score": speedup if feasible else -degradation})
    results["all_results"] = rows
    (sample / "optimization_results.json").write_text(json.dumps(results))
    path = sample / "optimization_metadata.json"
    metadata = json.loads(path.read_text())
    metadata.pop("replay")
    metadata["settings"]["space"] = space
    path.write_text(json.dumps(metadata))
    return sample
