"""One source of routing maths for two array libraries.

A decision is a few dozen operations on arrays of some tokens. On the CPU a call of numpy costs
about a sixth of one of torch, which is most of what VAR costs in generation; elsewhere the
arrays must stay on their device. `operations` chooses, and both views share their memory.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

Array: TypeAlias = Any
"""A torch tensor or a numpy array; the maths uses what both understand alike."""

_NUMPY_KNOWS = (torch.float32, torch.float64)


class Operations(Protocol):
    """What torch and numpy call or do differently."""

    @property
    def library(self) -> ModuleType:
        """torch or numpy."""

    def where(self, condition: Array, yes: Array, no: Array) -> Array:
        """Elementwise choice."""

    def take(self, values: Array, slots: Array) -> Array:
        """``values[t, slots[t, j]]``: (T, K), (T, J) -> (T, J)."""

    def put(self, values: Array, slots: Array, new: Array) -> Array:
        """A copy of (T, K) with ``new`` (T, J) in slots (T, J)."""

    def order(self, values: Array, *, descending: bool = False) -> Array:
        """Stable order of each row. (T, K) -> (T, K) int64"""

    def least(self, size: int, group: Array, value: Array, start: int) -> Array:
        """Lowest ``value`` (T,) of each ``group`` (T,), ``start`` where it has none. (size,)"""

    def clip(self, values: Array, high: int) -> Array:
        """Values above ``high`` set to it."""

    def at_least(self, values: Array, low: float) -> Array:
        """Values below ``low`` set to it."""

    def stack(self, *columns: Array) -> Array:
        """(T,) each -> (T, J)."""

    def to_tensor(self, values: Array) -> Tensor:
        """As a tensor, without a copy."""

    def small(self, values: Array) -> Tensor:
        """Numbers below 256 as a uint8 tensor."""

    def of_tensor(self, values: Tensor) -> Array:
        """A tensor as what this library works on, without a copy."""

    def constant(self, like: Array, value: float, *, boolean: bool = False) -> Array:
        """An array of the shape of ``like``, of its type or bool."""


class _Torch:
    library: ModuleType = torch

    def where(self, condition: Array, yes: Array, no: Array) -> Array:
        return torch.where(condition, yes, no)

    def take(self, values: Array, slots: Array) -> Array:
        return values.gather(1, slots)

    def put(self, values: Array, slots: Array, new: Array) -> Array:
        return values.scatter(1, slots, new)

    def order(self, values: Array, *, descending: bool = False) -> Array:
        return values.argsort(dim=1, descending=descending, stable=True)

    def least(self, size: int, group: Array, value: Array, start: int) -> Array:
        out = torch.full((size,), start, dtype=value.dtype, device=value.device)
        return out.scatter_reduce_(0, group, value, "amin")

    def clip(self, values: Array, high: int) -> Array:
        return values.clamp(max=high)

    def at_least(self, values: Array, low: float) -> Array:
        return values.clamp(min=low)

    def stack(self, *columns: Array) -> Array:
        return torch.stack(columns, dim=1)

    def to_tensor(self, values: Array) -> Tensor:
        assert isinstance(values, Tensor)
        return values

    def small(self, values: Array) -> Tensor:
        return self.to_tensor(values.to(torch.uint8))

    def of_tensor(self, values: Tensor) -> Array:
        return values

    def constant(self, like: Array, value: float, *, boolean: bool = False) -> Array:
        return torch.full_like(like, value, dtype=torch.bool if boolean else None)


class _Numpy:
    library: ModuleType = np

    def where(self, condition: Array, yes: Array, no: Array) -> Array:
        return np.where(condition, yes, no)

    def take(self, values: Array, slots: Array) -> Array:
        return values[np.arange(len(values))[:, None], slots]  # take_along_axis is much slower

    def put(self, values: Array, slots: Array, new: Array) -> Array:
        out = values.copy()
        out[np.arange(len(out))[:, None], slots] = new
        return out

    def order(self, values: Array, *, descending: bool = False) -> Array:
        return np.argsort(-values if descending else values, axis=1, kind="stable")

    def least(self, size: int, group: Array, value: Array, start: int) -> Array:
        out = np.full(size, start, dtype=value.dtype)
        np.minimum.at(out, group, value)
        return out

    def clip(self, values: Array, high: int) -> Array:
        return np.minimum(values, high)

    def at_least(self, values: Array, low: float) -> Array:
        return np.maximum(values, low)

    def stack(self, *columns: Array) -> Array:
        out = np.empty((len(columns[0]), len(columns)), dtype=columns[0].dtype)
        for number, column in enumerate(columns):
            out[:, number] = column
        return out

    def to_tensor(self, values: Array) -> Tensor:
        return torch.from_numpy(values)

    def small(self, values: Array) -> Tensor:
        return torch.from_numpy(values.astype(np.uint8))

    def of_tensor(self, values: Tensor) -> Array:
        return values.numpy()

    def constant(self, like: Array, value: float, *, boolean: bool = False) -> Array:
        return np.full(like.shape, value, dtype=bool if boolean else like.dtype)


TORCH: Operations = _Torch()
NUMPY: Operations = _Numpy()


def operations(weight: Tensor) -> Operations:
    """The library for decisions about these weights: numpy where it can see them as they are."""
    seen = weight.device.type == "cpu" and weight.dtype in _NUMPY_KNOWS
    return NUMPY if seen and not weight.requires_grad else TORCH
