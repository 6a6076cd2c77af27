"""Optuna's own tools read the study that a search leaves."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from var_moe.optimization.methods import bayesian_optimization
from var_moe.optimization.trial_log import LOG_NAME

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("optuna_dashboard") is None, reason="needs optuna-dashboard"
    ),
]


def read(url: str):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


def test_optuna_dashboard_shows_the_study(tmp_path):
    bayesian_optimization(
        lambda params: 1 - (params["x"] - 0.3) ** 2,
        {"x": {"type": "float", "low": 0.0, "high": 1.0, "default": 0.5}},
        n_calls=6,
        seed=0,
        storage=tmp_path / LOG_NAME,
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = shutil.which("optuna-dashboard", path=str(Path(sys.executable).parent))
    assert command
    server = subprocess.Popen(
        [command, str(tmp_path / LOG_NAME), "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        address = f"http://127.0.0.1:{port}/api/studies"
        for _ in range(120):
            try:
                studies = read(address)["study_summaries"]
                break
            except OSError:
                assert server.poll() is None, "the dashboard has ended"
                time.sleep(0.5)
        (study,) = studies
        trials = read(f"{address}/{study['study_id']}")["trials"]
        assert len(trials) == 6
        assert {trial["state"] for trial in trials} == {"Complete"}
    finally:
        server.terminate()
        server.wait(timeout=10)
