"""The forwards of a compensation's fit: teacher, student, and regression layer by layer.

The teacher executes all pairs, without gradients. The student executes what a policy keeps, with
a trainable compensation for the rest; the model's own weights stay as they are. The regression
runs all pairs and fits each layer's part to the outputs of the experts that a policy would drop,
without a backward pass through the model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn

from var_moe.execution.backends.base import ExpertsBackend, weighted_sum
from var_moe.models.moe_layers import experts_modules, experts_shape, weights_of
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.compensation import Compensation, LayerCompensation
from var_moe.routing.decision import ForwardContext, Routing
from var_moe.routing.simple import NativePolicy
from var_moe.tracing.first_order import scored_targets

COST_SHARE = 0.03
"""What the map may cost, as a share of the multiply-adds that it helps to save."""
_WARM = 0.1  # share of the tokens during which the learning rate rises
_LOGIT_BYTES = 64 * 2**20  # of float32 logits held at once
_REGRESSION_TOKENS = 1024  # of a step


def trainable(start: Compensation, *, rank: int, scale: Tensor, seed: int) -> Compensation:
    """A compensation whose tensors want gradients: the vectors of ``start`` and a map of zero.

    ``scale`` (L,) is one over the size of each layer's input; ``seed`` draws A of rank ``rank``.
    """
    size = start.layers[0].vectors.shape[1]
    rng = torch.Generator().manual_seed(seed)
    layers = []
    for part, inverse in zip(start.layers, scale.tolist(), strict=True):
        low: tuple[Tensor | None, ...] = (None, None, None)
        if rank:
            down = torch.randn((rank, size), generator=rng) / size**0.5 * inverse
            low = (down, torch.zeros(rank), torch.zeros((size, rank)))
        fresh = LayerCompensation(part.vectors.float().clone(), *low)
        layers.append(fresh.mapped(lambda t: t.to(scale.device).requires_grad_(True)))
    return replace(start, layers=tuple(layers))


def parameters_of(compensation: Compensation) -> list[Tensor]:
    """The tensors that are trained."""
    each = ((p.bias, p.down, p.up, p.vectors) for p in compensation.layers)
    return [tensor for tensors in each for tensor in tensors if tensor is not None]


def frozen(compensation: Compensation) -> Compensation:
    """A copy that no longer changes."""
    layers = (part.mapped(lambda t: t.detach().clone()) for part in compensation.layers)
    return replace(compensation, layers=tuple(layers))


def affordable_rank(model: Any, top_k: int) -> int:
    """Largest rank, a multiple of 8, within `COST_SHARE` where 0.65 K experts run."""
    weights = weights_of(experts_modules(model)[0][1])
    saved = sum(weight[0].numel() for weight in weights) * 0.35 * top_k  # multiply-adds a token
    return max(8, int(COST_SHARE * saved / (2 * experts_shape(model)["hidden"])) // 8 * 8)


class InputSizes(NativePolicy):
    """Keeps all pairs, and notes the root mean square of each layer's input."""

    def __init__(self) -> None:
        self.sizes: list[float] = []

    def see(self, layer: int, hidden: Tensor) -> None:
        self.sizes.append(float(hidden.float().square().mean().sqrt()))


@dataclass(frozen=True)
class Student:
    """The experts session that runs what a policy keeps, with a compensation for the rest.

    Without one, what is kept has the policy's weights. With a policy that keeps all, it is the
    teacher.
    """

    backend: ExpertsBackend
    policy: RoutingPolicy
    context: ForwardContext
    compensation: Compensation | None = None

    def __post_init__(self) -> None:
        self.policy.begin(self.context)

    @torch.no_grad()
    def decided(self, layer: int, hidden: Tensor, index: Tensor, weight: Tensor) -> Routing:
        """What the policy decides in one layer."""
        self.policy.see(layer, hidden)
        return self.policy.route(self.context, layer, index, weight)

    def experts(
        self, layer: int, module: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor
    ) -> Tensor:
        """One layer."""
        routing = self.decided(layer, hidden, index, weight)
        if self.compensation is None:
            return self.backend.run(module, hidden, routing.index, routing.weight)
        row, gone = self.compensation.dropped(index, weight, routing.index >= 0)
        out = self.backend.run(module, hidden, routing.index, weight)
        part = self.compensation.layers[layer].to(hidden.device, hidden.dtype)
        return part.add(out, hidden, row, gone)


@dataclass(frozen=True, kw_only=True)
class Regression(Student):
    """The experts session that runs all pairs, and fits each layer to what the policy would drop.

    ``rng`` draws the tokens of each step.
    """

    trainable: Compensation
    optimiser: torch.optim.Optimizer
    rng: torch.Generator

    def experts(
        self, layer: int, module: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor
    ) -> Tensor:
        """One layer: the full output, and some steps of descent on what is dropped."""
        with torch.no_grad():
            outputs = self.backend.pairs(module, hidden, index)
            kept = self.decided(layer, hidden, index, weight).index >= 0
            rows, dropped = self.trainable.dropped(index, weight, kept)
            gone = weight.masked_fill(kept, 0).float()
            wanted = (outputs.float() * gone[:, :, None]).sum(dim=1)
            at = self.context.counted.reshape(-1).nonzero().squeeze(1).to(index.device)
            at = at[dropped[at].sum(dim=1) > 0]
        order = at[torch.randperm(len(at), generator=self.rng).to(at.device)]
        for some in order.split(_REGRESSION_TOKENS):
            if len(some) * 4 >= min(_REGRESSION_TOKENS, len(order)):
                self._step(layer, hidden[some], rows[some], dropped[some], wanted[some])
        return weighted_sum(outputs, weight, hidden.dtype)

    def _step(
        self, layer: int, hidden: Tensor, row: Tensor, dropped: Tensor, wanted: Tensor
    ) -> None:
        with torch.enable_grad():
            zero = torch.zeros_like(wanted)
            added = self.trainable.layers[layer].add(zero, hidden.float(), row, dropped)
            loss = (added - wanted).square().sum() / wanted.square().sum().clamp(min=1e-12)
            self.optimiser.zero_grad()  # other layers have no gradient, and stay as they are
            loss.backward()
        self.optimiser.step()


def schedule(done: float) -> float:
    """Share of the highest learning rate: a short rise, then a cosine to zero."""
    if done < _WARM:
        return max(done / _WARM, 0.02)
    return 0.5 * (1 + cos(pi * min(1.0, (done - _WARM) / (1 - _WARM))))


def set_rate(optimiser: torch.optim.Optimizer, highest: float, done: float) -> None:
    """Set the learning rate for when a share ``done`` of the tokens has been read."""
    for group in optimiser.param_groups:
        group["lr"] = highest * schedule(done)


def divergence(
    student: Tensor, teacher: Tensor, batch: ForwardContext, *, gradient: bool
) -> tuple[float, int, Tensor | None]:
    """KL(teacher || student) at every place that predicts a scored token.

    Args:
        student, teacher: (B, S, V) logits, detached.
        batch: the tokens.
        gradient: whether to take that of the sum (the mean's would vanish in float16).

    Returns:
        The sum in nats, the number of places, and the gradient (B, S, V) for the student or None.
    """
    flat, wanted = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
    at = scored_targets(batch.counted).to(flat.device) - 1
    slope = torch.zeros_like(flat) if gradient else None
    total = torch.zeros((), dtype=torch.float64, device=flat.device)
    for rows in at.split(max(1, _LOGIT_BYTES // (4 * flat.shape[1]))):
        mine, theirs = flat[rows].float().log_softmax(-1), wanted[rows].float().log_softmax(-1)
        share = theirs.exp()
        total += (share * (theirs - mine)).sum().double()
        if slope is not None:
            slope[rows] = (mine.exp() - share).to(slope.dtype)
    return float(total), len(at), None if slope is None else slope.view_as(student)
