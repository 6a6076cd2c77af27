"""Copies of experts' weights in a kernel's own layout: how long they hold, and room for them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from var_moe.models.moe_layers import biases_of, weights_of

MEMORY_SHARE = 0.25
"""Of the memory that this process may use, at most so much is taken for copies."""
_SAMPLE = 1024

T = TypeVar("T")


@dataclass(frozen=True)
class _Copy(Generic[T]):
    """What was made of a module's weights, and what tells that they are still the same."""

    made: T
    state: tuple[tuple[int, int], ...]
    sample: Tensor


class WeightCopies(Generic[T]):
    """One copy for each experts module, made anew where its weights have changed.

    Args:
        make: makes it of a module.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make
        self._copies: dict[int, _Copy[T]] = {}
        self._checked: set[int] = set()  # copies whose values this session has compared

    def begin(self) -> None:
        """A session starts: each copy is compared with its weights once more."""
        self._checked.clear()

    def clear(self) -> None:
        """Forget all copies."""
        self._copies.clear()

    def of(self, module: Any) -> T:
        """The module's copy."""
        key, state = id(module), _state(module)
        copy = self._copies.get(key)
        fresh = copy is not None and copy.state == state
        if copy is None or not fresh or key not in self._checked:
            sample = _sample(module)
            if copy is None or not fresh or not torch.equal(copy.sample, sample):
                # Ordinary tensors, so that they serve inside and outside inference mode.
                with torch.inference_mode(False), torch.no_grad():
                    copy = self._copies[key] = _Copy(self._make(module), state, sample)
            self._checked.add(key)
        return copy.made


def can_copy(module: Any, hidden: Tensor) -> bool:
    """Whether a layer can run on copies of its weights: no gradients, no adapter, on a CPU."""
    if torch.is_grad_enabled() or hidden.device.type != "cpu":
        return False
    # An adapter on experts makes their weights anew for each forward.
    return hidden.dtype == module.down_proj.dtype and not parametrize.is_parametrized(module)


def have_room(modules: list[Any]) -> bool:
    """Whether copies of these modules' weights, which are on the CPU, take little of the memory."""
    weights = [weight for module in modules for weight in weights_of(module)]
    if not weights or any(weight.device.type != "cpu" for weight in weights):
        return False
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    return size <= MEMORY_SHARE * _memory()


@cache
def _memory() -> int:
    return memory_limit()


def memory_limit(root: Path = Path("/")) -> int:
    """Bytes that this process may use: the machine's, or less where a control group limits it.

    Not what is free now, so that the same choice is made each time.

    Args:
        root: where ``proc`` and ``sys`` lie.
    """
    if not hasattr(os, "sysconf"):  # not a Unix
        return 0
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    listed = root / "proc/self/cgroup"
    for group in listed.read_text().splitlines() if listed.is_file() else []:
        _, controllers, own = group.split(":", 2)  # in version 2 there are no controllers
        if controllers and "memory" not in controllers.split(","):
            continue
        version_2 = (root / "sys/fs/cgroup", "memory.max")
        version_1 = (root / "sys/fs/cgroup/memory", "memory.limit_in_bytes")
        top, name = version_1 if controllers else version_2
        # The groups above limit it, too. In a container its own may be the one at the top.
        place = top / own.strip("/")
        for folder in (place, *place.parents[: len(place.relative_to(top).parts)]):
            try:
                limits.append(int((folder / name).read_text()))
            except (OSError, ValueError):  # no such group, or "max"
                continue
    return min(limits)


def _state(module: Any) -> tuple[tuple[int, int], ...]:
    """Changes with every change of the weights that PyTorch knows of."""
    tensors = (*weights_of(module), *biases_of(module))
    return tuple((t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors)


def _sample(module: Any) -> Tensor:
    """Some of the values: those changed through ``.data`` are not known to PyTorch."""
    parts = [tensor.detach().reshape(-1) for tensor in (*weights_of(module), *biases_of(module))]
    return torch.cat([part[:: max(len(part) // _SAMPLE, 1)] for part in parts])
