"""The experts dispatch: the public place where transformers hands pairs to an experts backend.

transformers calls every experts module as ``experts(hidden (T, D), index (T, K), weight (T, K))``
and dispatches through ``ALL_EXPERTS_FUNCTIONS``. One function of ours is registered there; it
hands the call to the session that runs the module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from var_moe.errors import UsageError
from var_moe.execution.backends import IMPLEMENTATION
from var_moe.models.moe_layers import REFUSED_BACKENDS, experts_modules


class ExpertsSession(Protocol):
    """Whoever runs the experts of a model's layers."""

    def experts(
        self, layer: int, module: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor
    ) -> Tensor:
        """The layer's output (T, D) for the router's decision."""


# Which session runs a module: filled and emptied by `dispatched` alone.
_active: dict[int, tuple[ExpertsSession, int]] = {}


def _dispatch(module: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The function that transformers calls for each experts module of a routed model."""
    running = _active.get(id(module))
    if running is None:
        raise UsageError(
            "a model that is not routed shares its config with one that is: load it with a config "
            "of its own (copy.deepcopy(config))"
        )
    session, layer = running
    return session.experts(layer, module, hidden, index, weight)


@contextmanager
def dispatched(model: Any, session: ExpertsSession) -> Iterator[None]:
    """Send the model's experts through `session` until the block ends.

    Raises:
        UsageError: the model has no experts module, is compiled or routed already, or an experts
            module does not go through the experts dispatch; names the module.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    modules = experts_modules(model)
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if not modules:
        raise UsageError(
            f"model type {kind!r} has no experts module that transformers dispatches "
            "(use_experts_implementation); expected a Mixture-of-Experts model"
        )
    if hasattr(model, "_orig_mod") or any(
        getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()
    ):
        raise UsageError(
            "the model is compiled (torch.compile), which fixes what it executes; "
            "give routed(...) the model as it was loaded"
        )
    if any(id(module) in _active for _, module in modules):
        raise UsageError("the model is routed already: leave the running `routed(...)` first")
    before: dict[str, str | None] = model.get_experts_implementation()
    for value in before.values():
        if value in REFUSED_BACKENDS:
            raise UsageError(
                f"experts backend {value!r} is fixed when the model is loaded; "
                'load it with experts_implementation="grouped_mm"'
            )
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _dispatch)
    for layer, (_, module) in enumerate(modules):
        _active[id(module)] = (session, layer)
    try:
        model.set_experts_implementation(IMPLEMENTATION)
        for name, module in modules:
            # set_experts_implementation passes over classes that do not support it.
            chosen = getattr(module.config, "_experts_implementation", None)
            if chosen != IMPLEMENTATION:
                raise UsageError(
                    f"experts module {name!r} ({type(module).__name__}) does not go through the "
                    f"experts dispatch: it stays on {chosen!r}"
                )
            if "FP8" in type(module).__name__.upper():
                raise UsageError(
                    f"experts module {name!r} holds FP8 weights, which cannot be routed; "
                    "load the model in bfloat16"
                )
        yield
    finally:
        for _, module in modules:
            _active.pop(id(module), None)
        model.set_experts_implementation(before)
