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
from torch import Tensor

from var_moe.calibration.statistics import rescaled_change
from var_moe.evaluation.batching import batches, drawn
from var_moe.evaluation.perplexity import document_losses
from var_moe.execution.session import routed
from var_moe.models.identity import identity
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.compensation import Compensation
from var_moe.routing.decision import ForwardContext, Routing
from var_moe.routing.keeping import all_pairs, kept_pairs, leading_slots
from var_moe.tracing.all_pairs import LayerDecisions
from var_moe.tracing.record import Recorder
from var_moe.tracing.trace import RoutingTrace, joined

if TYPE_CHECKING:
    from var_moe.data.documents import EncodedDocument
    from var_moe.models.loading import LoadedModel

SENSITIVITY_TOKENS = 16_000
"""Tokens on which the layers' sensitivities are measured."""
_LEAST = 1e-6  # of the mean sensitivity: a layer that seems not to matter still ranks its cuts


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

    At most ``tokens`` of the documents are drawn with ``seed``; changes with ``compensation`` in
    place are taken, too.
    """
    chosen = list(drawn(documents, tokens, seed).values())
    forwards = list(batches(chosen, tokens_per_batch, window=loaded.window))
    parts = _Sizes(loaded, compensation).record(forwards, progress=progress)
    columns = joined(parts, sum(len(part["ids"]) for part in parts))
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


class _Sizes(Recorder):
    """Also notes how far each cut moves a layer's output."""

    def __init__(self, loaded: LoadedModel, compensation: Compensation | None) -> None:
        super().__init__(loaded, "sorted", hidden=True)
        self._compensation = compensation

    def columns(self, decided: LayerDecisions) -> dict[str, Tensor]:
        outputs, weight = decided.ranked_outputs.float(), decided.weight.float()
        noted = super().columns(decided)
        noted["damage.cut"] = rescaled_change(outputs, weight)[:, :-1].norm(dim=2)
        if self._compensation is None:
            return noted
        hidden = decided.hidden[decided.at].float()
        part = self._compensation.layers[decided.layer].to(hidden.device, torch.float32)
        rows = self._compensation.rows(decided.index, decided.index[:, 0])
        each, changes = outputs * weight[:, :, None], []
        for kept in range(1, weight.shape[1]):
            dropped = weight.clone()
            dropped[:, :kept] = 0
            change = part.add(-each[:, kept:].sum(1), hidden, rows, dropped)
            changes.append(change.norm(dim=1))
        noted["damage.cut_compensated"] = torch.stack(changes, dim=1)
        return noted


class _OneLayer(RoutingPolicy):
    """Runs only the first expert in one layer, and everything in the others."""

    def __init__(self, layer: int, compensation: Compensation | None) -> None:
        self._layer, self.compensation = layer, compensation

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        if layer != self._layer:
            return all_pairs(index, weight)
        return kept_pairs(index, weight, leading_slots(index, weight, 1))


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
