"""Per-document losses of the demo model, in plain transformers (no part of var_moe)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.inference_mode()
def document_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 16,
) -> tuple[np.ndarray, np.ndarray]:
    """Summed negative log-likelihood (nats, float64) and scored tokens of each text.

    Each text is scored alone, after one `<|endoftext|>`; that first token has no loss.
    """
    encoded = [torch.tensor(tokenizer(text).input_ids) for text in texts]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    losses = np.zeros(len(encoded))
    counts = np.array([len(ids) - 1 for ids in encoded])
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = [encoded[i] for i in chosen]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, S)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            mask[row, : len(tokens)] = 1
        logits = model(
            input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=False
        ).logits
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
        )  # (B * (S - 1),)
        loss = loss.view(len(rows), -1) * mask[:, 1:]
        losses[chosen] = loss.double().sum(dim=1).numpy()
    return losses, counts


def perplexity(losses: np.ndarray, counts: np.ndarray) -> float:
    """exp of the mean loss per token over all documents."""
    return float(np.exp(losses.sum() / counts.sum()))
