"""The roofline: what a forward reaches of what this machine can, and which bound holds.

Williams, Waterman and Patterson, "Roofline: an insightful visual performance model" (2009). The
machine's peaks are measured here: a matrix product and a copy. A forward's work is that of its
matrix products and attention, counted by torch while it runs: two FLOPs for each multiply-add, and
the bytes that these operators read and write. Norms, activations, softmax and gathering are not
counted: they are a few percent of the FLOPs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

from var_moe.evaluation.throughput import policy_arm
from var_moe.models.moe_layers import experts_modules
from var_moe.routing.base import RoutingPolicy

GEMM_SIZE = 1024
COPY_BYTES = 2**27  # beyond the last cache of ordinary processors
ROUNDS = 7
REACHED = 0.5
"""Share of its bound below which neither computing nor memory is what holds a forward up."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Peaks that were measured here, in the model's dtype; not those of a data sheet."""

    flops_per_second: float
    bytes_per_second: float

    @property
    def ridge(self) -> float:
        """FLOPs per byte from which computing, and not memory, is what bounds."""
        return self.flops_per_second / self.bytes_per_second


def measure_machine(
    device: torch.device,
    dtype: torch.dtype,
    *,
    gemm_size: int = GEMM_SIZE,
    copy_bytes: int = COPY_BYTES,
    rounds: int = ROUNDS,
) -> Machine:
    """The best of some rounds of each; a copy reads and writes, which counts as both."""
    left = torch.ones((gemm_size, gemm_size), device=device, dtype=dtype)
    right, product = left.clone(), torch.empty_like(left)
    source = torch.ones(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    gemm = _best(lambda: torch.mm(left, right, out=product), device, rounds)
    copy = _best(lambda: target.copy_(source), device, rounds)
    return Machine(flops_per_second=2 * gemm_size**3 / gemm, bytes_per_second=2 * copy_bytes / copy)


def _best(action: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Seconds of the fastest run, the first left out."""
    taken = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


@dataclass(frozen=True, kw_only=True)
class ForwardWork:
    """FLOPs by part (experts, attention, dense) and bytes of one forward's products."""

    flops: dict[str, int]
    bytes_moved: int

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.total_flops / self.bytes_moved


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # of shapes


_FURTHER = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
"""Operators that torch's counter does not know."""
_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)
"""Operators of dense layers and experts; the others that are counted are attention's."""


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
            self.total += sum(one.numel() * one.element_size() for one in tensors)
        return out


def count_work(model: Any, ids: Tensor, policy: RoutingPolicy | None) -> ForwardWork:
    """Count a forward of (B, S) ids; without a policy, one that keeps all pairs.

    The experts run by the backend ``sorted``, whose operators torch's counter knows.
    """
    counter, moved = FlopCounterMode(display=False, custom_mapping=_FURTHER), _Bytes()  # type: ignore[no-untyped-call]
    device = next(model.parameters()).device
    with policy_arm(model, policy, backend="sorted")(), torch.no_grad(), counter, moved:
        model(input_ids=ids.to(device), use_cache=False)
    counts = counter.get_flop_counts()
    whole = counts["Global"]
    root = type(model).__name__
    experts = sum(sum(counts[f"{root}.{name}"].values()) for name, _ in experts_modules(model))
    products = sum(whole.get(operator, 0) for operator in _PRODUCTS)
    return ForwardWork(
        flops={
            "experts": experts,
            "attention": sum(whole.values()) - products,
            "dense": products - experts,
        },
        bytes_moved=moved.total,
    )


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
    weight = next(model.parameters())
    machine = measure_machine(weight.device, weight.dtype)
    stats = systems["var"]["var_stats"]
    kept = {"baseline": stats["top_k"], "var": stats["experts_per_token"]}
    return {
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "machine": {
            "gemm_flops_per_second": machine.flops_per_second,
            "copy_bytes_per_second": machine.bytes_per_second,
            "ridge_flops_per_byte": machine.ridge,
        },
        **{
            name: {
                "active_parameters": active_parameters(model, kept[name]),
                "experts_per_token": float(kept[name]),
                "peak_memory_bytes": systems[name]["memory"]["peak_bytes"],
                **reached(
                    count_work(model, ids, chosen), machine, systems[name]["avg_time_ms"] / 1000
                ),
            }
            for name, chosen in (("baseline", None), ("var", policy))
        },
    }


def reached(work: ForwardWork, machine: Machine, seconds: float) -> dict[str, Any]:
    """Figures of a forward that took so many seconds, against the machine's peaks.

    ``bound`` is the roof above its intensity, ``compute`` or ``memory``; ``overhead`` where the
    forward reaches less than `REACHED` of that.
    """
    flops, moved = work.total_flops / seconds, work.bytes_moved / seconds
    of_gemm, of_copy = flops / machine.flops_per_second, moved / machine.bytes_per_second
    computes = work.intensity >= machine.ridge
    close = (of_gemm if computes else of_copy) >= REACHED
    return {
        "flops": work.flops,
        "bytes": work.bytes_moved,
        "achieved_flops_per_second": flops,
        "achieved_bytes_per_second": moved,
        "share_of_gemm": of_gemm,
        "share_of_copy": of_copy,
        "arithmetic_intensity_flops_per_byte": work.intensity,
        "bound": ("compute" if computes else "memory") if close else "overhead",
    }
