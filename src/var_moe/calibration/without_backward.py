"""Damages without a backward pass, for models or machines that allow none.

In place of (g . d)^2 / 2, with g the gradient at a layer's output and d its change by a cut, stands
s_l |d|^2, with a sensitivity s_l of the layer: the measured rise of the loss when every decision
of layer l alone is cut to the first expert, over the summed |d|^2 of these cuts. It does not know
in which direction an output matters, nor for which token, so it predicts less well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from var_moe.calibration.distillation import forward
from var_moe.calibration.statistics import rescaled_change
from var_moe.evaluation.batching import batches, collate, drawn
from var_moe.evaluation.perplexity import document_losses
from var_moe.execution.backends import open_backend
from var_moe.execution.backends.base import ExpertsBackend, weighted_sum
from var_moe.execution.dispatch import dispatched
from var_moe.execution.session import routed
from var_moe.models.identity import identity
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.compensation import Compensation
from var_moe.routing.decision import ForwardContext, Routing
from var_moe.routing.keeping import all_pairs, kept_pairs, leading_slots, rank_slots, shares
from var_moe.tracing.trace import RoutingTrace, joined

if TYPE_CHECKING:
    from var_moe.data.documents import EncodedDocument
    from var_moe.models.loading import LoadedModel

SENSITIVITY_TOKENS = 16_000
"""Tokens on which the layers' sensitivities are measured."""
_LEAST = 1e-6  # of the mean sensitivity: a layer that seems not to matter still ranks its cuts


class _OneLayer(RoutingPolicy):
    """Runs only the first expert in one layer, and everything in the others."""

    def __init__(self, layer: int, compensation: Compensation | None) -> None:
        self._layer, self.compensation = layer, compensation

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        if layer != self._layer:
            return all_pairs(index, weight)
        return kept_pairs(index, weight, leading_slots(index, weight, 1))


class _Sizes:
    """The experts session that notes sizes of changes, decisions and the layers' inputs."""

    def __init__(self, backend: ExpertsBackend, compensation: Compensation | None) -> None:
        self._backend, self._compensation = backend, compensation
        self._at = torch.empty(0, dtype=torch.int64)
        self.rows: list[dict[str, Tensor]] = []

    def begin(self, context: ForwardContext) -> None:
        """The forward that starts."""
        self._at, self.rows = context.counted.reshape(-1).nonzero().squeeze(1), []

    def experts(
        self, layer: int, module: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor
    ) -> Tensor:
        """One layer: run every pair, and compare with what fewer give."""
        outputs = self._backend.pairs(module, hidden, index)
        at = self._at.to(index.device)
        rank = rank_slots(index[at], weight[at])
        ranked, heavy = index[at].gather(1, rank), weight[at].gather(1, rank).float()
        each = outputs[at].gather(1, rank[:, :, None].expand(-1, -1, outputs.shape[2])).float()
        row = {
            "index": ranked.to(torch.int16),
            "weight": shares(heavy).to(torch.float16),
            "entropy": torch.zeros(len(at), dtype=torch.float16),
            "hidden": hidden[at].to(torch.float16),
            "damage.cut": rescaled_change(each, heavy)[:, :-1].norm(dim=2),
        }
        if self._compensation is not None:
            part = self._compensation.layers[layer].to(hidden.device, torch.float32)
            rows = self._compensation.rows(ranked, ranked[:, 0])
            each, changes = each * heavy[:, :, None], []
            for kept in range(1, ranked.shape[1]):
                dropped = heavy.clone()
                dropped[:, :kept] = 0
                change = part.add(-each[:, kept:].sum(1), hidden[at].float(), rows, dropped)
                changes.append(change.norm(dim=1))
            row["damage.cut_compensated"] = torch.stack(changes, dim=1)
        self.rows.append({name: value.cpu() for name, value in row.items()})
        return weighted_sum(outputs, weight, hidden.dtype)


def trace_without_backward(
    loaded: LoadedModel,
    documents: Sequence[EncodedDocument],
    *,
    compensation: Compensation | None,
    tokens: int,
    tokens_per_batch: int = 4096,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> RoutingTrace:
    """What `fit_damage` needs, from one pass over the text and L + 1 over a small part of it.

    Args:
        loaded: the model.
        documents: calibration text.
        compensation: also take the changes with this in place.
        tokens: at most so many.
        tokens_per_batch: padded tokens per forward.
        seed: draws the documents.
        progress: called with tokens done and in all.
    """
    chosen = list(drawn(documents, tokens, seed).values())
    session = _Sizes(open_backend("sorted"), compensation)
    total, done, parts = sum(len(document.ids) for document in chosen), 0, []
    with dispatched(loaded.model, session), torch.no_grad():
        for rows in batches(chosen, tokens_per_batch, window=loaded.window):
            batch = collate(rows)
            session.begin(batch)
            forward(loaded.model, batch, torch.device(loaded.device), logits_to_keep=1)
            named = {k: torch.stack([row[k] for row in session.rows]) for k in session.rows[0]}
            parts.append({"ids": batch.ids[batch.counted], **named})
            done += len(parts[-1]["ids"])
            if progress:
                progress(done, total)
    columns = joined(parts)
    few = list(drawn(documents, min(tokens, SENSITIVITY_TOKENS), seed).values())
    small = sum(len(document.ids) for document in few)
    for kind, given in (("damage.cut", None), ("damage.cut_compensated", compensation)):
        if kind in columns:
            squares = columns[kind][:, :, 0].double().square().mean(dim=1) * small  # (L,)
            sensitivity = _rises(loaded, few, given) / squares.clamp(min=1e-12)
            sensitivity = sensitivity.clamp(min=_LEAST * float(sensitivity.abs().mean()))
            # So that half the square is the damage, as with g . d.
            columns[kind] *= (2 * sensitivity).sqrt().float()[:, None, None]
    head = {
        **identity(loaded),
        "compensation_hash": None if compensation is None else compensation.hash,
        "starts": [0, len(columns["ids"])],
        "documents": [0],
    }
    return RoutingTrace.of(columns, head)


def _rises(
    loaded: LoadedModel, documents: Sequence[EncodedDocument], compensation: Compensation | None
) -> Tensor:
    """Rise of the summed loss, in nats, when one layer runs first experts alone. (L,)"""

    def loss(layer: int) -> float:
        policy = _OneLayer(layer, compensation)
        with routed(loaded.model, policy, backend="sorted") as session:
            losses = document_losses(loaded.model, documents, window=loaded.window, session=session)
        return float(losses.nll.sum())

    unchanged = loss(loaded.moe_layers)  # no layer has that number: none is cut
    rises = [loss(layer) - unchanged for layer in range(loaded.moe_layers)]
    return torch.tensor(rises, dtype=torch.float64)
