"""Muon for stacks of matrices: momentum, orthogonalised (Jordan et al., 2024).

Each update is the momentum with its singular values brought near 1 by Newton-Schulz steps,
scaled so that its root mean square is 0.2, about AdamW's (Liu et al., 2025, "Muon is scalable
for LLM training"), so that AdamW's learning rates and weight decay carry over.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, from the original implementation
STEPS = 5
UPDATE_RMS = 0.2


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """(..., m, n) -> the same shape, singular values near 1.

    The iteration runs on the Gram matrix of the shorter side alone, and its product is applied
    once: for long thin experts this is a fraction of the work.
    """
    wide = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    norm = wide.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-12)
    wide = wide / norm
    gram = wide @ wide.mT  # (..., s, s)
    identity = torch.eye(gram.shape[-1])
    total = identity
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        step = a * identity + b * gram + c * (gram @ gram)
        total = step @ total
        gram = step @ gram @ step
    out = total @ wide
    return out.mT if matrices.shape[-2] > matrices.shape[-1] else out


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised per matrix; parameters (m, n) or (E, m, n)."""

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        *,
        lr: float = 0.0,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update."""
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                average = state["momentum"].lerp_(gradient, 1.0 - group["momentum"])
                update = orthogonalise(gradient.lerp(average, group["momentum"]))
                scale = UPDATE_RMS * max(parameter.shape[-2:]) ** 0.5
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * scale)
