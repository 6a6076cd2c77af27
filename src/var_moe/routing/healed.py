"""Healed weights: small changes of a model's own weights, fitted together with a compensation.

They belong to the compensation that they were fitted with and to the cuts of a policy: whoever
runs the model with that compensation adds them, and takes them away again (see
`models.healed_weights`). They are fitted by `fitting.heal`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

Change = tuple[Tensor] | tuple[Tensor, Tensor]
"""A difference to a weight; or two factors, (..., out, r) and (..., r, in), whose product it is."""


@dataclass(frozen=True, eq=False)
class Healed:
    """What is added to a model's weights, by the name of the parameter."""

    changes: Mapping[str, Change]

    def delta(self, name: str) -> Tensor:
        """The difference to one parameter, in its shape."""
        change = self.changes[name]
        return change[0] if len(change) == 1 else change[0] @ change[1]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the difference, without making it."""
        change = self.changes[name]
        if len(change) == 1:
            return tuple(change[0].shape)
        return (*change[0].shape[:-1], change[1].shape[-1])

    @cached_property
    def hash(self) -> str:
        """Identity of names and values."""
        digest = hashlib.sha256()
        for name, change in sorted(self.changes.items()):
            digest.update(f"{name} {len(change)}".encode())
            for tensor in change:
                digest.update(str(tuple(tensor.shape)).encode())
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()
