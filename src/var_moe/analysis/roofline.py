"""The roofline: what a forward reaches of what this machine can, and which bound holds.

Williams, Waterman and Patterson, "Roofline: an insightful visual performance model" (2009). The
machine's peaks are measured here: a matrix product and a copy. A forward's work is that of its
matrix products and attention, counted by torch while it runs: two FLOPs for each multiply-add, and
the bytes that these operators read and write. Norms, activations, softmax and gathering are a few
percent of the FLOPs and are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

from var_moe.evaluation.throughput import policy_arm
from var_moe.models.moe_layers import experts_modules
from var_moe.routing.base import RoutingPolicy

GEMM_SIZE = 1024
COPY_BYTES = 2**27  # beyond the last cache of ordinary processors
REACHED = 0.5
"""Share of its bound below which neither computing nor memory is what holds a forward up."""


def measure_machine(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Peaks that are measured here, not those of a data sheet; a copy reads and writes.

    The ridge is the intensity from which computing, and not memory, is what bounds.
    """
    left = torch.ones((GEMM_SIZE, GEMM_SIZE), device=device, dtype=dtype)
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    tensors = {"left": left, "product": torch.empty_like(left)}
    tensors |= {"source": source, "target": torch.empty_like(source)}

    def best(statement: str) -> float:
        timer = Timer(statement, globals=tensors, num_threads=torch.get_num_threads())
        return float(min(timer.blocked_autorange(min_run_time=0.2).times))

    flops = 2 * GEMM_SIZE**3 / best("torch.mm(left, left, out=product)")
    moved = 2 * COPY_BYTES / best("target.copy_(source)")
    return {
        "gemm_flops_per_second": flops,
        "copy_bytes_per_second": moved,
        "ridge_flops_per_byte": flops / moved,
    }


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # of shapes


_FURTHER = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
"""Operators that torch's counter does not know."""


class _Bytes(TorchDispatchMode):
    """Sums what the counted operators read and write."""

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (*flop_registry, *_FURTHER):
            first = out[0] if isinstance(out, tuple) else out  # of attention, without its log sum
            tensors = [one for one in (*args, first) if isinstance(one, Tensor)]
            self.total += sum(one.nbytes for one in tensors)
        return out


def count_work(model: Any, ids: Tensor, policy: RoutingPolicy | None) -> tuple[int, int]:
    """FLOPs and bytes of a forward of (B, S) ids; without a policy, one that keeps all pairs.

    The experts run by the backend ``sorted``, whose operators torch's counter knows.
    """
    counter, moved = FlopCounterMode(display=False, custom_mapping=_FURTHER), _Bytes()  # type: ignore[no-untyped-call]
    with policy_arm(model, policy, backend="sorted")(), torch.no_grad(), counter, moved:
        model(input_ids=ids.to(model.device), use_cache=False)
    return int(counter.get_total_flops()), moved.total


def active_parameters(model: Any, experts_per_token: float) -> int:
    """Weights that one token uses: all that is no expert, and so many experts in each layer.

    The embedding counts as a whole, as is usual.
    """
    total = float(sum(p.numel() for p in model.parameters()))
    for _, module in experts_modules(model):
        idle = 1 - experts_per_token / int(getattr(module, "num_experts", 1))
        total -= idle * sum(p.numel() for p in module.parameters())
    return round(total)


def roofline(
    model: Any, ids: Tensor, policy: RoutingPolicy, systems: Mapping[str, Any]
) -> dict[str, Any]:
    """What the unmodified model and a policy reach of this machine's peaks.

    Args:
        model: a transformers MoE causal language model.
        ids: (B, S) of the forward that was timed.
        policy: who decides.
        systems: time and memory of both, as ``baseline`` and ``var`` of the analysis.
    """
    machine = measure_machine(model.device, model.dtype)
    stats = systems["var"]["var_stats"]
    arms = {"baseline": (stats["top_k"], None), "var": (stats["experts_per_token"], policy)}
    return {
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "machine": machine,
        **{
            name: {
                "active_parameters": active_parameters(model, experts),
                "experts_per_token": float(experts),
                "peak_memory_bytes": systems[name]["memory"]["peak_bytes"],
                **reached(
                    *count_work(model, ids, chosen), systems[name]["avg_time_ms"] / 1000, machine
                ),
            }
            for name, (experts, chosen) in arms.items()
        },
    }


def reached(flops: int, moved: int, seconds: float, machine: Mapping[str, float]) -> dict[str, Any]:
    """Figures of a forward against the machine's peaks.

    ``bound`` is the roof above its intensity, ``compute`` or ``memory``; ``overhead`` where the
    forward reaches less than `REACHED` of that.
    """
    of_gemm = flops / seconds / machine["gemm_flops_per_second"]
    of_copy = moved / seconds / machine["copy_bytes_per_second"]
    computes = flops / moved >= machine["ridge_flops_per_byte"]
    close = (of_gemm if computes else of_copy) >= REACHED
    return {
        "flops": flops,
        "bytes": moved,
        "achieved_flops_per_second": flops / seconds,
        "achieved_bytes_per_second": moved / seconds,
        "share_of_gemm": of_gemm,
        "share_of_copy": of_copy,
        "arithmetic_intensity_flops_per_byte": flops / moved,
        "bound": ("compute" if computes else "memory") if close else "overhead",
    }
