"""One stretch of training: Adam over calibration text, looks at held-out text, the best counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from var_moe.calibration.checkpoint import Checkpoint
from var_moe.calibration.material import Material, schedule
from var_moe.routing.decision import TokenBatch

LOOKS = 8  # at held-out text in a stretch
PATIENCE = 5  # of them without an improvement


@dataclass
class Progressed:
    """How far a stretch is, and what its looks found."""

    steps: int = 0
    tokens: int = 0
    best: float = float("inf")
    since: int = 0  # looks without an improvement
    curve: list[tuple[int, float]] = field(default_factory=list)


class Descent:
    """Trains a module's parameters.

    Args:
        material: the text.
        module: its best state is in it at the end.
        part: number of the stretch; each reads the text in orders of its own.
        tokens: at most so many.
        rate: highest learning rate of Adam.
        checkpoint: that a killed stretch goes on from.
    """

    def __init__(
        self,
        material: Material,
        module: nn.Module,
        *,
        part: int,
        tokens: int,
        rate: float,
        checkpoint: Checkpoint,
    ) -> None:
        self._material, self._module, self._part = material, module, part
        self._tokens, self._rate, self._checkpoint = tokens, rate, checkpoint
        self.state = Progressed()

    def run(
        self,
        descend: Callable[[TokenBatch, np.random.Generator], int],
        judge: Callable[[], float],
        *,
        seed: int,
        steps: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Progressed:
        """Train to the end of the tokens or of the patience; with ``steps``, exactly so many.

        Args:
            descend: leaves summed gradients for a batch, and returns over how many tokens.
            judge: what is made small on held-out text.
            seed: of the dice that ``descend`` gets.
            steps: end after so many, with all patience.
            progress: called with tokens done and in all.
        """
        state, module = self.state, self._module
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimiser = torch.optim.Adam(parameters, lr=self._rate)
        best = _copied(module)
        restored = self._checkpoint.read()
        if restored is not None:
            module.load_state_dict(restored["module"])
            optimiser.load_state_dict(restored["optimiser"])
            state.__dict__.update(restored["state"])
            best = restored["best"]
        each = max(1, self._tokens // LOOKS)
        for batch in self._material.batches(
            self._part, lambda: (state.steps, state.tokens), self._tokens
        ):
            if steps is None and state.since >= PATIENCE:
                break
            if steps is not None and state.steps >= steps:
                break
            optimiser.zero_grad()
            for group in optimiser.param_groups:
                group["lr"] = self._rate * schedule(state.tokens / self._tokens)
            tokens = descend(batch, np.random.default_rng([seed, 7 + self._part, state.steps]))
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad /= max(tokens, 1)  # of the mean
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            state.steps += 1
            state.tokens += int(batch.counted.sum())
            if progress:
                progress(min(state.tokens, self._tokens), self._tokens)
            done = state.tokens >= self._tokens or state.steps == steps
            if not done and state.tokens // each == len(state.curve):
                continue
            here = judge()
            state.curve.append((state.tokens, here))
            state.since += 1
            if here < state.best:
                state.best, state.since, best = here, 0, _copied(module)
            self._checkpoint.write(
                {
                    "module": module.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "state": dict(state.__dict__),
                    "best": best,
                }
            )
        module.load_state_dict(best)
        return state


def _copied(module: nn.Module) -> dict[str, Any]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
