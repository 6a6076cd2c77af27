"""The roofline: what a forward reaches of what the machine can, and which bound holds.

Williams, Waterman and Patterson, "Roofline: an insightful visual performance model" (2009). The
peaks are measured here (`analysis.machine`), the work is counted from shapes (`analysis.work`).
"""

from __future__ import annotations

from typing import Any

from var_moe.analysis.machine import Machine
from var_moe.analysis.work import Shapes, forward_work

REACHED = 0.5
"""Share of its bound below which neither computing nor memory is what holds a forward up."""


def roofline(
    shapes: Shapes,
    machine: Machine,
    *,
    batch_size: int,
    sequence: int,
    arms: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """Figures of each arm against the machine's peaks.

    Args:
        shapes: the model's sizes.
        machine: measured peaks.
        batch_size, sequence: of the timed forward.
        arms: name -> ``seconds`` of a forward, ``experts_per_token`` that it ran, and
            ``peak_bytes`` of memory.
    """
    return {
        "counted": "multiply-adds of experts (executed pairs), attention (causal half), head and "
        "all other matrices; not norms, activations, softmax",
        "total_parameters": shapes.total_parameters,
        "active_parameters": round(shapes.active_parameters(shapes.top_k)),
        "machine": machine.to_dict(),
        "setting": {"batch_size": batch_size, "sequence": sequence},
        **{
            name: _arm(shapes, machine, batch_size=batch_size, sequence=sequence, **figures)
            for name, figures in arms.items()
        },
    }


def _arm(
    shapes: Shapes,
    machine: Machine,
    *,
    batch_size: int,
    sequence: int,
    seconds: float,
    experts_per_token: float,
    peak_bytes: float,
) -> dict[str, Any]:
    work = forward_work(
        shapes, batch_size=batch_size, sequence=sequence, experts_per_token=experts_per_token
    )
    flops, moved = work.total_flops / seconds, work.bytes_moved / seconds
    of_compute, of_memory = flops / machine.flops_per_second, moved / machine.bytes_per_second
    return {
        "active_parameters": round(shapes.active_parameters(experts_per_token)),
        "experts_per_token": experts_per_token,
        "peak_memory_bytes": int(peak_bytes),
        "flops": work.flops,
        "bytes": work.bytes_moved,
        "achieved_flops_per_second": flops,
        "achieved_bytes_per_second": moved,
        "share_of_gemm": of_compute,
        "share_of_copy": of_memory,
        "arithmetic_intensity_flops_per_byte": work.intensity,
        "bound": bound(work.intensity, machine.ridge, of_compute=of_compute, of_memory=of_memory),
    }


def bound(intensity: float, ridge: float, *, of_compute: float, of_memory: float) -> str:
    """``compute`` or ``memory``: the roof above this intensity; ``overhead`` where it is far off.

    Args:
        intensity: FLOPs per byte of the work.
        ridge: FLOPs per byte where the machine's two roofs meet.
        of_compute, of_memory: reached share of each peak.
    """
    name, reached = ("compute", of_compute) if intensity >= ridge else ("memory", of_memory)
    return name if reached >= REACHED else "overhead"
