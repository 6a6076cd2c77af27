"""How a healed student does on held-out text, against the unmodified model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import exp, expm1
from typing import Any

import numpy as np
import torch
from torch import Tensor

from var_moe.calibration.distill import Distillation, divergence, forward
from var_moe.routing.compensation import Compensation
from var_moe.routing.damage import DamageModel, DamagePolicy
from var_moe.routing.decision import TokenBatch
from var_moe.tracing.loss import loss_and_gradient, scored_targets

_ALIKE = 1e-3  # experts per token: differences below say nothing of a slope


@dataclass(frozen=True)
class Look:
    """The student at some taus, and without cuts (tau 0)."""

    taus: tuple[float, ...]
    experts_per_token: tuple[float, ...]
    divergence: tuple[float, ...]  # KL from the unmodified model, nats per token
    degradation: tuple[float, ...]  # perplexity / the unmodified model's - 1
    degradation_uncut: float

    def relative(self, other: Look) -> float:
        """Divergence over another look's at equal experts per token, mean over the taus.

        Healing moves how many experts a tau leaves, and more experts alone diverge less; so the
        other's is read off the line through its points, in the logarithm.
        """
        found = []
        for at, experts in enumerate(self.experts_per_token):
            found.append(np.log(max(self.divergence[at], 1e-12)) - other._log_at(experts, at))
        return exp(float(np.mean(found)))

    def _log_at(self, experts: float, at: int) -> float:
        logs = np.log(np.maximum(self.divergence, 1e-12))
        order = np.argsort(self.experts_per_token)
        x, y = np.asarray(self.experts_per_token)[order], logs[order]
        steps = np.diff(x)
        if len(x) < 2 or (steps < _ALIKE).any():
            return float(logs[at])
        place = int(np.clip(np.searchsorted(x, experts) - 1, 0, len(x) - 2))
        slope = (y[place + 1] - y[place]) / steps[place]
        return float(y[place] + slope * (experts - x[place]))

    def to_dict(self) -> dict[str, Any]:
        """For a file."""
        return {
            "taus": list(self.taus),
            "experts_per_token": list(self.experts_per_token),
            "held_out_divergence_nats": list(self.divergence),
            "held_out_degradation": list(self.degradation),
            "held_out_degradation_uncut": self.degradation_uncut,
        }


Untouched = Callable[[], AbstractContextManager[Any]]


class Examiner:
    """Compares students with the unmodified model on held-out batches.

    Args:
        session: the experts session that the model is attached to.
        held: the batches.
        damage: which decisions are cut.
        taus: where.
        layers: L.
        device: of the inputs.
    """

    def __init__(
        self,
        session: Distillation,
        held: Sequence[TokenBatch],
        *,
        damage: DamageModel,
        taus: Sequence[float],
        layers: int,
        device: torch.device,
    ) -> None:
        self._session, self._held, self._damage = session, held, damage
        self._taus, self._layers, self._device = tuple(taus), layers, device

    def look(
        self,
        model: Any,
        student: Any,
        compensation: Compensation | None,
        *,
        untouched: Untouched = nullcontext,
    ) -> Look:
        """One look.

        Args:
            model: the unmodified model, within ``untouched()``.
            student: what is called for the student's logits.
            compensation: the student's.
            untouched: within it, ``model`` is the unmodified model.
        """
        own, tokens, counted = 0.0, 0, 0
        taus = (*self._taus, 0.0)
        losses, diverged = np.zeros(len(taus)), np.zeros(len(taus))
        pairs = np.zeros(len(taus))
        with torch.no_grad():
            for batch in self._held:
                self._session.as_teacher()
                with untouched():
                    teacher = forward(model, batch, self._device)
                own += _loss(teacher, batch)
                tokens += len(scored_targets(batch.counted))
                counted += int(batch.counted.sum())
                for at, tau in enumerate(taus):
                    policy = DamagePolicy(tau, damage=self._damage)
                    self._session.as_student(policy, compensation, batch)
                    self._session.executed = 0
                    logits = forward(student, batch, self._device)
                    pairs[at] += self._session.executed
                    losses[at] += _loss(logits, batch)
                    diverged[at] += divergence(logits, teacher, batch, gradient=False)[0].total
        change = [expm1(float(loss - own) / max(tokens, 1)) for loss in losses]
        return Look(
            taus=self._taus,
            experts_per_token=tuple((pairs[:-1] / (counted * self._layers)).tolist()),
            divergence=tuple((diverged[:-1] / max(tokens, 1)).tolist()),
            degradation=tuple(change[:-1]),
            degradation_uncut=change[-1],
        )

    def uncut(self, model: Any) -> float:
        """Held-out loss of a model that runs all pairs, nats per token."""
        total, tokens = 0.0, 0
        self._session.as_teacher()
        with torch.no_grad():
            for batch in self._held:
                total += _loss(forward(model, batch, self._device), batch)
                tokens += len(scored_targets(batch.counted))
        return total / max(tokens, 1)


def _loss(logits: Tensor, batch: TokenBatch) -> float:
    target = scored_targets(batch.counted)
    losses, _ = loss_and_gradient(logits, batch.ids, target)
    return float(losses.double().sum())
