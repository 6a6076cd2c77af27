"""The experts seam: the public place where transformers hands pairs to an experts backend.

transformers calls every experts module as ``experts(hidden (T, D), index (T, K), weight (T, K))``
and dispatches through ``ALL_EXPERTS_FUNCTIONS``. One function of ours is registered there; it
asks the running session which pairs to execute and hands those to a backend, as a top-1
problem with unit weights. The weights are applied outside and the pairs summed as (T, K, D)
over K, with zeros where a pair was dropped: so keeping all pairs is bit-identical to
``grouped_mm``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from var_moe.errors import UsageError
from var_moe.execution.backends.packed import PackedExperts
from var_moe.execution.backends.sorted import SortedExperts, weighted_sum, weights_of

IMPLEMENTATION = "var_moe"
SORTED, PACKED = "sorted", "packed"
OWN_BACKENDS: dict[str, type[SortedExperts]] = {SORTED: SortedExperts, PACKED: PackedExperts}
REFUSED_BACKENDS = ("deepgemm_megamoe",)

# (module, hidden (T, D), index (T, K), -1 where dropped) -> (T, K, D): the output of every pair
# with unit weight, zero where it was dropped.
PairBackend = Callable[[nn.Module, Tensor, Tensor], Tensor]


class ExpertsSession(Protocol):
    """What the seam asks of whoever runs the layers."""

    def experts(
        self, layer: int, module: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor
    ) -> Tensor:
        """The layer's output (T, D) for the router's decision."""


# Which session runs a module: filled and emptied by `attach` and `detach` alone.
_active: dict[int, tuple[ExpertsSession, int]] = {}


def _dispatch(module: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The function that transformers calls for each experts module of a routed model."""
    found = _active.get(id(module))
    if found is None:
        raise UsageError(
            "a model that is not routed shares its config with one that is: load it with a config "
            "of its own (copy.deepcopy(config))"
        )
    session, layer = found
    return session.experts(layer, module, hidden, index, weight)


def experts_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The model's experts modules with their names, in layer order."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "_is_expert_parallel") and hasattr(type(module).forward, "__wrapped__")
    ]


def experts_shape(model: nn.Module) -> dict[str, int]:
    """``layers``, ``experts``, and ``hidden``: the size of what the experts are given.

    It is not the model's own hidden size where experts work in a smaller space.
    """
    modules: list[Any] = [module for _, module in experts_modules(model)]
    if not modules:
        return {"layers": 0, "experts": 0, "hidden": 0}
    one = modules[0]
    first = weights_of(one)[0][0]
    return {
        "layers": len(modules),
        "experts": int(getattr(one, "num_experts", 0)),
        "hidden": int(first.shape[0 if one.is_transposed else 1]),
    }


def attach(model: Any, session: ExpertsSession) -> dict[str, str | None]:
    """Send the model's experts through `session`; returns what `detach` puts back.

    Raises:
        UsageError: the model has no experts module, is compiled or routed already, or an experts
            module does not go through the seam; names the module.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    found = experts_modules(model)
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if not found:
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
    if any(id(module) in _active for _, module in found):
        raise UsageError("the model is routed already: leave the running `routed(...)` first")
    before: dict[str, str | None] = model.get_experts_implementation()
    for value in before.values():
        if value in REFUSED_BACKENDS:
            raise UsageError(
                f"experts backend {value!r} is fixed when the model is loaded; "
                'load it with experts_implementation="grouped_mm"'
            )
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _dispatch)
    for layer, (_, module) in enumerate(found):
        _active[id(module)] = (session, layer)
    try:
        model.set_experts_implementation(IMPLEMENTATION)
        for name, module in found:
            # set_experts_implementation passes over classes that do not support it.
            chosen = getattr(module.config, "_experts_implementation", None)
            if chosen != IMPLEMENTATION:
                raise UsageError(
                    f"experts module {name!r} ({type(module).__name__}) does not go through the "
                    f"experts seam: it stays on {chosen!r}"
                )
            if "FP8" in type(module).__name__.upper():
                raise UsageError(
                    f"experts module {name!r} holds FP8 weights, which the seam does not serve; "
                    "load the model in bfloat16"
                )
    except BaseException:
        detach(model, before)
        raise
    return before


def detach(model: Any, before: dict[str, str | None]) -> None:
    """Put the experts backend back and forget the model's modules."""
    for _, module in experts_modules(model):
        _active.pop(id(module), None)
    model.set_experts_implementation(before)


def pair_backend(name: str) -> PairBackend:
    """The backend `name` for executed pairs: ``sorted`` or ``packed`` (ours), or transformers'.

    Raises:
        UsageError: no such backend.
    """
    if name in OWN_BACKENDS:
        return OWN_BACKENDS[name]()
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if name == IMPLEMENTATION or name not in ("eager", *ALL_EXPERTS_FUNCTIONS):
        known = ", ".join(
            [*OWN_BACKENDS, "eager", *sorted(set(ALL_EXPERTS_FUNCTIONS) - {IMPLEMENTATION})]
        )
        raise UsageError(f"experts backend {name!r}: expected one of {known}")

    return TransformersBackend(name)


class TransformersBackend:
    """Hands the pairs that are not dropped to one of transformers' backends, as a top-1 problem."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, module: nn.Module, hidden: Tensor, index: Tensor) -> Tensor:
        tokens, top_k = index.shape
        pair = (index.reshape(-1) >= 0).nonzero().squeeze(1)  # the one wait for the device
        out = self.products(module, hidden[pair // top_k], index.reshape(-1)[pair, None])
        if pair.shape[0] == tokens * top_k:
            return out.view(tokens, top_k, -1)
        full = out.new_zeros((tokens * top_k, out.shape[1]))
        full[pair] = out
        return full.view(tokens, top_k, -1)

    def products(self, module: nn.Module, rows: Tensor, index: Tensor) -> Tensor:
        """The experts' own work on (P, D) rows, each for the expert of its (P, 1) index. (P, D)"""
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        original = type(module).forward.__wrapped__  # type: ignore[attr-defined]
        function: Callable[..., Tensor] = ALL_EXPERTS_FUNCTIONS.get_interface(self._name, original)
        ones = torch.ones((rows.shape[0], 1), dtype=rows.dtype, device=rows.device)
        return function(module, rows, index, ones)


def execute(
    module: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor, backend: PairBackend
) -> Tensor:
    """Run the pairs of ``index`` that are not -1 and sum them by weight. Returns (T, D)."""
    if isinstance(backend, SortedExperts):
        return backend.weighted(module, hidden, index, weight)
    return weighted_sum(backend(module, hidden, index), weight, hidden.dtype)
