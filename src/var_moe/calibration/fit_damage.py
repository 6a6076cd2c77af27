"""Fitting a `DamageModel` to the damages that a trace of calibration text holds.

With a = g . d the first-order change of the loss by one cut, a^2 / 2 is its second-order estimate
by the Fisher approximation. It is distributed about like a scaled chi-squared variable around its
expectation D, so log D is fitted by the gamma likelihood, ``log D + y / D``, whose expectation is
smallest at the true one. Token factors and pair terms are drawn towards zero by a penalty: what
was seen rarely says little.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from var_moe.errors import UsageError
from var_moe.routing.compensation import Compensation
from var_moe.routing.damage import DamageModel
from var_moe.tracing.trace import RoutingTrace

HEAD_SIZE = 16
"""Inner size of the look at a layer's input."""
_STEP_TOKENS, _PASSES, _RATE = 4096, 4, 1e-2
_PENALTY = 1e-4
_OUTLIER = 50.0  # times the prediction: more is not listened to
_LEAST = 1e-12  # nats
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Sample:
    """Some tokens of all layers."""

    index: Tensor  # (L, n, K)
    mass: Tensor  # (L, n, K)
    ids: Tensor  # (n,)
    hidden: Tensor | None  # (L, n, D) scaled


class _Fitted(torch.nn.Module):
    """The parameters of a `DamageModel`, all layers at once."""

    def __init__(self, trace: RoutingTrace, target: Tensor, vocabulary: int, seed: int) -> None:
        super().__init__()
        layers, top_k, experts = trace.layers, trace.top_k, int(trace.head["experts"])
        self.experts, self.pairs = experts, top_k == 2
        mean = target.double().mean(dim=1).float().clamp(min=_LEAST)  # (L, K - 1)
        tail = _tail(trace.weight.float()).square().mean(dim=1).clamp(min=_LEAST)
        free = torch.nn.Parameter
        self.base = free((mean / tail).log())
        self.slope = free(torch.full((layers, top_k - 1), 2.0))
        self.curve = free(torch.zeros((layers, top_k - 1)))
        self.pair = free(torch.zeros((layers, experts**2 if self.pairs else 0)))
        self.first = free(torch.zeros((layers, 0 if self.pairs else experts)))
        self.dropped = free(torch.zeros((layers, 0 if self.pairs else experts)))
        self.token = free(torch.zeros((layers, vocabulary)))
        size = 0 if trace.hidden is None else trace.hidden.shape[2]
        width = HEAD_SIZE if size else 0
        dice = torch.Generator().manual_seed(seed)
        inner = torch.randn((layers, width, size), generator=dice) / max(size, 1) ** 0.5
        self.inner, self.bias = free(inner), free(torch.zeros((layers, width)))
        self.out = free(torch.zeros((layers, width)))

    def forward(self, some: _Sample) -> Tensor:
        """log D_k of (L, n, K - 1); the same formula as `LayerDamage.log_damage`."""
        tail = _tail(some.mass)
        size = tail.log()
        found = self.base[:, None] + size * (self.slope[:, None] + size * self.curve[:, None])
        index = some.index
        if self.pairs:
            row = index[:, :, 0] * self.experts + index[:, :, 1]
            found = found + self.pair.gather(1, row)[:, :, None]
        else:
            layers, tokens, top_k = index.shape
            each = self.dropped.gather(1, index.reshape(layers, -1)).view(layers, tokens, top_k)
            mean = (some.mass * each).flip(2).cumsum(2).flip(2)[:, :, 1:] / tail
            found = found + self.first.gather(1, index[:, :, 0])[:, :, None] + mean
        rest = self.token[:, some.ids]
        if some.hidden is not None:
            inner = torch.baddbmm(self.bias[:, None], some.hidden, self.inner.transpose(1, 2))
            rest = rest + torch.bmm(F.silu(inner), self.out[:, :, None])[:, :, 0]
        return found + rest[:, :, None]

    def penalty(self) -> Tensor:
        tables = (self.token, self.pair, self.first, self.dropped)
        return sum((table.square().sum() for table in tables), start=torch.zeros(()))


def _tail(mass: Tensor) -> Tensor:
    """Mass of what is dropped, keeping k = 1..K-1. (..., K) -> (..., K - 1)"""
    return mass.flip(-1).cumsum(-1).flip(-1)[..., 1:].clamp(min=1e-6)


def fit_damage(
    trace: RoutingTrace,
    *,
    vocabulary: int,
    compensation: Compensation | None = None,
    passes: int = _PASSES,
    seed: int = 0,
    progress: Progress | None = None,
) -> DamageModel:
    """Fit predicted damages to a trace of calibration text.

    Args:
        trace: with damages of ``kind``, best of labels ``"sampled"``; with the layers' inputs
            (``hidden``) the prediction looks at them, too.
        vocabulary: V, ids that the model takes.
        compensation: the one that the trace was recorded with, for the damages with it in place;
            by default those of rescaled cuts.
        passes: over the tokens.
        seed: draws the tokens of each step.
        progress: called with steps done and in all.

    Raises:
        UsageError: the trace has no such damages, or K = 1.
    """
    kind = "cut" if compensation is None else "cut_compensated"
    if compensation is not None and compensation.hash != trace.head.get("compensation_hash"):
        raise UsageError("the trace was not recorded with this compensation; record it again")
    if kind not in trace.damage:
        raise UsageError(f"damages {kind!r}: the trace holds {', '.join(trace.damage) or 'none'}")
    if trace.top_k == 1:
        raise UsageError("a model with one expert per token has nothing to drop: no damages to fit")
    target = trace.damage[kind].square() / 2  # (L, N, K - 1)
    scale = None
    if trace.hidden is not None:
        scale = torch.stack([1 / layer.float().std().clamp(min=1e-6) for layer in trace.hidden])
    with torch.inference_mode(False), torch.enable_grad():
        fitted = _Fitted(trace, target, vocabulary, seed)
        _descend(fitted, trace, target, scale, passes=passes, seed=seed, progress=progress)
    tensors = {name: value.detach().clone() for name, value in fitted.named_parameters()}
    if scale is not None:
        tensors["inner"] *= scale[:, None, None]
    return DamageModel(**tensors, compensation=compensation)


def _descend(
    fitted: _Fitted,
    trace: RoutingTrace,
    target: Tensor,
    scale: Tensor | None,
    *,
    passes: int,
    seed: int,
    progress: Progress | None,
) -> None:
    size = min(_STEP_TOKENS, trace.tokens)
    steps = max(20, passes * trace.tokens // size)
    tables = [fitted.token]
    others = [p for p in fitted.parameters() if p is not fitted.token]
    optimiser = torch.optim.Adam([{"params": others}, {"params": tables}], lr=_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=[_RATE, 3 * _RATE], total_steps=steps
    )
    dice = torch.Generator().manual_seed(seed)
    for step in range(steps):
        at = torch.randint(0, trace.tokens, (size,), generator=dice)
        hidden = None
        if trace.hidden is not None and scale is not None:
            hidden = trace.hidden[:, at].float() * scale[:, None, None]
        some = _Sample(
            trace.index[:, at].long(), trace.weight[:, at].float(), trace.ids[at], hidden
        )
        wanted = target[:, at]
        found = fitted(some)
        loss = (found + (wanted * (-found).exp()).clamp(max=_OUTLIER)).mean()
        loss = loss + _PENALTY / 10 * fitted.penalty()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if progress:
            progress(step + 1, steps)


def predicted(trace: RoutingTrace, damage: DamageModel) -> Tensor:
    """log D_k of every decision of a trace, as the policy would see it. (L, N, K - 1)

    Raises:
        UsageError: the damage model looks at the layers' inputs, and the trace has none.
    """
    if trace.hidden is None and damage.out.shape[1]:
        raise UsageError("the damage model looks at the layers' inputs; record them (hidden=True)")
    found = []
    for layer in range(trace.layers):
        part = damage.layer(layer, trace.ids.device)
        hint = None if trace.hidden is None else part.hint(trace.hidden[layer])
        index, mass = trace.index[layer].long(), trace.weight[layer].float()
        found.append(part.log_damage(index, mass, trace.ids, hint))
    return torch.stack(found)


def tau_for(log_damage: Tensor, experts_per_token: float) -> float:
    """The tau at which a damage policy runs so many experts per token.

    Args:
        log_damage: (L, N, K - 1) of a text, see `predicted`.
        experts_per_token: between 1 and K.
    """
    # An expert runs where the worst cut that leaves it out, or leaves out less, reaches tau.
    worst = log_damage.flip(2).cummax(dim=2).values.reshape(-1)
    share = (experts_per_token - 1) / log_damage.shape[2]
    place = round((1 - min(max(share, 0.0), 1.0)) * (len(worst) - 1))
    return float(worst.kthvalue(place + 1).values.exp())
