"""Putting healed weights in place of a model's own, and the model's own back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from var_moe.errors import UsageError
from var_moe.routing.healed import Healed

# (where the parameter's own values lie, their version, the healed ones), by parameter: entering
# again is a change of pointers. It lives as long as the healed weights and the parameter do.
_ready: WeakKeyDictionary[Healed, Any] = WeakKeyDictionary()


@contextmanager
def healed_weights(model: nn.Module, healed: Healed | None) -> Iterator[None]:
    """Run the model with healed weights until the block ends.

    Parameters stay the objects that they are, and their own values stay in memory: on leaving,
    also by an exception, they are the same ones, bit by bit.

    Args:
        model: whose parameters the changes name.
        healed: the changes; None changes nothing.

    Raises:
        UsageError: the model has no such parameter, of another shape, or not in memory.
    """
    if healed is None:
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        values = [(p, _value(healed, name, p)) for name, p in _parameters(model, healed).items()]
    own: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for parameter, value in values:
            own.append((parameter, parameter.data))
            parameter.data = value
        yield
    finally:
        for parameter, value in own:
            parameter.data = value


def _parameters(model: nn.Module, healed: Healed) -> dict[str, nn.Parameter]:
    named = dict(model.named_parameters())
    found = {}
    for name in healed.changes:
        parameter = named.get(name)
        if parameter is None or tuple(parameter.shape) != healed.shape(name):
            has = "none" if parameter is None else f"one of shape {tuple(parameter.shape)}"
            raise UsageError(
                f"healed weights for parameter {name!r} of shape {healed.shape(name)} do not fit "
                f"the model, which has {has}; fit them with `var-moe fit-compensation --heal`"
            )
        if parameter.device.type == "meta":
            raise UsageError(
                f"parameter {name!r} is not in memory (offloaded), so that it can't be healed; "
                "load the model onto one device"
            )
        found[name] = parameter
    return found


def _value(healed: Healed, name: str, parameter: nn.Parameter) -> Tensor:
    """The parameter's values with the change, made once as long as its own stay as they are."""
    known = _ready.setdefault(healed, WeakIdKeyDictionary())
    now = (parameter.data_ptr(), -1 if parameter.is_inference() else parameter._version)
    kept = known.get(parameter)
    if kept is None or kept[:2] != now:
        delta = healed.delta(name).to(parameter.device, torch.float32)
        kept = (*now, (parameter.data.float() + delta).to(parameter.dtype))
        known[parameter] = kept
    value: Tensor = kept[2]
    return value
