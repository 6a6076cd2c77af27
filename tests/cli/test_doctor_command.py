"""``var-moe doctor``: what it finds here, and what it says of other machines."""

from __future__ import annotations

import json

import pytest
import torch

from var_moe.cli import doctor, main
from var_moe.execution.backends.fused import can_run
from var_moe.execution.backends.packed import has_kernels


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.slow
def test_it_measures_this_machine(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    versions = {row["name"]: row["version"] for row in found["packages"]}
    assert versions["torch"]
    assert found["missing"] == []
    usable = {row["name"] for row in found["backends"] if row["usable"]}
    assert usable >= {"eager", "grouped_mm", "var_moe sorted"}
    assert ("var_moe packed" in usable) == has_kernels(torch.float32)
    assert ("var_moe fused" in usable) == can_run(torch.float32)
    assert found["machine"]["fused_kernel"]
    assert all(row["why_not"] for row in found["backends"] if not row["usable"])
    assert found["machine"]["torch_threads"] >= 1
    assert found["hub"]["offline"]


def test_it_says_it_to_people(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "backends", list)
    monkeypatch.setattr(doctor, "dtypes", list)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for words in (
        "Installed",
        "threads",
        "Experts kernel",
        "offline mode (HF_HUB_OFFLINE is set)",
        "Cache:",
    ):
        assert words in said


def test_what_is_needed_and_missing_fails(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == "optuna" else "1")
    monkeypatch.setattr(doctor, "backends", list)
    monkeypatch.setattr(doctor, "dtypes", list)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "Missing: optuna" in said
    assert "pip install optuna" in said


def test_an_extra_names_its_command(monkeypatch):
    monkeypatch.setattr(doctor, "version_of", lambda _name: None)
    rows = {row["name"]: row for row in doctor.packages()}
    assert rows["kaleido"]["install"] == "pip install 'var-moe[figures]'"
    assert not rows["kaleido"]["needed"]


def test_what_is_slow_is_said_with_its_reason():
    def timed(name, ms):
        return {"name": name, "usable": ms is not None, "latency_ms": ms}

    found = {
        "machine": {
            "devices": [],
            "cores": 8,
            "torch_threads": 2,
            "omp_num_threads": "2",
            "memory_mib": 1000.0,
        },
        "backends": [
            timed("eager", 20.0),
            timed("grouped_mm", 10.0),
            timed("sonicmoe", None),
            timed("var_moe sorted", 5.0),
        ],
        "dtypes": [timed("float32", 1.0), timed("float16", 4.0), timed("bfloat16", 1.05)],
    }
    threads, halves, eager, memory = doctor.slow_things(found)
    assert threads == "torch uses 2 of 8 cores (OMP_NUM_THREADS=2): set OMP_NUM_THREADS=8"
    assert halves.startswith("float16 takes 4.0 times as long as float32")
    assert eager.startswith("eager takes 2.0 times as long as grouped_mm")
    assert memory.startswith("1,000 MiB of memory: the demo needs")
