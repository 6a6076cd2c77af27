"""From documents to padded batches: windows of long documents, rows of similar length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from var_moe.config import check_seed
from var_moe.errors import UsageError
from var_moe.routing.decision import ForwardContext

if TYPE_CHECKING:
    from var_moe.data.documents import EncodedDocument
    from var_moe.execution.session import Session


_GOLDEN = (5**0.5 - 1) / 2  # whose multiples fall between each other


@dataclass(frozen=True)
class Window:
    """A row of a batch: a document, or a part of one that is longer than the window."""

    document: int  # position among the documents given
    ids: np.ndarray  # (S,) int64
    prefix: np.ndarray  # ids just before it, so that context keys span the document
    overlap: int  # leading tokens that the previous window has counted already


def drawn(
    documents: Sequence[EncodedDocument], max_tokens: int | None, seed: int
) -> dict[int, EncodedDocument]:
    """A random sample of ``max_tokens`` tokens: documents by position, in random order.

    The last one is cut to the tokens that are left, or left out if that is one token, which has
    no loss. None takes all documents in their own order.
    """
    if max_tokens is None:
        return dict(enumerate(documents))
    sample: dict[int, EncodedDocument] = {}
    for at in np.random.default_rng(check_seed(seed)).permutation(len(documents)).tolist():
        ids = documents[at].ids[:max_tokens]
        if max_tokens < 2 and sample:
            break
        sample[at] = replace(documents[at], ids=ids)
        max_tokens -= len(ids)
    return sample


def windows(document: int, ids: np.ndarray, window: int, *, prefix: int = 0) -> list[Window]:
    """Cut a document into windows that overlap by a quarter."""
    overlap, start = window // 4, 0
    cut = [Window(document, ids[:window], ids[:0], 0)]
    while start + window < len(ids):
        start += window - overlap
        before = ids[max(0, start - prefix) : start]
        cut.append(Window(document, ids[start : start + window], before, overlap))
    return cut


def batches(
    documents: Sequence[EncodedDocument], tokens_per_batch: int, *, window: int, prefix: int = 0
) -> Iterator[list[Window]]:
    """Rows of similar length, at most ``tokens_per_batch`` padded tokens, in a mixed order.

    The order depends on the documents alone, so a pass repeats exactly. It is mixed so that a
    cache that documents share does not meet them by length. Windows of one document stay together,
    in order; each knows up to ``prefix`` ids before it.
    """
    order = sorted(range(len(documents)), key=lambda i: -min(len(documents[i].ids), window))
    chains: list[list[list[Window]]] = []
    for rows in in_order(documents, order, tokens_per_batch, window=window, prefix=prefix):
        if chains and chains[-1][-1][-1].document == rows[0].document:
            chains[-1].append(rows)  # goes on with a document
        else:
            chains.append([rows])
    for number in np.random.default_rng(len(chains)).permutation(len(chains)):
        yield from chains[number]


def in_order(
    documents: Sequence[EncodedDocument],
    order: Iterable[int],
    tokens_per_batch: int,
    *,
    window: int,
    prefix: int = 0,
) -> Iterator[list[Window]]:
    """Batches of at most ``tokens_per_batch`` padded tokens, documents in the given order.

    Raises:
        UsageError: the window is below 4 tokens.
    """
    if window < 4:
        raise UsageError(f"window of {window} tokens: expected at least 4")
    rows: list[Window] = []
    width = 0
    for number in order:
        ids = np.asarray(documents[number].ids, dtype=np.int64)
        for cut in windows(number, ids, window, prefix=prefix):
            width = max(width, len(cut.ids))
            if rows and width * (len(rows) + 1) > tokens_per_batch:
                yield rows
                rows, width = [], len(cut.ids)
            rows.append(cut)
    if rows:
        yield rows


def collate(rows: Sequence[Window]) -> ForwardContext:
    """Pad on the right; ids, masks, documents and prefixes as one ForwardContext."""
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.int64)
    valid = torch.zeros((len(rows), width), dtype=torch.bool)
    counted = torch.zeros((len(rows), width), dtype=torch.bool)
    longest = max(len(row.prefix) for row in rows)
    prefix = torch.full((len(rows), longest), -1, dtype=torch.int64)
    for number, row in enumerate(rows):
        size = len(row.ids)
        ids[number, :size] = torch.from_numpy(row.ids)
        valid[number, :size] = True
        counted[number, row.overlap : size] = True
        if len(row.prefix):
            prefix[number, -len(row.prefix) :] = torch.from_numpy(row.prefix)
    return ForwardContext(
        ids=ids,
        valid=valid,
        counted=counted,
        document=tuple(row.document for row in rows),
        prefix=prefix if longest else None,
    )


def logits_of(
    model: Any, batch: ForwardContext, session: Session | None = None, **options: Any
) -> Tensor:
    """Logits (B, S, V) of one forward, of which the routing session is told beforehand."""
    if session is not None:
        session.announce(batch)
    device = next(model.parameters()).device
    ids, mask = batch.ids.to(device), batch.valid.long().to(device)
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
    return logits


def full_batches(
    documents: Sequence[EncodedDocument],
    *,
    batch_size: int,
    sequence: int,
    forwards: int = 1,
    blocks: int = 1,
    turn: int = 0,
) -> list[Tensor]:
    """Batches (B, S) without padding for timed blocks, ``forwards`` for each in its order.

    Documents stand end to end. A block's rows start evenly spaced over all of them, so that a
    sorted file is timed on all its parts, and other blocks' rows start between them. Where the
    text is short, rows overlap.

    Args:
        documents: the text.
        batch_size, sequence: B and S.
        forwards: batches of a block.
        blocks: timed blocks.
        turn: another number gives other rows of the same text.

    Raises:
        UsageError: there is less than one row of text.
    """
    joined = np.concatenate([np.asarray(document.ids, dtype=np.int64) for document in documents])
    if len(joined) < sequence:
        raise UsageError(
            f"text of {len(joined)} tokens is shorter than one row of {sequence} tokens that "
            "throughput is measured on; give more text"
        )
    last = len(joined) - sequence
    count = batch_size * forwards
    starts = np.linspace(0, last, count * blocks).astype(np.int64)
    shift = round(turn * last / (count * blocks) * _GOLDEN)  # between the rows of other turns
    starts = (starts + shift) % (last + 1)
    rows = joined[starts.reshape(count, blocks).T.reshape(-1, 1) + np.arange(sequence)]
    return list(torch.from_numpy(rows).view(blocks * forwards, batch_size, sequence))
