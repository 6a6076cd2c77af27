"""Copies of experts' weights in a kernel's own layout: how long they hold, and room for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from var_moe.memory import memory_limit
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


def worth_copying(modules: list[Any], served: Callable[[torch.dtype], bool]) -> bool:
    """Whether a kernel serves these modules' dtypes, and copies of their weights, which are on the
    CPU, take little of the memory."""
    weights = [weight for module in modules for weight in weights_of(module)]
    if not weights or any(weight.device.type != "cpu" for weight in weights):
        return False
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    fits = size <= MEMORY_SHARE * memory_limit()
    return fits and all(served(dtype) for dtype in {weight.dtype for weight in weights})


def _state(module: Any) -> tuple[tuple[int, int], ...]:
    """Changes with every change of the weights that PyTorch knows of."""
    tensors = (*weights_of(module), *biases_of(module))
    return tuple((t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors)


def _sample(module: Any) -> Tensor:
    """Some of the values: those changed through ``.data`` are not known to PyTorch."""
    parts = [tensor.detach().reshape(-1) for tensor in (*weights_of(module), *biases_of(module))]
    return torch.cat([part[:: max(len(part) // _SAMPLE, 1)] for part in parts])
