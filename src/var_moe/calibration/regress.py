"""Layer by layer: what the dropped experts would have added, by least squares.

The unmodified model runs over calibration text, and every layer's part of a compensation is
fitted, as the text streams by, to the outputs of the experts that a policy would drop. There is
no backward pass through the model. It is where distillation begins, and most of what it reaches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from var_moe.calibration.distill import Trainable
from var_moe.execution.backends.sorted import weighted_sum
from var_moe.execution.dispatch import PairBackend
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.decision import ForwardContext

_STEP_TOKENS = 1024


class Regression:
    """The experts session that fits while it runs all pairs.

    Args:
        backend: who executes the pairs.
        trainable: what is fitted.
        rate: highest learning rate of Adam.
    """

    def __init__(self, backend: PairBackend, trainable: Trainable, *, rate: float) -> None:
        self._backend, self._trainable, self._rate = backend, trainable, rate
        self._optimisers = [
            torch.optim.Adam(parameters, lr=rate) for parameters in trainable.by_layer()
        ]
        self._policy: RoutingPolicy | None = None
        self._context: ForwardContext | None = None
        self._counted = torch.empty(0, dtype=torch.int64)
        self._dice = torch.Generator()

    def begin(
        self, policy: RoutingPolicy, context: ForwardContext, *, share: float, seed: int
    ) -> None:
        """The forward that starts.

        Args:
            policy: what it drops is what is fitted.
            context: its tokens.
            share: of the highest learning rate.
            seed: draws the tokens of each step.
        """
        self._policy, self._context = policy, context
        self._counted = context.counted.reshape(-1).nonzero().squeeze(1)
        self._dice = torch.Generator().manual_seed(seed)
        for optimiser in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self._rate * share
        policy.begin(context)

    def experts(
        self, layer: int, module: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor
    ) -> Tensor:
        """One layer: the full output, and some steps of descent on what is dropped."""
        assert self._policy is not None
        assert self._context is not None
        with torch.no_grad():
            outputs = self._backend(module, hidden, index)
            self._policy.see(layer, hidden)
            routing = self._policy.route(self._context, layer, index, weight)
            kept = routing.index >= 0
            rows, dropped = self._trainable.compensation().dropped(index, weight, kept)
            gone = weight.masked_fill(kept, 0).float()
            wanted = (outputs.float() * gone[:, :, None]).sum(dim=1)
            at = self._counted.to(index.device)
            at = at[dropped[at].sum(dim=1) > 0]
        order = at[torch.randperm(len(at), generator=self._dice).to(at.device)]
        for some in order.split(_STEP_TOKENS):
            if len(some) * 4 >= min(_STEP_TOKENS, len(order)):
                self._step(layer, hidden[some], rows[some], dropped[some], wanted[some])
        return weighted_sum(outputs, weight, hidden.dtype)

    def _step(
        self, layer: int, hidden: Tensor, row: Tensor, dropped: Tensor, wanted: Tensor
    ) -> None:
        optimiser = self._optimisers[layer]
        part = self._trainable.compensation().layers[layer]
        with torch.enable_grad():
            found = part.add(torch.zeros_like(wanted), hidden.float(), row, dropped)
            loss = (found - wanted).square().sum() / wanted.square().sum().clamp(min=1e-12)
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()

    def state_dict(self) -> list[dict[str, Any]]:
        """The optimisers': for checkpoints."""
        return [optimiser.state_dict() for optimiser in self._optimisers]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Go on from a checkpoint."""
        for optimiser, one in zip(self._optimisers, state, strict=True):
            optimiser.load_state_dict(one)
