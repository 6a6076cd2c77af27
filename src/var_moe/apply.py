"""`with routed(model, policy) as session:` is the only place that changes a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from var_moe.errors import UsageError
from var_moe.models.generation import Texts
from var_moe.models.healed_weights import healed_weights
from var_moe.models.seam import (
    SORTED,
    PairBackend,
    attach,
    detach,
    execute,
    experts_modules,
    experts_shape,
    pair_backend,
)
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.compensation import LayerCompensation
from var_moe.routing.counts import RoutingReport, TierCounts
from var_moe.routing.decision import Residual, Routing, TokenBatch


class Session:
    """A routed model's running state: the policy, the tokens of the forward, the counts."""

    def __init__(self, policy: RoutingPolicy, backend: PairBackend, layers: int) -> None:
        self.policy = policy
        self._backend = backend
        self._compensation = policy.compensation
        self._parts: dict[int, LayerCompensation] = {}
        self._layers = layers
        self._counts = TierCounts(layers)
        self._announced: TokenBatch | None = None
        self._counted: Tensor = torch.empty(0, dtype=torch.bool)
        self.texts = Texts(policy.context_window)

    def announce(self, batch: TokenBatch) -> None:
        """Describe the next forward's tokens, where ids and mask alone do not tell.

        Needed for windows of a longer document (prefix, overlap) and documents over rows.
        """
        self._announced = batch

    def report(self) -> RoutingReport:
        """Tiers and executed pairs since the session's start or the last `reset`."""
        return self._counts.report()

    def reset(self) -> None:
        """Empty the policy's caches and clocks, forget texts, set the counts to zero."""
        self.policy.reset()
        self.texts.forget()
        self._counts = TierCounts(self._layers)

    # -- called by the model ---------------------------------------------------------------

    def before_forward(self, _model: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        """The model's forward pre-hook: sees the token ids, once for all layers."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise UsageError("routed(...) needs input_ids: embeddings do not tell the token ids")
        batch, self._announced = self._announced, None
        if batch is None:
            mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            # transformers 5.24 calls it `cache`, and still takes the earlier name.
            cache = kwargs.get("cache", kwargs.get("past_key_values"))
            batch = self.texts.batch(ids, mask, cache)
        elif batch.ids.shape != ids.shape:
            raise UsageError(
                f"announced tokens of shape {tuple(batch.ids.shape)}, but the forward has "
                f"{tuple(ids.shape)}"
            )
        self._counted = batch.counted.reshape(-1)
        self.policy.begin(batch)

    def after_forward(self, _model: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        """The model's forward hook: the output may hold a new KV cache."""
        self.texts.bind(output)

    def experts(
        self, layer: int, module: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor
    ) -> Tensor:
        """One layer: the policy decides, the backend runs what is left, the counts grow."""
        self.policy.see(layer, hidden)
        routing = self.policy.route(layer, index, weight)
        self._counts.add(layer, routing, self._counted)
        if self._compensation is not None:
            return self._compensated(layer, module, hidden, index, weight, routing)
        out = execute(module, hidden, routing.index, routing.weight, self._backend)
        return out if routing.residual is None else _with_residual(out, routing.residual)

    def _compensated(
        self,
        layer: int,
        module: nn.Module,
        hidden: Tensor,
        index: Tensor,
        weight: Tensor,
        routing: Routing,
    ) -> Tensor:
        """The kept pairs with the router's own weights, and what stands in for the others.

        What the policy itself would do about the dropped weight (rescaling, residual means) is
        not done.
        """
        assert self._compensation is not None
        part = self._parts.get(layer)
        if part is None:
            part = self._compensation.layers[layer].to(hidden.device, hidden.dtype)
            self._parts[layer] = part
        row, gone = self._compensation.dropped(index, weight, routing.index >= 0)
        # A dropped pair's output is zero, whatever its weight.
        out = execute(module, hidden, routing.index, weight, self._backend)
        return part.add(out, hidden, row, gone)


def _with_residual(out: Tensor, extra: Residual) -> Tensor:
    means, scale = extra.table[extra.row], extra.scale[:, None].to(extra.table.dtype)
    if out.dtype == means.dtype:
        return torch.addcmul(out, means, scale)
    # The means are float32; what they are added to must keep the model's dtype.
    return out + (means * scale).to(out.dtype)


@contextmanager
def routed(model: Any, policy: RoutingPolicy, *, backend: str = "auto") -> Iterator[Session]:
    """Run the model's experts as ``policy`` decides, until the block ends.

    Args:
        model: a transformers Mixture-of-Experts causal language model.
        policy: which pairs are executed, and what stands in for the others.
        backend: who executes them: ``"sorted"`` (ours), ``"grouped_mm"``, ``"eager"``, ...;
            ``"auto"`` is ``"sorted"`` on CPU and ``"grouped_mm"`` elsewhere.

    Yields:
        The `Session`, with `report()` and `reset()`.

    Raises:
        UsageError: the model is no MoE, is routed already, or does not go through the seam; the
            policy's compensation is another model's.

    Healed weights, where the policy's compensation has them, are in place of the model's own.
    On leaving, also by an exception, the model is what it was before.
    """
    if backend == "auto":
        backend = SORTED if next(model.parameters()).device.type == "cpu" else "grouped_mm"
    modules = [module for _, module in experts_modules(model)]
    if policy.compensation is not None:
        policy.compensation.check(**experts_shape(model))
    healed = None if policy.compensation is None else policy.compensation.healed
    session = Session(policy, pair_backend(backend), len(modules))
    before = attach(model, session)
    hooks = [
        model.register_forward_pre_hook(session.before_forward, with_kwargs=True),
        model.register_forward_hook(session.after_forward),
    ]
    try:
        with healed_weights(model, healed), session.texts.watching(model):
            yield session
    finally:
        for hook in hooks:
            hook.remove()
        detach(model, before)
