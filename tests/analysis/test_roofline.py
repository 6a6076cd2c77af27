"""Counts of parameters, FLOPs and bytes by hand, and which roof holds."""

from __future__ import annotations

import pytest
import torch

from var_moe.analysis.roofline import (
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
    flops, moved = count_work(model, ids, policy)
    # q and o; k and v with half the heads; the router; the head.
    dense = LAYERS * (2 * HIDDEN * 64 + 2 * HIDDEN * 32 + 8 * HIDDEN) + VOCABULARY * HIDDEN
    experts = LAYERS * tokens * kept * EXPERT
    attention = 2 * LAYERS * batch * sequence**2 * 64  # scores and sums
    assert flops == 2 * (experts + attention + tokens * dense)
    # At the least every matrix once, and of the experts one.
    assert moved > 4 * (dense + LAYERS * EXPERT)
    assert moved < 4 * (dense + LAYERS * EXPERTS * EXPERT) + 10**6


def test_active_parameters_by_hand(model):
    total = sum(p.numel() for p in model.parameters())
    assert active_parameters(model, 8) == total
    assert active_parameters(model, 1) == total - LAYERS * 7 * EXPERT


MACHINE = {
    "gemm_flops_per_second": 10_000.0,
    "copy_bytes_per_second": 1000.0,
    "ridge_flops_per_byte": 10.0,
}


@pytest.mark.parametrize(
    ("flops", "moved", "expected"),
    [(7000, 700, "compute"), (2000, 200, "overhead"), (1200, 600, "memory")],
)
def test_which_roof_holds(flops, moved, expected):
    assert reached(flops, moved, 1.0, MACHINE)["bound"] == expected


def test_achieved_figures_by_hand():
    row = reached(4000, 500, 0.5, MACHINE)
    assert row["achieved_flops_per_second"] == 8000
    assert row["share_of_gemm"] == pytest.approx(0.8)
    assert row["share_of_copy"] == pytest.approx(1.0)
    assert row["arithmetic_intensity_flops_per_byte"] == 8


def test_the_machine_reaches_something():
    machine = measure_machine(torch.device("cpu"), torch.float32)
    flops, moved, ridge = machine.values()
    assert flops > 1e9
    assert moved > 1e8
    assert ridge == flops / moved
