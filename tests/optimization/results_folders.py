"""Results folders of searches that never ran, with figures that a test chooses."""

from __future__ import annotations

import json

SPACE = {"tau": {"type": "float", "low": 1e-4, "high": 1.0, "default": 0.01, "log": True}}


def write_run(folder, *, seed, score=1.2, tau=0.01, experts=1.3, found=True, **changed):
    """A finished search; ``changed`` are settings, or parts of the identity."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "dataset": "demo",
        "robust": False,
        "n_calls": 10,
        "max_degradation": 0.01,
        "mode": "verified",
        "policy": "damage",
        "compensation": None,
        "compensation_folder": None,
        "method": "replay",
        "space": SPACE,
    }
    identity = {"model": "demo", "dtype": "float32", "data_hash": "d", "profile_hash": "p"}
    for name, value in changed.items():
        (identity if name in identity else settings)[name] = value
    config = {"policy": "damage", "settings": {"tau": tau}, "compensation": "means"}
    row = {
        "name": "candidate 1",
        "config": config,
        "passed": found,
        "degradation": 0.008,
        "degradation_standard_error": 0.0005,
        "degradation_upper_95": 0.0088,
        "documents": 400,
        "experts_per_token": experts,
        "learned_pct": 100.0,
        "speedup": score,
        "speedup_95": [score - 0.1, score + 0.1],
    }
    metadata = {
        "schema_version": 1,
        "seed": seed,
        "search": {},
        "settings": settings,
        "identity": identity,
        "remeasured": [row],
        "profile": {"path": None, "hash": "p"},
    }
    best = score if found else -101.0
    (folder / "optimization_metadata.json").write_text(json.dumps(metadata))
    results = {"schema_version": 1, "best_score": best, "seed": seed}
    results["best_params"] = config if found else None
    (folder / "optimization_results.json").write_text(json.dumps(results))
    if found:
        (folder / "best_config.json").write_text(json.dumps(config))
    return folder
