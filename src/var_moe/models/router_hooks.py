"""Watching the routers: forward hooks where the model itself says its router logits are.

``output_router_logits=True`` would also compute the load-balancing loss and keep every
layer's logits; a hook keeps one layer at a time.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor

from var_moe.errors import UsageError
from var_moe.execution.dispatch import experts_modules
from var_moe.models.router_scores import Score, entropy, find_score


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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
