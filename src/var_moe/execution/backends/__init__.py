"""Who runs the pairs that are left, by name.

A new backend is one class with one method, `ExpertsBackend.run`, in a module of its own, and a
line in `OWN`.
"""

from __future__ import annotations

from typing import Any

from var_moe.errors import UsageError
from var_moe.execution.backends.base import ExpertsBackend
from var_moe.execution.backends.fused import FusedBackend, can_fuse
from var_moe.execution.backends.grouped import GroupedBackend
from var_moe.execution.backends.packed import PackedBackend, can_pack
from var_moe.execution.backends.sorted import SortedBackend
from var_moe.execution.backends.transformers import TransformersBackend
from var_moe.models.moe_layers import experts_modules

OWN: dict[str, type[ExpertsBackend]] = {
    kind.name: kind for kind in (SortedBackend, PackedBackend, FusedBackend, GroupedBackend)
}
IMPLEMENTATION = "var_moe"
"""The name under which transformers knows our dispatch: no backend."""


def open_backend(name: str, model: Any = None) -> ExpertsBackend:
    """The backend of a name: ours (``sorted``, ``packed``, ``fused``, ``grouped``), or
    transformers'.

    It holds scratch memory, ``packed`` and ``fused`` also copies of the experts' weights, until
    `close` or the end of a ``with`` block. Give it to several `routed` blocks so that they share
    these.

    Args:
        name: or ``"auto"``, the one for the device, dtype and size of ``model``.
        model: a transformers model, for ``"auto"``.

    Raises:
        UsageError: no such backend.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if name == "auto":
        name = automatic(model)
    if name in OWN:
        return OWN[name]()
    theirs = ["eager", *(one for one in ALL_EXPERTS_FUNCTIONS if one != IMPLEMENTATION)]
    if name not in theirs:
        known = ", ".join([*OWN, *theirs])
        raise UsageError(f"experts backend {name!r}: expected one of {known}")
    return TransformersBackend(name)


def automatic(model: Any) -> str:
    """The backend that ``"auto"`` stands for.

    On a GPU ``grouped``. On CPU, where copies are small beside the memory: ``fused`` if there is a
    compiler, ``packed`` if oneDNN has the products; else ``sorted``.
    """
    if next(model.parameters()).device.type != "cpu":
        return GroupedBackend.name
    modules = [module for _, module in experts_modules(model)]
    if can_fuse(modules):
        return FusedBackend.name
    return PackedBackend.name if can_pack(modules) else SortedBackend.name
