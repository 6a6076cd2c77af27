"""The weights of a model that healing may change, trained beside it: the model's stay as they are.

What is trained is a difference, in float32. The student's forward is called with the sums in
place of the parameters (`torch.func.functional_call`), so that there is nothing to put back, and
the teacher's forward is the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from var_moe.errors import UsageError
from var_moe.models.router_hooks import router_modules
from var_moe.routing.healed import Change

ROUTER, NORMS, LORA = "router", "norms", "lora"
PARTS = (ROUTER, NORMS, LORA)


def weights_of(model: Any, parts: Sequence[str]) -> list[str]:
    """Names of the parameters that ``router`` and ``norms`` train.

    Raises:
        UsageError: the model has none of one kind, or does not say where its routers are.
    """
    found: list[str] = []
    if ROUTER in parts:
        for name, module in router_modules(model):
            own = [n for n, p in module.named_parameters() if p.is_floating_point()]
            found += [f"{name}.{one}" for one in own]
    if NORMS in parts:
        norms = _norms(model)
        if not norms:
            raise UsageError("--heal norms: the model has no normalisation weights")
        found += norms
    return list(dict.fromkeys(found))


def _norms(model: nn.Module) -> list[str]:
    return [
        f"{name}.{own}"
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 1 and parameter.is_floating_point()
    ]


class Differences(nn.Module):
    """Trainable differences to some parameters of a model.

    Args:
        model: not changed.
        names: of the parameters.
        start: what the differences begin with; by default zero.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], start: Mapping[str, Change] | None = None
    ) -> None:
        super().__init__()
        named = dict(model.named_parameters())
        self._names = list(names)
        # In a list, so that they are not this module's parameters.
        self._own = [named[name] for name in names]
        self.differences = nn.ParameterList()
        for name, own in zip(names, self._own, strict=True):
            value = torch.zeros(own.shape, dtype=torch.float32, device=own.device)
            if start and name in start:
                value += start[name][0].to(value)
            self.differences.append(nn.Parameter(value))

    def called(self, model: nn.Module) -> Any:
        """The model as a function that runs with the differences added."""
        if not self._names:
            return model
        # By identity: adapters wrap modules, which changes names.
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        values = {
            names[id(own)]: (own.detach().float() + change).to(own.dtype)
            for own, change in zip(self._own, self.differences, strict=True)
        }

        def call(**inputs: Any) -> Any:
            return functional_call(model, values, (), inputs)

        return call

    def changes(self) -> dict[str, Change]:
        """What has changed, by the name of the parameter; copies."""
        pairs = zip(self._names, self.differences, strict=True)
        found: dict[str, Tensor] = {name: value.detach().clone() for name, value in pairs}
        return {name: (value,) for name, value in found.items() if value.any()}
