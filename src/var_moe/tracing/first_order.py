"""First-order damage: what a changed decision of one (layer, token) would do to the loss.

With g the gradient of a forward's summed loss with respect to a layer's output (T, D), a change
d of one token's output changes the loss by g . d, to first order. All changes here are made of
experts' outputs, so that one product of g with each expert's output serves them all:

- ``cut``: only the first k = 1..K-1 experts run, rescaled to the full sum of weights;
- ``cut_residual``: the leading experts keep their own weights, and the residual mean stands for
  what is dropped, as in VAR's verified mode;
- ``cut_compensated``: only the first k = 1..K-1 experts run, with their own weights, and a
  compensation stands for the others;
- ``next``: the leading experts are replaced by the next ones in rank (wrapped), rescaled;
- ``foreign``: they are replaced by random experts that the token did not choose, rescaled.

The last two are what plain VAR does when a stored decision is not the token's own.

Over many tokens these changes largely cancel in a trained model; what is left of a cut's cost is
of second order, which the squares of g . d estimate (see `tracing.policies.predicted_degradation`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from var_moe.execution.backends.base import ExpertsBackend
from var_moe.routing.compensation import Compensation, ResidualMeans
from var_moe.routing.keeping import leading_count, rescaled

_STEP_BYTES = 64 * 2**20  # float32 logits held at once


@dataclass(frozen=True)
class _Pending:
    """What a layer's hook needs when the gradient comes: the counted tokens' slots by rank."""

    module: nn.Module
    hidden: Tensor  # (T, D) input
    outputs: Tensor  # (T, K, D) unweighted
    at: Tensor  # (n,) counted tokens
    rank: Tensor  # (n, K) slots by rank
    index: Tensor  # (n, K) experts by rank
    weight: Tensor  # (n, K) float32 by rank
    foreign: Tensor  # (n, F) experts that the token did not choose, F <= leading


class DamageProbe:
    """Catches the gradients of one forward's layers and turns them into damages.

    Args:
        backend: runs the experts that a token did not choose.
        residuals: means for ``cut_residual``; without, there is none.
        compensation: for ``cut_compensated``; without, there is none.
        stored: whether to take ``next`` and ``foreign``, too.
        seed: draws the experts for ``foreign``; each forward and layer has rng of its own, so
            that a resumed recording draws the same.
    """

    def __init__(
        self,
        backend: ExpertsBackend,
        *,
        residuals: ResidualMeans | None,
        compensation: Compensation | None,
        stored: bool = True,
        seed: int,
    ) -> None:
        self._backend, self._residuals, self._seed = backend, residuals, seed
        self._compensation, self._stored = compensation, stored
        self._number = 0
        self._pending: dict[int, _Pending] = {}
        self._probes: list[Tensor] = []
        self._damages: dict[int, dict[str, Tensor]] = {}

    def begin(self, number: int) -> None:
        """Forward ``number`` starts."""
        self._number = number
        self._pending.clear()
        self._probes.clear()
        self._damages.clear()

    def watch(
        self,
        layer: int,
        module: nn.Module,
        *,
        hidden: Tensor,
        outputs: Tensor,
        at: Tensor,
        rank: Tensor,
        index: Tensor,
        weight: Tensor,
        out: Tensor,
    ) -> Tensor:
        """The layer's output ``out`` (T, D), whose gradient will be caught on the way back."""
        experts = int(module.num_experts)  # type: ignore[arg-type]
        self._pending[layer] = _Pending(
            module=module,
            hidden=hidden.detach(),
            outputs=outputs.detach(),
            at=at,
            rank=rank,
            index=index,
            weight=weight.detach().float(),
            foreign=self._draw(layer, index, experts),
        )
        # Parameters need no gradient, so something must: a zero that is added. What it is added
        # to is what the rest of the model sees.
        zero = torch.zeros((), dtype=out.dtype, device=out.device, requires_grad=True)
        self._probes.append(zero)
        out = out + zero
        out.register_hook(lambda gradient: self._catch(layer, gradient))
        return out

    def _draw(self, layer: int, index: Tensor, experts: int) -> Tensor:
        """Random experts besides the chosen ones: as many as lead, or as there are."""
        count = min(leading_count(index.shape[1]), experts - index.shape[1])
        seed = (self._seed * 1_000_003 + self._number) * 1_009 + layer
        rng = torch.Generator().manual_seed(seed % 2**62)
        scores = torch.rand((index.shape[0], experts), generator=rng).to(index.device)
        return scores.scatter_(1, index, -1.0).topk(count, dim=1).indices

    def backward(self, logits: Tensor, gradient: Tensor) -> None:
        """Go back from the logits. Only the probes are asked for: no parameter gets a gradient."""
        torch.autograd.grad(logits, self._probes, gradient)
        self._probes.clear()

    def take(self, layers: int) -> dict[str, Tensor]:
        """The damages of the forward: (L, n), ``cut`` (L, n, K - 1); float32 on the CPU.

        Raises:
            RuntimeError: a layer's output did not reach the loss.
        """
        missing = [layer for layer in range(layers) if layer not in self._damages]
        if missing:
            raise RuntimeError(f"no gradient came back to MoE layer {missing[0]}")
        by_layer = [self._damages.pop(layer) for layer in range(layers)]
        return {name: torch.stack([row[name] for row in by_layer]) for name in by_layer[0]}

    @torch.no_grad()
    def _catch(self, layer: int, gradient: Tensor) -> None:
        """The hook: g (T, D) is here, the layer's tensors can go."""
        note = self._pending.pop(layer)
        g = gradient[note.at].float()  # (n, D)
        effect = torch.einsum("nd,nkd->nk", g, note.outputs[note.at].float())
        effect = effect.gather(1, note.rank)
        damages = {name: value.cpu() for name, value in _own(note.weight, effect).items()}
        if self._residuals is not None:
            damages["cut_residual"] = self._cut_residual(layer, note, g, effect).cpu()
        if self._compensation is not None:
            damages["cut_compensated"] = self._cut_compensated(layer, note, g, effect).cpu()
        if not self._stored:
            del damages["next"]
            self._damages[layer] = damages
            return
        damages["foreign"] = damages["next"]
        if note.foreign.shape[1]:
            damages["foreign"] = self._foreign(note, g, effect).cpu()
        self._damages[layer] = damages

    def _cut_residual(self, layer: int, note: _Pending, g: Tensor, effect: Tensor) -> Tensor:
        means, lead = self._residuals, leading_count(note.index.shape[1])
        if means is None or lead == note.index.shape[1]:
            return torch.zeros_like(effect[:, 0])
        dropped = note.weight[:, lead:]
        first = note.index[:, 0]
        cut = torch.ones_like(first, dtype=torch.bool)
        row = means.row(first, note.index[:, -1] if means.by_pair else None, cut)
        table = means.table[layer].to(g.device)
        instead = (g * table[row].float()).sum(dim=1) * dropped.sum(dim=1)
        return instead - (dropped * effect[:, lead:]).sum(dim=1)

    def _cut_compensated(self, layer: int, note: _Pending, g: Tensor, effect: Tensor) -> Tensor:
        """(n, K - 1)"""
        compensation = self._compensation
        assert compensation is not None
        part = compensation.layers[layer].to(g.device, torch.float32)
        instead = torch.zeros_like(effect)  # (n, K) g . what stands for each slot's expert
        rows = compensation.rows(note.index, note.index[:, 0])
        for slot in range(1, rows.shape[1]):
            instead[:, slot] = (g * part.vectors[rows[:, slot]]).sum(dim=1)
        correction = part.correction(note.hidden[note.at].float())
        if correction is not None:
            instead += (g * correction).sum(dim=1, keepdim=True)
        change = note.weight * (instead - effect)
        # What rank k and all after it add up to, for k = 1..K-1.
        return change.flip(1).cumsum(dim=1).flip(1)[:, 1:]

    def _foreign(self, note: _Pending, g: Tensor, effect: Tensor) -> Tensor:
        count = note.foreign.shape[1]
        index = note.foreign.new_full((note.hidden.shape[0], count), -1)
        index[note.at] = note.foreign
        outputs = self._backend.pairs(note.module, note.hidden, index)[note.at].float()
        theirs = torch.einsum("nd,nkd->nk", g, outputs)
        total = note.weight.sum(dim=1)
        lent = note.weight[:, :count]  # each takes the weight of the expert in whose place it is
        scaled: Tensor = rescaled(lent, lent.sum(dim=1), total)
        return (scaled * theirs).sum(dim=1) - (note.weight * effect).sum(dim=1)


def _own(weight: Tensor, effect: Tensor) -> dict[str, Tensor]:
    """Damages by running other subsets of the chosen experts.

    Args:
        weight: (n, K) by rank.
        effect: (n, K) g . output of each expert by rank.

    Returns:
        ``cut`` (n, K - 1) and ``next`` (n,).
    """
    top_k, lead = weight.shape[1], leading_count(weight.shape[1])
    total, full = weight.sum(dim=1), (weight * effect).sum(dim=1)

    def running(ranks: list[int]) -> Tensor:
        kept = weight[:, ranks]
        scaled: Tensor = rescaled(kept, kept.sum(dim=1), total)
        return (scaled * effect[:, ranks]).sum(dim=1) - full

    cut = [running(list(range(k))) for k in range(1, top_k)]
    return {
        "cut": torch.stack(cut, dim=1) if cut else weight[:, :0],
        "next": running([rank % top_k for rank in range(lead, 2 * lead)]),
    }


def scored_targets(counted: Tensor) -> Tensor:
    """Positions of the tokens that have a loss, in the flattened rows of ``counted`` (B, S). (P,)

    All that count but a row's first token: it is a document's first, as later windows of a
    document start with an overlap.
    """
    targets = counted.clone()
    targets[:, :1] = False
    return targets.reshape(-1).nonzero().squeeze(1)


def loss_and_gradient(
    logits: Tensor, ids: Tensor, target: Tensor, *, sample: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Loss of each scored target, and the gradient of their sum with respect to the logits.

    In steps, so that logits are held in float32 in parts.

    With ``sample``, the gradient is of targets drawn from the model itself instead.

    Args:
        logits: (B, S, V) detached.
        ids: (B, S) token ids.
        target: (P,) positions of the targets in the flattened rows; each is predicted by the
            position before it.
        sample: generator, on the CPU.

    Returns:
        (P,) float32 losses in nats; (B, S, V) gradient in the dtype of the logits.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    target = target.to(logits.device)
    right = ids.reshape(-1).to(logits.device)[target]
    gradient = torch.zeros_like(flat)
    losses = torch.empty(len(target), dtype=torch.float32, device=logits.device)
    step = max(1, _STEP_BYTES // (4 * flat.shape[1]))
    for at in range(0, len(target), step):
        part = slice(at, at + step)
        rows, answer = target[part] - 1, right[part, None]
        shares = flat[rows].float().log_softmax(dim=-1)
        losses[part] = -shares.gather(1, answer)[:, 0]
        shares = shares.exp_()
        if sample is not None:
            answer = torch.multinomial(shares.cpu(), 1, generator=sample).to(shares.device)
        shares.scatter_add_(1, answer, torch.full_like(shares[:, :1], -1.0))
        gradient[rows] = shares.to(gradient.dtype)
    return losses, gradient.view_as(logits)
