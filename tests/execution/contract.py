"""What the tests of the experts dispatch share: policies, and looking at what is executed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from var_moe.execution.backends import OWN
from var_moe.models.moe_layers import experts_modules
from var_moe.routing.decision import ForwardContext, Routing
from var_moe.routing.simple import NativePolicy


class DropLastPair(NativePolicy):
    """Keeps all pairs but one of the last token, in one layer.

    It is the one whose expert has the most tokens: with three rows or fewer, a matrix product
    on CPU may take another kernel, which rounds the expert's other tokens differently.
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        routing = super().route(context, layer, index, weight)
        if layer != self.layer:
            return routing
        index = index.clone()
        index[-1, index.flatten().bincount()[index[-1]].argmax()] = -1
        return Routing(index=index, weight=weight, tier=routing.tier)


class Failing(NativePolicy):
    """Raises in one layer."""

    def __init__(self, layer: int = 1) -> None:
        self.layer = layer

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        if layer == self.layer:
            raise RuntimeError("policy failed")
        return super().route(context, layer, index, weight)


def logits(model: Any, ids: Tensor, backend: str | None = None) -> Tensor:
    """(B, S, V), after choosing transformers' own backend where one is named."""
    if backend:
        model.set_experts_implementation(backend)
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


@dataclass(frozen=True)
class Call:
    """One call of an experts module, as the model makes it."""

    name: str
    module: nn.Module
    hidden: Tensor  # (T, D)
    index: Tensor  # (T, K)
    weight: Tensor  # (T, K)
    output: Tensor  # (T, D)


@contextmanager
def watched(model: Any) -> Iterator[list[Call]]:
    """The calls of the model's experts modules, in the order of execution."""
    calls: list[Call] = []
    handles = []
    for name, module in experts_modules(model):

        def hook(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
            calls.append(Call(name, module, *(a.clone() for a in args), output.clone()))

        handles.append(module.register_forward_hook(hook))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class SpyBackend:
    """An experts backend that notes what it executes and leaves it to one of transformers'."""

    inner: str = "grouped_mm"
    executed: list[tuple[nn.Module, Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, module: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        assert index.shape[1] == 1
        assert (weight == 1).all()
        self.executed.append((module, hidden.clone(), index[:, 0].clone()))
        own = type(module).forward.__wrapped__
        inner = ALL_EXPERTS_FUNCTIONS.get_interface(self.inner, own)
        return inner(module, hidden, index, weight)


@contextmanager
def spied(inner: str) -> Iterator[SpyBackend]:
    """A `SpyBackend` as ``spy`` among transformers' experts backends."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    spy = SpyBackend("grouped_mm" if inner in OWN else inner)
    ALL_EXPERTS_FUNCTIONS["spy"] = spy
    try:
        yield spy
    finally:
        del ALL_EXPERTS_FUNCTIONS["spy"]


def eager(call: Call, index: Tensor, weight: Tensor) -> Tensor:
    """The module's own forward, for a decision where -1 is a pair that adds nothing."""
    forward = type(call.module).forward.__wrapped__
    weight = torch.where(index < 0, torch.zeros_like(weight), weight)
    with torch.inference_mode():
        return forward(call.module, call.hidden, index.clamp(min=0), weight)


def relative(got: Tensor, expected: Tensor) -> float:
    """Distance of two tensors in units of the expected one's norm."""
    expected = expected.double()
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def snapshot(model: Any) -> dict[str, Any]:
    """What must be the same after a routed block: hooks, attributes, tensors, configuration."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if not _is_store(key)}
        state[name] = {key: (id(value), repr(value)[:200]) for key, value in own.items()}
        for store in ("_forward_hooks", "_forward_pre_hooks", "_parameters", "_buffers"):
            state[name][store] = {key: id(value) for key, value in getattr(module, store).items()}
    state["tensors"] = {key: value.clone() for key, value in model.state_dict().items()}
    state["backend"] = model.get_experts_implementation()
    state["config"] = model.config.to_dict()
    return state


def _is_store(key: str) -> bool:
    """torch.nn.Module's own stores, and configurations: both are compared by their content."""
    stores = ("config", "_parameters", "_buffers", "_modules", "_forward_hooks_always_called")
    return key in stores or (key.startswith("_") and key.endswith(("hooks", "_kwargs")))


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Where two snapshots differ."""
    found = [name for name in before.keys() | after.keys() if name != "tensors"]
    found = [name for name in found if before.get(name) != after.get(name)]
    mine, theirs = before["tensors"], after["tensors"]
    found += sorted(mine.keys() ^ theirs.keys())
    return found + [key for key in mine.keys() & theirs.keys() if not _same(mine[key], theirs[key])]


def _same(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one, two)
