"""Counts of parameters, FLOPs and bytes by hand, and which roof holds."""

from __future__ import annotations

import pytest
import torch

from var_moe.analysis.machine import Machine, measure_machine
from var_moe.analysis.roofline import bound, roofline
from var_moe.analysis.work import Shapes, forward_work, shapes_of

SHAPES = Shapes(
    total_parameters=1000,
    dense=((10, 5), (20, 5)),
    other_parameters=7,
    embedding=100,
    expert_elements=30,
    expert_rows=16,
    layers=2,
    experts=4,
    top_k=2,
    attention_layers=2,
    attention_width=6,
    bytes_per_element=4,
)


def test_a_tiny_mixtral_by_hand(make_tiny_mixtral):
    model = make_tiny_mixtral()
    found = shapes_of(model, top_k=2)
    hidden, wide, vocabulary = 64, 96, 300
    expert = 3 * hidden * wide
    attention = 2 * hidden * 64 + 2 * hidden * 32  # q and o; k and v with half the heads
    router = 8 * hidden
    assert found.expert_elements == expert
    assert found.expert_rows == (hidden + 2 * wide) + (wide + hidden)
    assert found.dense_elements == 3 * (attention + router) + vocabulary * hidden
    assert found.embedding == vocabulary * hidden
    assert found.other_parameters == 7 * hidden  # norms
    assert found.attention_width == 64
    assert (found.layers, found.experts, found.attention_layers) == (3, 8, 3)
    assert found.total_parameters == sum(p.numel() for p in model.parameters())
    # All experts are all parameters.
    assert found.active_parameters(8) == found.total_parameters
    assert found.active_parameters(1) == found.total_parameters - 3 * 7 * expert


def test_work_by_hand():
    work = forward_work(SHAPES, batch_size=2, sequence=10, experts_per_token=1.5)
    pairs = 2 * 20 * 1.5
    assert work.flops == {
        "experts": 2 * pairs * 30,
        "attention": 4 * 20 * 5 * 6 * 2,
        "dense": 2 * 20 * 150,
    }
    run = 2 * 4 * (1 - 0.75**30)
    elements = 150 + run * 30 + 20 * 40 + pairs * 16 + 4 * 20 * 6 * 2
    assert work.bytes_moved == pytest.approx(4 * elements)
    assert work.intensity == pytest.approx(work.total_flops / (4 * elements))


@pytest.mark.parametrize(
    ("intensity", "compute", "memory", "expected"),
    [(10, 0.7, 0.1, "compute"), (10, 0.2, 0.9, "overhead"), (2, 0.1, 0.6, "memory")],
)
def test_which_roof_holds(intensity, compute, memory, expected):
    assert bound(intensity, 4.0, of_compute=compute, of_memory=memory) == expected


def test_achieved_figures_by_hand():
    machine = Machine(flops_per_second=1e6, bytes_per_second=1e5)
    found = roofline(
        SHAPES,
        machine,
        batch_size=2,
        sequence=10,
        arms={"baseline": {"seconds": 0.5, "experts_per_token": 2.0, "peak_bytes": 123}},
    )
    flops = 2 * 80 * 30 + 4800 + 6000
    row = found["baseline"]
    assert row["achieved_flops_per_second"] == pytest.approx(flops / 0.5)
    assert row["share_of_gemm"] == pytest.approx(flops / 0.5 / 1e6)
    assert row["peak_memory_bytes"] == 123
    assert found["machine"]["ridge_flops_per_byte"] == 10
    assert found["active_parameters"] == 150 + 7 + 100 + 2 * 2 * 30


def test_the_machine_reaches_something():
    cpu = torch.device("cpu")
    found = measure_machine(cpu, torch.float32, gemm_size=64, copy_bytes=2**16, rounds=2)
    assert found.flops_per_second > 0
    assert found.bytes_per_second > 0
    assert found.to_dict()["ridge_flops_per_byte"] == pytest.approx(found.ridge)
