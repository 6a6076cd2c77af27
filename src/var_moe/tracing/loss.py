"""The loss of a forward and its gradient, in steps, so that logits are held in float32 in parts."""

from __future__ import annotations

import torch
from torch import Tensor

_STEP_BYTES = 64 * 2**20  # float32 logits held at once


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

    With ``sample``, the gradient is of targets drawn from the model itself instead.

    Args:
        logits: (B, S, V) detached.
        ids: (B, S) token ids.
        target: (P,) positions of the targets in the flattened rows; each is predicted by the
            position before it.
        sample: dice, on the CPU.

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
