"""LoRA with the library peft: on the attention's projections and on the experts.

peft reaches experts, whose weights are parameters of three dimensions, by `target_parameters`: it
wraps the experts module once per parameter, and registers, for the time of a forward, a
parametrization W + B A. The experts module itself stays the one that transformers dispatches, so
that this goes through the experts seam as it is: the module is looked up by identity, and what a
backend reads off it are the sums. The sums of a whole layer's experts are made in each forward,
in the memory of a second copy of that layer.

Only fitting needs peft. What is fitted ends as two factors per parameter, which are merged into
the weights wherever they are used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from var_moe.calibration.healed_files import AdapterKey, AdapterLayout, factors
from var_moe.errors import UsageError
from var_moe.execution.dispatch import experts_modules
from var_moe.extras import require
from var_moe.routing.healed import Change

RANK = 8
_NAME = "default"


def targets(model: Any) -> tuple[list[str], list[str]]:
    """Names of the attention's linear modules, and of the experts' three-dimensional parameters.

    Raises:
        UsageError: the model has neither.
    """
    experts = [name for name, _ in experts_modules(model)]
    linears = [
        f"{name}.{own}"
        for name, module in model.named_modules()
        if "attention" in type(module).__name__.lower()
        for own, part in module.named_modules()
        if type(part) is nn.Linear and own
    ]
    parameters = [
        f"{name}.{own}"
        for name, module in experts_modules(model)
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and parameter.is_floating_point()
    ]
    linears = [one for one in dict.fromkeys(linears) if not one.startswith(tuple(experts))]
    if not linears and not parameters:
        raise UsageError(
            "--heal lora: the model has neither linear attention projections nor experts' "
            "parameters in the form that adapters are made for"
        )
    return linears, parameters


class Adapters(nn.Module):
    """The adapters that are in a model, as a module of their parameters."""

    def __init__(self, model: Any, wrapped: Any) -> None:
        super().__init__()
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._wrapped = (wrapped,)  # in a tuple: not a part of this module
        self._layers: dict[str, Any] = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, BaseTunerLayer)
        }
        self.factors = nn.ParameterList()
        for layer in self._layers.values():
            self.factors += [layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight]

    def disabled(self) -> AbstractContextManager[Any]:
        """Within it the model is what it was without them."""
        found: AbstractContextManager[Any] = self._wrapped[0].disable_adapter()
        return found

    def changes(self) -> dict[str, Change]:
        """Two factors for each parameter; copies."""
        found: dict[str, Change] = {}
        for name, key in self.layout().keys.items():
            layer = self._layers[key.module]
            a, b = (one[_NAME].weight.detach().float() for one in (layer.lora_A, layer.lora_B))
            left, right = factors(a, b, key)
            found[name] = (left.contiguous().clone(), right.contiguous().clone())
        return found

    def layout(self) -> AdapterLayout:
        """How peft's files hold the factors."""
        config = self._wrapped[0].peft_config[_NAME]
        keys = {}
        for place, layer in self._layers.items():
            module = place.replace(".base_layer", "")
            parameter = getattr(layer, "parameter_name", None)
            experts = 0 if parameter is None else int(layer.num_experts)
            key = AdapterKey(module=place, experts=experts, swapped=_swapped(layer, experts))
            keys[f"{module}.{parameter or 'weight'}"] = key
        plain = {k: v for k, v in config.to_dict().items() if _is_plain(v)}
        for name in ("target_modules", "target_parameters"):
            plain[name] = sorted(getattr(config, name) or [])
        plain |= {"inference_mode": True, "peft_type": "LORA", "base_model_name_or_path": None}
        return AdapterLayout(keys=keys, config=plain)


def _swapped(layer: Any, experts: int) -> bool:
    """Whether an experts' parameter is (experts, out, in), in peft's own reading."""
    if not experts:
        return False
    a, b = (one[_NAME].weight.detach() for one in (layer.lora_A, layer.lora_B))
    with torch.no_grad():
        before = b.clone()
        b.normal_(generator=torch.Generator(b.device).manual_seed(0))
        try:
            wanted = layer.get_delta_weight(_NAME).float()
            for swapped in (True, False):
                key = AdapterKey(module="", experts=experts, swapped=swapped)
                left, right = factors(a.float(), b.float(), key)
                found = left @ right
                if found.shape == wanted.shape and torch.allclose(
                    found, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max())
                ):
                    return swapped
        finally:
            b.copy_(before)
    raise UsageError("this version of peft keeps experts' adapters in a form that is not known")


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(one) for one in value)
    return value is None or isinstance(value, str | int | float | bool)


@contextmanager
def adapters(model: Any, *, rank: int = RANK, seed: int) -> Iterator[Adapters]:
    """Put adapters into the model until the block ends; they begin as no change.

    Args:
        model: a transformers model; after the block its modules and parameters are those before.
        rank: of each.
        seed: draws A.

    Raises:
        UsageError: no peft, or nothing to adapt.
    """
    require("peft")
    from peft import LoraConfig, get_peft_model

    linears, parameters = targets(model)
    # Parametrizing for a forward puts a parameter at the end of its module's, and adapters are
    # put in one by one: what was before is noted, and comes back whatever happens.
    children = [(module, dict(module._modules)) for module in model.modules()]
    own = [(module, dict(module._parameters)) for module in model.modules()]
    state = dict(model.__dict__)
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,  # a scale of one
        lora_dropout=0.0,
        target_modules=linears,
        target_parameters=parameters,
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wrapped = get_peft_model(model, config)
        wrapped.eval()
        yield Adapters(model, wrapped)
    finally:
        for module, parts in children:
            _put_back(module._modules, parts)
        for module, held in own:
            _put_back(module._parameters, held)
        for name in set(model.__dict__) - set(state):
            del model.__dict__[name]
        for parameter, value in asked:
            parameter.requires_grad_(value)


def _put_back(now: dict[str, Any], before: dict[str, Any]) -> None:
    if list(now.items()) != list(before.items()):
        now.clear()
        now.update(before)
