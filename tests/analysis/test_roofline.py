"""Counts of parameters, FLOPs and bytes by hand, and which roof holds."""

from __future__ import annotations

import pytest
import torch

from var_moe.analysis.roofline import (
    ForwardWork,
    Machine,
    active_parameters,
    count_work,
    measure_machine,
    reached,
)
from var_moe.routing.simple import FixedKPolicy

HIDDEN, WIDE, VOCABULARY, LAYERS, EXPERTS = 64, 96, 300, 3, 8
EXPERT = 3 * HIDDEN * WIDE


@pytest.fixture(scope="module")
def model(make_tiny_mixtral):
    return make_tiny_mixtral()


@pytest.mark.parametrize(("policy", "kept"), [(None, 2), (FixedKPolicy(1), 1)])
def test_a_tiny_mixtral_by_hand(model, policy, kept):
    batch, sequence = 2, 10
    ids = torch.arange(batch * sequence).reshape(batch, sequence)
    tokens = batch * sequence
    work = count_work(model, ids, policy)
    # q and o; k and v with half the heads; the router; the head.
    dense = LAYERS * (2 * HIDDEN * 64 + 2 * HIDDEN * 32 + 8 * HIDDEN) + VOCABULARY * HIDDEN
    assert work.flops == {
        "experts": 2 * LAYERS * tokens * kept * EXPERT,
        "attention": 2 * 2 * LAYERS * batch * sequence**2 * 64,  # scores and sums
        "dense": 2 * tokens * dense,
    }
    # At the least every matrix once, and of the experts one.
    assert work.bytes_moved > 4 * (dense + LAYERS * EXPERT)
    assert work.bytes_moved < 4 * (dense + LAYERS * EXPERTS * EXPERT) + 10**6
    assert work.intensity == pytest.approx(work.total_flops / work.bytes_moved)


def test_active_parameters_by_hand(model):
    total = sum(p.numel() for p in model.parameters())
    assert active_parameters(model, 8) == total
    assert active_parameters(model, 1) == total - LAYERS * 7 * EXPERT


@pytest.mark.parametrize(
    ("flops", "moved", "expected"),
    [(7000, 700, "compute"), (2000, 200, "overhead"), (1200, 600, "memory")],
)
def test_which_roof_holds(flops, moved, expected):
    machine = Machine(flops_per_second=10_000, bytes_per_second=1000)  # the ridge is at 10
    work = ForwardWork(flops={"experts": flops}, bytes_moved=moved)
    assert reached(work, machine, 1.0)["bound"] == expected


def test_achieved_figures_by_hand():
    machine = Machine(flops_per_second=1e6, bytes_per_second=1e5)
    work = ForwardWork(flops={"experts": 3000, "attention": 400, "dense": 600}, bytes_moved=500)
    row = reached(work, machine, 0.5)
    assert row["achieved_flops_per_second"] == 8000
    assert row["share_of_gemm"] == pytest.approx(0.008)
    assert row["share_of_copy"] == pytest.approx(0.01)
    assert row["arithmetic_intensity_flops_per_byte"] == 8
    assert machine.ridge == 10


def test_the_machine_reaches_something():
    cpu = torch.device("cpu")
    found = measure_machine(cpu, torch.float32, gemm_size=64, copy_bytes=2**16, rounds=2)
    assert found.flops_per_second > 0
    assert found.bytes_per_second > 0
