"""A model's MoE layers: its experts modules, its routers, and what the routers' logits mean.

An experts module is one that transformers dispatches (``use_experts_implementation``). Routers are
watched by forward hooks where the model itself says that its router logits are:
``output_router_logits=True`` would also compute the load-balancing loss and keep every layer's
logits, and a hook keeps one layer at a time.

Families turn router logits into weights in a few ways (softmax, sigmoid, the square root of a
softplus, or probabilities already), and their configurations mostly do not say which. The
router's own decision does: the weights of the experts that it chose stand in the ratio of
their scores, whether they are normalised, scaled or neither.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from var_moe.errors import UsageError

REFUSED_BACKENDS = ("deepgemm_megamoe",)
"""Experts backends of transformers that are fixed when a model is loaded."""


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


def weights_of(module: Any) -> tuple[Tensor, Tensor]:
    """All experts' first (gate and up in one, where there is a gate) and second weights."""
    return (module.gate_up_proj if module.has_gate else module.up_proj), module.down_proj


def biases_of(module: Any) -> tuple[Tensor, ...]:
    """The biases of `weights_of`, or none."""
    if not module.has_bias:
        return ()
    first = module.gate_up_proj_bias if module.has_gate else module.up_proj_bias
    return first, module.down_proj_bias


def router_fingerprint(model: Any) -> list[float]:
    """Norms of the routers' rows, (L x E): tells two models of one shape apart.

    Nearly the same in every dtype that the weights are loaded in. Empty where the routers are
    not found or their weights are not in memory (offloaded).
    """
    try:
        routers = _routers(model)
    except UsageError:
        return []
    norms: list[float] = []
    for module, _ in routers:
        weight = next((p for p in module.parameters() if p.dim() == 2), None)
        if weight is None or weight.device.type == "meta":
            return []
        norms += [round(value, 6) for value in weight.detach().float().norm(dim=1).tolist()]
    return norms


def router_modules(model: Any) -> list[tuple[str, Any]]:
    """The router of each MoE layer with its name, in layer order.

    Raises:
        UsageError: the model does not say where its routers are, or not of every layer.
    """
    names = {id(module): name for name, module in model.named_modules()}
    return [(names[id(module)], module) for module, _ in _routers(model)]


class RouterLogits:
    """Holds the newest router logits of each MoE layer while the ``with`` block runs.

    Raises:
        UsageError: the model does not say where its router logits are, or not of every layer.
    """

    def __init__(self, model: Any, layers: int) -> None:
        self._model = model
        self._newest: list[Tensor | None] = [None] * layers
        self._scores: list[Score | None] = [None] * layers
        self._handles: list[Any] = []

    def __enter__(self) -> RouterLogits:
        for layer, (module, position) in enumerate(_routers(self._model)):
            self._handles.append(module.register_forward_hook(self._keep(layer, position)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _keep(self, layer: int, position: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            self._newest[layer] = output[position] if isinstance(output, tuple) else output

        return hook

    def entropy(self, layer: int, index: Tensor, weight: Tensor) -> Tensor:
        """Router entropy in nats over all E experts, for the forward that runs. (T,)

        Args:
            layer: MoE layer number.
            index: (T, K) the router's decision, which tells what its logits mean.
            weight: (T, K) its weights.
        """
        logits = self._newest[layer]
        assert logits is not None
        self._newest[layer] = None
        logits = logits.reshape(-1, logits.shape[-1]).float()
        score = self._scores[layer] or find_score(logits, index, weight)
        self._scores[layer] = score
        return entropy(score(logits))


def _routers(model: Any) -> list[tuple[Any, int]]:
    """The router of each experts module, in layer order, with the place of its logits."""
    recorder = _recorder(model)
    names = [name for name, _ in experts_modules(model)]
    blocks = [name.rpartition(".")[0] + "." for name in names]
    recorded = [
        name
        for name, module in model.named_modules()
        if recorder is not None
        and isinstance(module, recorder.target_class)
        and (recorder.layer_name is None or recorder.layer_name in name)
    ]
    # A block's router stands at one place in it. A layer with a router of another class (one
    # that looks experts up by token id) is not recorded, but has it at the same place.
    places = {
        name.removeprefix(block) for block in blocks for name in recorded if name.startswith(block)
    }
    modules = dict(model.named_modules())
    found = []
    for name, block in zip(names, blocks, strict=True):
        routers = [modules[block + place] for place in sorted(places) if block + place in modules]
        if recorder is None or len(routers) != 1:
            raise UsageError(
                f"model type {model.config.model_type!r}: {len(routers)} routers found for experts "
                f"module {name!r}; expected one at the place that its "
                "_can_record_outputs['router_logits'] names"
            )
        found.append((routers[0], int(recorder.index)))
    return found


def _recorder(model: Any) -> Any:
    """Where the model says that its router logits are, or None."""
    from transformers.utils.output_capturing import OutputRecorder

    for part in model.modules():
        recorder = (getattr(part, "_can_record_outputs", None) or {}).get("router_logits")
        if recorder is not None:
            known = isinstance(recorder, OutputRecorder)
            return recorder if known else OutputRecorder(recorder, index=0)
    return None


Score = Callable[[Tensor], Tensor]  # (T, E) logits -> (T, E) scores, not negative


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(dim=-1)


def _sigmoid(logits: Tensor) -> Tensor:
    return logits.sigmoid()


def _sqrt_softplus(logits: Tensor) -> Tensor:
    return F.softplus(logits).sqrt()


def _probabilities(logits: Tensor) -> Tensor:
    return logits.clamp(min=0.0)


# A rival must explain the weights to this much of the chosen experts' mass; the coarsest dtype
# that weights come in, bfloat16, rounds them to 0.4%.
_TOLERANCE = 0.01
_RIVALS: tuple[Score, ...] = (_sigmoid, _sqrt_softplus)


def find_score(logits: Tensor, index: Tensor, weight: Tensor) -> Score:
    """The score that explains a router's decision.

    Args:
        logits: (T, E) what the router recorded; probabilities are known by their sum of one.
        index: (T, K) the experts that it chose.
        weight: (T, K) their weights.

    Returns:
        The score. Softmax unless another one explains the weights, and better; with K = 1 there
        is no ratio to see, and it is softmax.
    """
    logits, weight = logits.float(), weight.float()
    if bool((logits >= 0).all()) and bool(((logits.sum(dim=-1) - 1).abs() < _TOLERANCE).all()):
        return _probabilities
    best: Score = _softmax
    least = _misfit(_softmax(logits), index, weight)
    for score in _RIVALS:
        misfit = _misfit(score(logits), index, weight)
        if misfit < min(least, _TOLERANCE):
            best, least = score, misfit
    return best


def _misfit(scores: Tensor, index: Tensor, weight: Tensor) -> float:
    """How far the chosen scores are from the weights, as shares; all but the worst 1%."""
    chosen = scores.gather(1, index)
    expected = chosen / chosen.sum(dim=1, keepdim=True)
    seen = weight / weight.sum(dim=1, keepdim=True)
    worst = (expected - seen).abs().amax(dim=1).nan_to_num(0.0)
    return float(worst.quantile(0.99))


def entropy(scores: Tensor) -> Tensor:
    """Entropy in nats of the shares of (T, E) scores. (T,)"""
    shares = scores / scores.sum(dim=-1, keepdim=True)
    total: Tensor = torch.special.entr(shares).sum(dim=-1)
    return total
