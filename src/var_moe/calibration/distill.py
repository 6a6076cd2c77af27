"""Distillation on the model itself: all experts teach what some experts and a stand-in can do.

One session runs the model in two ways. As teacher it executes all pairs, without gradients. As
student it executes what a policy keeps, with a trainable compensation for the rest; the model's
own weights stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from var_moe.execution.dispatch import ExpertsSession, PairBackend, execute
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.compensation import Compensation, LayerCompensation
from var_moe.routing.decision import ForwardContext
from var_moe.tracing.loss import scored_targets

_STEP_BYTES = 64 * 2**20  # float32 logits held at once


class Trainable(nn.Module):
    """A compensation whose tensors are parameters.

    Args:
        start: what its vectors begin with.
        rank: r; the map begins as zero.
        scale: (L,) one over the size of each layer's input.
        seed: draws A.
    """

    def __init__(self, start: Compensation, *, rank: int, scale: Tensor, seed: int) -> None:
        super().__init__()
        self.by_pair, self.experts = start.by_pair, start.experts
        size = start.layers[0].vectors.shape[1]
        dice = torch.Generator().manual_seed(seed)
        self.vectors, self.down = nn.ParameterList(), nn.ParameterList()
        self.bias, self.up = nn.ParameterList(), nn.ParameterList()
        for layer, part in enumerate(start.layers):
            self.vectors.append(nn.Parameter(part.vectors.float().clone()))
            if rank:
                down = torch.randn((rank, size), generator=dice) / size**0.5 * scale[layer]
                self.down.append(nn.Parameter(down))
                self.bias.append(nn.Parameter(torch.zeros(rank)))
                self.up.append(nn.Parameter(torch.zeros((size, rank))))

    def compensation(self) -> Compensation:
        """As it is used: sharing the parameters."""
        parts = []
        for layer, vectors in enumerate(self.vectors):
            low = (self.down[layer], self.bias[layer], self.up[layer]) if len(self.down) else ()
            parts.append(LayerCompensation(vectors, *low))
        return Compensation(layers=tuple(parts), by_pair=self.by_pair, experts=self.experts)

    def by_layer(self) -> list[list[nn.Parameter]]:
        """The parameters of each layer."""
        lists = (self.vectors, self.down, self.bias, self.up)
        return [[one[layer] for one in lists if len(one)] for layer in range(len(self.vectors))]

    def frozen(self) -> Compensation:
        """A copy that no longer changes."""
        now = self.compensation()
        layers = tuple(part.mapped(lambda t: t.detach().clone()) for part in now.layers)
        return Compensation(layers=layers, by_pair=self.by_pair, experts=self.experts)


class Distillation:
    """The experts session of both ways.

    Args:
        backend: who executes the pairs.
    """

    def __init__(self, backend: PairBackend) -> None:
        self._backend = backend
        self._other: ExpertsSession | None = None
        self._policy: RoutingPolicy | None = None
        self._context: ForwardContext | None = None
        self._compensation: Compensation | None = None
        self.sizes: list[float] | None = None
        """Root mean square of each layer's input, noted by the teacher while this is a list."""

    def hand_to(self, other: ExpertsSession | None) -> None:
        """Let another session run the layers, until None takes them back."""
        self._other = other

    def as_teacher(self) -> None:
        """All pairs from now on."""
        self._policy = self._compensation = None

    def as_student(
        self, policy: RoutingPolicy, compensation: Compensation | None, context: ForwardContext
    ) -> None:
        """What ``policy`` keeps of the tokens in ``context`` from now on."""
        self._policy, self._compensation, self._context = policy, compensation, context
        policy.begin(context)

    def experts(
        self, layer: int, module: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor
    ) -> Tensor:
        """One layer."""
        if self._other is not None:
            return self._other.experts(layer, module, hidden, index, weight)
        if self._policy is None:
            if self.sizes is not None:
                self.sizes.append(float(hidden.float().square().mean().sqrt()))
            return execute(module, hidden, index, weight, self._backend)
        assert self._context is not None
        with torch.no_grad():
            self._policy.see(layer, hidden.detach())
            routing = self._policy.route(self._context, layer, index, weight.detach())
        if self._compensation is None:
            return execute(module, hidden, routing.index, routing.weight, self._backend)
        row, gone = self._compensation.dropped(index, weight, routing.index >= 0)
        out = execute(module, hidden, routing.index, weight, self._backend)
        part = self._compensation.layers[layer].to(hidden.device, hidden.dtype)
        return part.add(out, hidden, row, gone)


@dataclass(frozen=True)
class Divergence:
    """Summed KL(teacher || student) of a batch in nats, over its predicted tokens."""

    total: float
    tokens: int


def forward(model: Any, batch: ForwardContext, device: torch.device, **options: Any) -> Tensor:
    """Logits of a batch. (B, S, V)"""
    logits: Tensor = model(
        input_ids=batch.ids.to(device),
        attention_mask=batch.valid.long().to(device),
        use_cache=False,
        **options,
    ).logits
    return logits


def divergence(
    student: Tensor, teacher: Tensor, batch: ForwardContext, *, gradient: bool
) -> tuple[Divergence, Tensor | None]:
    """KL(teacher || student) at every place that predicts a scored token.

    Args:
        student, teacher: (B, S, V) logits, detached.
        batch: the tokens.
        gradient: whether the gradient of the sum with respect to ``student`` is wanted (the
            mean's would vanish in float16).

    Returns:
        The divergence, and the gradient (B, S, V) or None.
    """
    flat, wanted = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
    at = scored_targets(batch.counted).to(flat.device) - 1
    found = torch.zeros_like(flat) if gradient else None
    total = torch.zeros((), dtype=torch.float64, device=flat.device)
    step = max(1, _STEP_BYTES // (4 * flat.shape[1]))
    for start in range(0, len(at), step):
        rows = at[start : start + step]
        mine, theirs = flat[rows].float().log_softmax(-1), wanted[rows].float().log_softmax(-1)
        share = theirs.exp()
        total += (share * (theirs - mine)).sum().double()
        if found is not None:
            found[rows] = (mine.exp() - share).to(found.dtype)
    result = Divergence(total=float(total), tokens=len(at))
    return result, None if found is None else found.view_as(student)
