"""What this machine reaches: a short measured matrix product, and a copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

GEMM_SIZE = 1024
COPY_BYTES = 2**27  # beyond the last cache of ordinary processors
ROUNDS = 7


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Peaks that were measured here, in the model's dtype; not those of a data sheet."""

    flops_per_second: float
    bytes_per_second: float

    @property
    def ridge(self) -> float:
        """FLOPs per byte from which computing, and not memory, is what bounds."""
        return self.flops_per_second / self.bytes_per_second

    def to_dict(self) -> dict[str, Any]:
        """For result files."""
        return {
            "gemm_flops_per_second": self.flops_per_second,
            "copy_bytes_per_second": self.bytes_per_second,
            "ridge_flops_per_byte": self.ridge,
            "gemm_size": GEMM_SIZE,
            "copy_bytes": COPY_BYTES,
        }


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
        _wait(device)
        start = time.perf_counter()
        action()
        _wait(device)
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
