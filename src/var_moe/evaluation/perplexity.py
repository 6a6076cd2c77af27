"""Perplexity: summed loss per document, in float64; never a mean of batch means."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from var_moe.data.documents import check_encoded
from var_moe.errors import UsageError, VarMoeError
from var_moe.evaluation.batching import Window, batches, collate

if TYPE_CHECKING:
    from var_moe.data.documents import EncodedDocument
    from var_moe.execution.session import Session

_LOGITS_BYTES = 256 * 2**20  # float32 logits held at once


@dataclass(frozen=True)
class DocumentLosses:
    """Summed negative log-likelihood (nats) and scored tokens of each document."""

    nll: np.ndarray  # (N,) float64
    tokens: np.ndarray  # (N,) int64

    @property
    def perplexity(self) -> float:
        """exp of the mean loss over all scored tokens."""
        return math.exp(float(self.nll.sum()) / int(self.tokens.sum()))


def document_losses(
    model: Any,
    documents: Sequence[EncodedDocument],
    *,
    window: int,
    session: Session | None = None,
    tokens_per_batch: int = 4096,
    progress: Callable[[int, int], None] | None = None,
    stop: Callable[[DocumentLosses], bool] | None = None,
) -> DocumentLosses:
    """Score every document, each in its own row; its first token has no loss.

    Args:
        model: a causal language model, routed or not.
        documents: the text.
        window: longest row; longer documents are cut into windows that overlap by a quarter,
            where the overlap gives context and is not scored again.
        session: the routing session, if the model is routed: it is told which tokens count.
        tokens_per_batch: padded tokens per forward.
        progress: called with documents done and documents in all.
        stop: asked after each batch with the losses so far (a document may be scored in part);
            True ends the scoring there.

    Raises:
        UsageError: there is nothing to score.
        VarMoeError: a loss is not finite.
    """
    check_encoded(documents)
    if not any(len(document.ids) > 1 for document in documents):
        raise UsageError("no text to score: expected at least one document of two tokens")
    device = next(model.parameters()).device
    before = session.policy.ids_before if session is not None else 0
    nll = np.zeros(len(documents))
    tokens = np.zeros(len(documents), dtype=np.int64)
    done = 0
    with torch.inference_mode():
        for rows in batches(documents, tokens_per_batch, window=window, prefix=before):
            batch = collate(rows)
            if session is not None:
                session.announce(batch)
            ids = batch.ids.to(device)
            logits = model(
                input_ids=ids, attention_mask=batch.valid.long().to(device), use_cache=False
            ).logits
            losses = _token_losses(logits, ids)
            _add(nll, tokens, rows, losses.double().cpu().numpy())
            done += len({row.document for row in rows})
            if progress:
                progress(min(done, len(documents)), len(documents))
            if stop and stop(DocumentLosses(nll=nll, tokens=tokens)):
                break
    if not np.isfinite(nll).all():
        bad = documents[int(np.flatnonzero(~np.isfinite(nll))[0])]
        raise VarMoeError(f"document {bad.id!r}: the loss is not finite; try --dtype float32")
    return DocumentLosses(nll=nll, tokens=tokens)


def _token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Loss of token s + 1 at position s, in float32. (B, S - 1)"""
    batch, width, vocabulary = logits.shape
    flat = logits[:, :-1].reshape(-1, vocabulary)
    target = ids[:, 1:].reshape(-1).to(logits.device)
    step = max(1, _LOGITS_BYTES // (4 * vocabulary))
    parts = [
        torch.nn.functional.cross_entropy(
            flat[at : at + step].float(), target[at : at + step], reduction="none"
        )
        for at in range(0, flat.shape[0], step)
    ]
    return torch.cat(parts).view(batch, width - 1) if parts else logits.new_zeros((batch, 0))


def _add(nll: np.ndarray, tokens: np.ndarray, rows: list[Window], losses: np.ndarray) -> None:
    """Sum each row's scored tokens: not the first of a document, not the overlap."""
    for number, row in enumerate(rows):
        first = max(row.overlap, 1) - 1
        last = len(row.ids) - 1
        nll[row.document] += losses[number, first:last].sum()
        tokens[row.document] += max(0, last - first)


def perplexity(
    model: Any, documents: Sequence[EncodedDocument], *, window: int, **options: Any
) -> float:
    """Perplexity of ``model`` on ``documents``; see `document_losses` for the arguments."""
    return document_losses(model, documents, window=window, **options).perplexity
