"""Watching the routers: forward hooks where the model itself says its router logits are.

``output_router_logits=True`` would also compute the load-balancing loss and keep every
layer's logits; a hook keeps one layer at a time.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from var_moe.errors import UsageError


def router_fingerprint(model: Any) -> list[float]:
    """Norms of the routers' rows, (L x E): tells two models of one shape apart.

    Nearly the same in every dtype that the weights are loaded in. Empty where the routers are
    not found or their weights are not in memory (offloaded).
    """
    norms: list[float] = []
    for module, _ in _recorders(model):
        weight = next((p for p in module.parameters() if p.dim() == 2), None)
        if weight is None or weight.device.type == "meta":
            return []
        norms += [round(value, 6) for value in weight.detach().float().norm(dim=1).tolist()]
    return norms


class RouterLogits:
    """Holds the newest router logits of each MoE layer while the ``with`` block runs.

    Raises:
        UsageError: the model does not say where its router logits are, or not one per layer.
    """

    def __init__(self, model: Any, layers: int) -> None:
        self._model, self._layers = model, layers
        self._newest: list[Tensor | None] = [None] * layers
        self._handles: list[Any] = []
        config = model.config.get_text_config()
        self._sigmoid = "sigmoid" in str(getattr(config, "scoring_func", "softmax"))

    def __enter__(self) -> RouterLogits:
        found = _recorders(self._model)
        if len(found) != self._layers:
            raise UsageError(
                f"model type {self._model.config.model_type!r}: found {len(found)} routers for "
                f"{self._layers} experts modules; its _can_record_outputs['router_logits'] must "
                "name the router of every layer"
            )
        for layer, (module, position) in enumerate(found):
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

    def entropy(self, layer: int) -> Tensor:
        """Router entropy in nats over all E experts, for the forward that runs. (T,)"""
        logits = self._newest[layer]
        assert logits is not None
        self._newest[layer] = None
        logits = logits.reshape(-1, logits.shape[-1]).float()
        if self._sigmoid:
            scores = logits.sigmoid()
            shares = scores / scores.sum(dim=-1, keepdim=True)
        else:
            shares = logits.softmax(dim=-1)
        total: Tensor = torch.special.entr(shares).sum(dim=-1)
        return total


def _recorders(model: Any) -> list[tuple[Any, int]]:
    """Router modules in layer order, each with the place of the logits in its output."""
    from transformers.utils.output_capturing import OutputRecorder

    for part in model.modules():
        recorded = getattr(part, "_can_record_outputs", None) or {}
        recorder = recorded.get("router_logits")
        if recorder is None:
            continue
        if not isinstance(recorder, OutputRecorder):
            recorder = OutputRecorder(recorder, index=0)
        return [
            (module, recorder.index)
            for name, module in part.named_modules()
            if isinstance(module, recorder.target_class)
            and (recorder.layer_name is None or recorder.layer_name in name)
        ]
    return []
