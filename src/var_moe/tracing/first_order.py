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

import torch
from torch import Tensor

from var_moe.execution.backends.base import ExpertsBackend
from var_moe.routing.compensation import Compensation, ResidualMeans
from var_moe.routing.keeping import leading_count, rescaled
from var_moe.tracing.all_pairs import LayerDecisions

_STEP_BYTES = 64 * 2**20  # float32 logits held at once


class DamageProbe:
    """Catches the gradients of one forward's layers and turns them into damages.

    ``residuals`` give ``cut_residual``, ``compensation`` ``cut_compensated``; ``next`` and
    ``foreign`` are taken where ``stored``. ``backend`` runs the experts of ``foreign``, which are
    drawn with ``seed`` in each forward and layer anew, so that a resumed recording draws the same.
    """

    def __init__(
        self,
        backend: ExpertsBackend,
        *,
        residuals: ResidualMeans | None,
        compensation: Compensation | None,
        stored: bool,
        seed: int,
    ) -> None:
        self._backend, self._residuals, self._seed = backend, residuals, seed
        self._compensation, self._stored = compensation, stored
        self._number = 0
        self._probes: list[Tensor] = []
        self._damages: dict[int, dict[str, Tensor]] = {}

    def begin(self, number: int) -> None:
        """Forward ``number`` starts."""
        self._number = number
        self._probes.clear()
        self._damages.clear()

    def watch(self, decided: LayerDecisions, out: Tensor) -> Tensor:
        """The layer's output ``out`` (T, D), whose gradient will be caught on the way back."""
        foreign = self._draw(decided.layer, decided.index, int(decided.module.num_experts))  # type: ignore[arg-type]
        # Parameters need no gradient, so something must: a zero that is added. What it is added
        # to is what the rest of the model sees.
        zero = torch.zeros((), dtype=out.dtype, device=out.device, requires_grad=True)
        self._probes.append(zero)
        out = out + zero
        out.register_hook(lambda gradient: self._catch(decided, foreign, gradient))
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

        A layer whose output did not reach the loss is a RuntimeError.
        """
        missing = [layer for layer in range(layers) if layer not in self._damages]
        if missing:
            raise RuntimeError(f"no gradient came back to MoE layer {missing[0]}")
        by_layer = [self._damages.pop(layer) for layer in range(layers)]
        return {name: torch.stack([row[name] for row in by_layer]) for name in by_layer[0]}

    @torch.no_grad()
    def _catch(self, decided: LayerDecisions, foreign: Tensor, gradient: Tensor) -> None:
        """The hook: g (T, D) is here."""
        g, weight = gradient[decided.at].float(), decided.weight.float()  # (n, D), (n, K)
        effect = torch.einsum("nd,nkd->nk", g, decided.outputs[decided.at].float())
        effect = effect.gather(1, decided.rank)
        damages = _own(weight, effect)
        if self._residuals is not None:
            damages["cut_residual"] = _cut_residual(self._residuals, decided, g, weight, effect)
        if self._compensation is not None:
            change = _cut_compensated(self._compensation, decided, g, weight, effect)
            damages["cut_compensated"] = change
        if not self._stored:
            del damages["next"]
        elif foreign.shape[1]:
            damages["foreign"] = self._foreign(decided, foreign, g, weight, effect)
        else:
            damages["foreign"] = damages["next"]
        self._damages[decided.layer] = {name: value.cpu() for name, value in damages.items()}

    def _foreign(
        self, decided: LayerDecisions, foreign: Tensor, g: Tensor, weight: Tensor, effect: Tensor
    ) -> Tensor:
        count = foreign.shape[1]
        index = foreign.new_full((decided.hidden.shape[0], count), -1)
        index[decided.at] = foreign
        outputs = self._backend.pairs(decided.module, decided.hidden, index)[decided.at].float()
        theirs = torch.einsum("nd,nkd->nk", g, outputs)
        lent = weight[:, :count]  # each takes the weight of the expert in whose place it is
        scaled: Tensor = rescaled(lent, lent.sum(dim=1), weight.sum(dim=1))
        return (scaled * theirs).sum(dim=1) - (weight * effect).sum(dim=1)


def _cut_residual(
    means: ResidualMeans, decided: LayerDecisions, g: Tensor, weight: Tensor, effect: Tensor
) -> Tensor:
    """(n,)"""
    index, lead = decided.index, leading_count(decided.index.shape[1])
    if lead == index.shape[1]:
        return torch.zeros_like(effect[:, 0])
    dropped, first = weight[:, lead:], index[:, 0]
    cut = torch.ones_like(first, dtype=torch.bool)
    row = means.row(first, index[:, -1] if means.by_pair else None, cut)
    table = means.table[decided.layer].to(g.device)
    instead = (g * table[row].float()).sum(dim=1) * dropped.sum(dim=1)
    return instead - (dropped * effect[:, lead:]).sum(dim=1)


def _cut_compensated(
    compensation: Compensation, decided: LayerDecisions, g: Tensor, weight: Tensor, effect: Tensor
) -> Tensor:
    """(n, K - 1)"""
    part = compensation.layers[decided.layer].to(g.device, torch.float32)
    instead = torch.zeros_like(effect)  # (n, K) g . what stands for each slot's expert
    rows = compensation.rows(decided.index, decided.index[:, 0])
    for slot in range(1, rows.shape[1]):
        instead[:, slot] = (g * part.vectors[rows[:, slot]]).sum(dim=1)
    correction = part.correction(decided.hidden[decided.at].float())
    if correction is not None:
        instead += (g * correction).sum(dim=1, keepdim=True)
    change = weight * (instead - effect)
    # What rank k and all after it add up to, for k = 1..K-1.
    return change.flip(1).cumsum(dim=1).flip(1)[:, 1:]


def _own(weight: Tensor, effect: Tensor) -> dict[str, Tensor]:
    """``cut`` (n, K - 1) and ``next`` (n,): damages by running other subsets of the chosen experts.

    ``weight`` (n, K) and ``effect`` (n, K), g . output of each expert, are by rank.
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

    Args:
        logits: (B, S, V) detached; held in float32 in parts.
        ids: (B, S) token ids.
        target: (P,) positions of the targets in the flattened rows; each is predicted by the
            position before it.
        sample: generator, on the CPU; then the gradient is of targets drawn from the model.

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
