"""Text as documents, the unit of independence: loading a split, and tokenising it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from var_moe.errors import UsageError
from var_moe.evaluation.documents import (
    EncodedDocument,
    TextDocument,
    TextSplit,
    text_column,
)
from var_moe.evaluation.splitting import SPLITS

__all__ = [
    "SPLITS",
    "EncodedDocument",
    "TextDocument",
    "TextSplit",
    "as_documents",
    "check_dataset",
    "encode",
    "load_text",
    "require_documents",
    "text_column",
]

MIN_TOKENS = 2  # the first token of a document has no loss


def check_dataset(dataset: str) -> None:
    """Refuse an unknown, missing or unreachable data set in a moment, reading nothing.

    For a command to call first: loading the model before the text would hide a refusal for
    seconds.

    Raises:
        UsageError: as `load_text`, as far as it shows without reading.
    """
    from var_moe.evaluation.sources import check

    check(dataset)


def load_text(
    dataset: str, split: str, *, max_documents: int | None = None, seed: int | None = 0
) -> TextSplit:
    """Load one split of a data set.

    Args:
        dataset: ``demo``, ``demo-postgres``, ``demo-python``, ``demo-wordnet``, ``demo-kjv``;
            ``wikitext``; another Hub data set as ``name[:config]``; a .txt, .jsonl or .parquet
            file; a folder with files named after the splits; or several of these as ``a,b,c``.
        split: ``calibration``, ``validation``, ``certify`` or ``test``; ``all`` for the whole
            of a file or a Hub data set; for a Hub data set also one of its own by name.
        max_documents: take a random subset of so many, in the order of the text; the subset of
            a smaller number is part of that of a larger one.
        seed: draws the subset; the same seed draws the same one.

    Raises:
        UsageError: it is missing, out of reach, of another form, or empty.
    """
    from var_moe.evaluation.sources import load

    found = load(dataset, split)
    if not found.documents:
        raise UsageError(f"{dataset}: no text in split {split!r}; expected non-empty documents")
    return replace(found, documents=tuple(_subset(found.documents, max_documents, seed)))


def encode(
    documents: TextSplit | Sequence[TextDocument],
    tokenizer: Any,
    *,
    max_documents: int | None = None,
    seed: int | None = 0,
    min_tokens: int = MIN_TOKENS,
    max_tokens: int | None = None,
) -> list[EncodedDocument]:
    """Tokenise documents as the tokenizer does a text of its own, special tokens included.

    Args:
        documents: a split, or documents.
        tokenizer: a transformers tokenizer.
        max_documents: take a random subset of so many, as `load_text` does, before tokenising.
        seed: draws the subset.
        min_tokens: shorter documents are dropped; one token alone has no loss.
        max_tokens: longer documents are cut to their first ``max_tokens``; None keeps all.

    Raises:
        UsageError: ``max_documents`` or ``max_tokens`` is below 1.
    """
    chosen = documents.documents if isinstance(documents, TextSplit) else documents
    chosen = _subset(chosen, max_documents, seed)
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"max_tokens = {max_tokens}: expected at least 1")
    if not chosen:
        return []
    ids = tokenizer(
        [document.text for document in chosen], return_attention_mask=False, verbose=False
    )["input_ids"]
    return [
        EncodedDocument(
            document.id,
            document.source,
            np.asarray(row[:max_tokens], dtype=np.int64),
            document.dataset,
        )
        for document, row in zip(chosen, ids, strict=True)
        if len(row) >= min_tokens
    ]


def _subset(
    documents: Sequence[TextDocument], at_most: int | None, seed: int | None
) -> Sequence[TextDocument]:
    if at_most is None:
        return documents
    if at_most < 1:
        raise UsageError(f"max_documents = {at_most}: expected at least 1")
    if at_most >= len(documents):
        return documents
    drawn = np.random.default_rng(seed).permutation(len(documents))[:at_most]
    return [documents[i] for i in sorted(drawn)]


def as_documents(data: Any, tokenizer: Any) -> list[EncodedDocument]:
    """Documents from what the documented API takes; what is shorter than two tokens is dropped.

    Args:
        data: a list of texts; a datasets.Dataset with a column of texts (or ``input_ids``); or
            token ids without padding: a 2-D tensor or array, whose rows are documents, a list
            of such, of 1-D ones, or of a tokenizer's outputs, or a single 1-D one. Where a
            tokenizer's output has an ``attention_mask``, padding is left out by it.
        tokenizer: used for texts.

    Raises:
        UsageError: it is none of these, or nothing in it has two tokens.
    """
    from var_moe.evaluation.given import given_rows

    rows = given_rows(data)
    texts = [TextDocument(str(i), "given", row) for i, row in enumerate(rows) if _is_text(row)]
    if texts:
        documents = encode([text for text in texts if text.text.strip()], tokenizer)
    else:
        documents = [
            EncodedDocument(str(i), "given", ids)
            for i, ids in enumerate(rows)
            if len(ids) >= MIN_TOKENS
        ]
    if not documents:
        raise UsageError(
            f"validation_data: none of its {len(rows)} documents has {MIN_TOKENS} tokens or more"
        )
    return documents


def _is_text(row: Any) -> bool:
    return isinstance(row, str)


def require_documents(documents: Sequence[Any], needed: int, step: str) -> None:
    """Refuse too little text.

    Raises:
        UsageError: names the number of documents, the number needed, and what for.
    """
    if len(documents) < needed:
        raise UsageError(
            f"too few documents for {step}: {len(documents)}, at least {needed} needed"
        )
