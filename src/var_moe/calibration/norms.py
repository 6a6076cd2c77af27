"""Damages without a backward pass, for models that are too large for one.

In place of (g . d)^2 / 2 stands s_l |d|^2: the squared size of the change of a layer's output,
times a sensitivity of the layer. That is measured: the rise of the loss when every decision of
layer l alone is cut to the first expert, over the summed squares of those changes. It knows
neither in which direction an output matters nor for which token, and predicts less well (README).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from var_moe.calibration.distillation import forward
from var_moe.evaluation.batching import batches, collate, drawn
from var_moe.execution.backends.sorted import weighted_sum
from var_moe.execution.dispatch import PairBackend, attach, detach, pair_backend
from var_moe.execution.session import routed
from var_moe.models.identity import identity
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.compensation import Compensation
from var_moe.routing.decision import ForwardContext, Routing
from var_moe.routing.keeping import all_pairs, kept_pairs, leading_slots
from var_moe.routing.ranking import rank_slots, shares
from var_moe.tracing.loss import loss_and_gradient, scored_targets
from var_moe.tracing.shards import joined
from var_moe.tracing.trace import RoutingTrace

if TYPE_CHECKING:
    from var_moe.data.documents import EncodedDocument
    from var_moe.models.loading import LoadedModel

SENSITIVITY_TOKENS = 16_000
_TOKENS_PER_BATCH = 4096
_LEAST = 1e-6  # of the mean sensitivity: a layer that seems not to matter still ranks its cuts


class _OneLayer(RoutingPolicy):
    """Runs only the first expert in one layer, and everything in the others."""

    def __init__(self, layer: int, compensation: Compensation | None) -> None:
        self._layer, self.compensation = layer, compensation

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        if layer != self._layer:
            return all_pairs(index, weight)
        return kept_pairs(index, weight, leading_slots(index, weight, 1))


class _Norms:
    """The experts session that notes sizes of changes, decisions and the layers' inputs."""

    def __init__(self, backend: PairBackend, compensation: Compensation | None) -> None:
        self._backend, self._compensation = backend, compensation
        self.at = torch.empty(0, dtype=torch.int64)
        self.rows: list[dict[str, Tensor]] = []

    def experts(
        self, layer: int, module: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor
    ) -> Tensor:
        """One layer: run every pair, and compare with what fewer give."""
        outputs = self._backend(module, hidden, index)
        at = self.at.to(index.device)
        rank = rank_slots(index[at], weight[at])
        ranked, heavy = index[at].gather(1, rank), weight[at].gather(1, rank).float()
        each = outputs[at].gather(1, rank[:, :, None].expand(-1, -1, outputs.shape[2])).float()
        each = each * heavy[:, :, None]  # (n, K, D)
        row = {
            "index": ranked.to(torch.int16),
            "weight": shares(heavy).to(torch.float16),
            "entropy": torch.zeros(len(at), dtype=torch.float16),
            "hidden": hidden[at].to(torch.float16),
            "damage.cut": _rescaled_change(each, heavy),
        }
        if self._compensation is not None:
            part = self._compensation.layers[layer].to(hidden.device, torch.float32)
            rows = self._compensation.rows(ranked, ranked[:, 0])
            changes = []
            for kept in range(1, ranked.shape[1]):
                dropped = heavy.clone()
                dropped[:, :kept] = 0
                change = part.add(-each[:, kept:].sum(1), hidden[at].float(), rows, dropped)
                changes.append(change.norm(dim=1))
            row["damage.cut_compensated"] = torch.stack(changes, dim=1)
        self.rows.append({name: value.cpu() for name, value in row.items()})
        return weighted_sum(outputs, weight, hidden.dtype)


def _rescaled_change(each: Tensor, weight: Tensor) -> Tensor:
    """Size of the change by running the first k experts alone, rescaled. (n, K - 1)"""
    parts, kept = each.cumsum(dim=1), weight.cumsum(dim=1)
    scale = kept[:, -1:] / torch.where(kept == 0, 1.0, kept)
    sizes: Tensor = torch.linalg.vector_norm(parts * scale[:, :, None] - parts[:, -1:], dim=2)
    return sizes[:, :-1]


def norm_trace(
    loaded: LoadedModel,
    documents: Sequence[EncodedDocument],
    *,
    compensation: Compensation | None,
    tokens: int,
    seed: int = 0,
    backend: str = "sorted",
    progress: Callable[[int, int], None] | None = None,
) -> RoutingTrace:
    """What `fit_damage` needs, from forwards alone: L + 2 passes over a small text, one over all.

    Args:
        loaded: the model.
        documents: calibration text.
        compensation: also take the changes with this in place.
        tokens: at most so many.
        seed: draws the documents.
        backend: experts backend.
        progress: called with tokens done and in all.
    """
    chosen = list(drawn(documents, tokens, seed).values())
    session = _Norms(pair_backend(backend), compensation)
    total, done = sum(len(document.ids) for document in chosen), 0
    parts = []
    before = attach(loaded.model, session)
    try:
        with torch.no_grad():
            for rows in batches(chosen, _TOKENS_PER_BATCH, window=loaded.window):
                batch = collate(rows)
                session.at = batch.counted.reshape(-1).nonzero().squeeze(1)
                session.rows = []
                forward(loaded.model, batch, torch.device(loaded.device), logits_to_keep=1)
                named = {k: torch.stack([row[k] for row in session.rows]) for k in session.rows[0]}
                parts.append({"ids": batch.ids[batch.counted], **named})
                done += len(session.at)
                if progress:
                    progress(done, total)
    finally:
        detach(loaded.model, before)
    columns = joined(parts)
    few = list(drawn(documents, min(tokens, SENSITIVITY_TOKENS), seed).values())
    small = sum(len(document.ids) for document in few)
    for kind in ("cut", "cut_compensated"):
        if f"damage.{kind}" in columns:
            given = compensation if kind == "cut_compensated" else None
            sizes = columns[f"damage.{kind}"]
            rise = _rises(loaded, few, given, backend)
            squares = sizes[:, :, 0].double().square().mean(dim=1) * small
            sensitivity = rise / squares.clamp(min=1e-12)
            sensitivity = sensitivity.clamp(min=_LEAST * float(sensitivity.abs().mean()))
            # So that half the square is the damage, as with g . d.
            columns[f"damage.{kind}"] = sizes * (2 * sensitivity).sqrt().float()[:, None, None]
    head = {
        **identity(loaded),
        "compensation_hash": None if compensation is None else compensation.hash,
        "starts": [0, int(columns["ids"].shape[0])],
        "documents": [0],
    }
    return RoutingTrace.of(columns, head)


def _rises(
    loaded: LoadedModel,
    documents: Sequence[EncodedDocument],
    compensation: Compensation | None,
    backend: str,
) -> Tensor:
    """Rise of the summed loss, in nats, when one layer runs first experts alone. (L,)"""
    layers = loaded.moe_layers

    def loss(policy: RoutingPolicy) -> float:
        total = 0.0
        with routed(loaded.model, policy, backend=backend) as session, torch.no_grad():
            for rows in batches(documents, _TOKENS_PER_BATCH, window=loaded.window):
                batch = collate(rows)
                session.announce(batch)
                logits = forward(loaded.model, batch, torch.device(loaded.device))
                target = scored_targets(batch.counted)
                total += float(loss_and_gradient(logits, batch.ids, target)[0].double().sum())
        return total

    unchanged = loss(_OneLayer(layers, compensation))  # no layer has that number: none is cut
    rises = [loss(_OneLayer(layer, compensation)) - unchanged for layer in range(layers)]
    return torch.tensor(rises, dtype=torch.float64)
