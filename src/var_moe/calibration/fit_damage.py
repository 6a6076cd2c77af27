"""Fitting a `DamageModel` to the damages that a trace of calibration text holds.

With a = g . d the first-order change of the loss by one cut, a^2 / 2 is its second-order estimate
by the Fisher approximation. It is distributed about like a scaled chi-squared variable around its
expectation D, so log D is fitted by the gamma likelihood, ``log D + y / D``, whose expectation is
smallest at the true one. Token factors and pair terms are drawn towards zero by a penalty: what
was seen rarely says little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from var_moe.errors import UsageError
from var_moe.routing.compensation import Compensation
from var_moe.routing.damage import DamageModel, LayerDamage
from var_moe.tracing.trace import RoutingTrace

HEAD_SIZE = 16
"""Inner size of the look at a layer's input."""
_STEP_TOKENS, _RATE = 4096, 1e-2
_PENALTY = 1e-5  # on squared entries of the tables
_OUTLIER = 50.0  # times the prediction: more is not listened to
_LEAST, _LEAST_MASS = 1e-12, 1e-6  # nats; share of a token's weights


def fit_damage(
    trace: RoutingTrace,
    *,
    vocabulary: int,
    compensation: Compensation | None = None,
    passes: int = 4,
    seed: int = 0,
) -> DamageModel:
    """Fit predicted damages to a trace of calibration text.

    Args:
        trace: with damages, best on sampled labels; with the layers' inputs (``hidden``) the
            prediction looks at them, too.
        vocabulary: V, ids that the model takes.
        compensation: the one that the trace was recorded with, for the damages with it in place;
            by default those of rescaled cuts.
        passes: over the tokens, which ``seed`` draws for each step.

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
    scale = None  # of the layers' inputs
    if trace.hidden is not None:
        scale = torch.stack([1 / layer.float().std().clamp(min=1e-6) for layer in trace.hidden])
    with torch.inference_mode(False), torch.enable_grad():
        parameters = _start(trace, target, vocabulary, seed)
        _descend(parameters, trace, target, scale, passes=passes, seed=seed)
    tensors = {name: value.detach().clone() for name, value in parameters.items()}
    if scale is not None:
        tensors["inner"] *= scale[:, None, None]
    return DamageModel(**tensors, compensation=compensation)


def _start(
    trace: RoutingTrace, target: Tensor, vocabulary: int, seed: int
) -> dict[str, torch.nn.Parameter]:
    """The tensors of a `DamageModel` as the fit begins: D proportional to the dropped mass^2."""
    layers, top_k, experts = trace.layers, trace.top_k, int(trace.head["experts"])
    mean = target.double().mean(dim=1).float().clamp(min=_LEAST)  # (L, K - 1)
    mass = trace.weight.float().flip(2).cumsum(2).flip(2)[..., 1:].clamp(min=_LEAST_MASS)
    pairs, singles = (experts**2, 0) if top_k == 2 else (0, experts)
    size = 0 if trace.hidden is None else trace.hidden.shape[2]
    width = HEAD_SIZE if size else 0
    rng = torch.Generator().manual_seed(seed)
    tensors = {
        "base": (mean / mass.square().mean(dim=1).clamp(min=_LEAST)).log(),
        "slope": torch.full((layers, top_k - 1), 2.0),
        "curve": torch.zeros((layers, top_k - 1)),
        "pair": torch.zeros((layers, pairs)),
        "first": torch.zeros((layers, singles)),
        "dropped": torch.zeros((layers, singles)),
        "token": torch.zeros((layers, vocabulary)),
        "inner": torch.randn((layers, width, size), generator=rng) / max(size, 1) ** 0.5,
        "bias": torch.zeros((layers, width)),
        "out": torch.zeros((layers, width)),
    }
    return {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}


def _descend(
    parameters: Mapping[str, torch.nn.Parameter],
    trace: RoutingTrace,
    target: Tensor,
    scale: Tensor | None,
    *,
    passes: int,
    seed: int,
) -> None:
    size, experts = min(_STEP_TOKENS, trace.tokens), int(trace.head["experts"])
    steps = max(20, passes * trace.tokens // size)
    others = [value for name, value in parameters.items() if name != "token"]
    optimiser = torch.optim.Adam([{"params": others}, {"params": [parameters["token"]]}], lr=_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=[_RATE, 3 * _RATE], total_steps=steps
    )
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        at = torch.randint(0, trace.tokens, (size,), generator=rng)
        hidden = None
        if trace.hidden is not None and scale is not None:
            hidden = trace.hidden[:, at].float() * scale[:, None, None]
        # Taken apart all at once: the gradient is one stack, not a full table for each layer.
        layers = [
            LayerDamage(**dict(zip(parameters, tensors, strict=True)), experts=experts)
            for tensors in zip(*(value.unbind() for value in parameters.values()), strict=True)
        ]
        log_damage = _log_damage(layers, trace, at, hidden)
        ratio = target[:, at] * (-log_damage).exp()
        loss = (log_damage + ratio.clamp(max=_OUTLIER)).mean()
        tables = (parameters[name] for name in ("token", "pair", "first", "dropped"))
        loss = loss + _PENALTY * sum(table.square().sum() for table in tables)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


def predicted(trace: RoutingTrace, damage: DamageModel) -> Tensor:
    """log D_k of every decision of a trace, as the policy would see it. (L, N, K - 1)"""
    if trace.hidden is None and damage.out.shape[1]:
        raise UsageError("the damage model looks at the layers' inputs; record them (hidden=True)")
    layers = [damage.layer(layer, trace.ids.device) for layer in range(trace.layers)]
    return _log_damage(layers, trace, slice(None), trace.hidden)


def _log_damage(
    layers: Sequence[LayerDamage],
    trace: RoutingTrace,
    at: Tensor | slice,
    hidden: Tensor | None,
) -> Tensor:
    """log D_k of the tokens ``at``, n of them, with their inputs (L, n, D). (L, n, K - 1)"""
    rows = []
    for layer, part in enumerate(layers):
        hint = None if hidden is None else part.hint(hidden[layer])
        index, mass = trace.index[layer, at].long(), trace.weight[layer, at].float()
        rows.append(part.log_damage(index, mass, trace.ids[at], hint))
    return torch.stack(rows)


def tau_for(log_damage: Tensor, experts_per_token: float) -> float:
    """The tau at which a damage policy runs so many experts per token, from 1 to K, on a text whose
    damages are `predicted` (L, N, K - 1)."""
    # An expert runs where the worst cut that leaves it out, or leaves out less, reaches tau.
    worst = log_damage.flip(2).cummax(dim=2).values.reshape(-1)
    share = (experts_per_token - 1) / log_damage.shape[2]
    place = round((1 - min(max(share, 0.0), 1.0)) * (len(worst) - 1))
    return float(worst.kthvalue(place + 1).values.exp())
