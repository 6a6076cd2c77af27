"""Text as documents, the unit of independence: loading a split, and tokenising it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from var_moe.config import check_count, check_seed
from var_moe.data.columns import with_column
from var_moe.data.documents import (
    EncodedDocument,
    TextDocument,
    TextSplit,
)
from var_moe.data.splitting import SPLITS
from var_moe.errors import UsageError
from var_moe.models.hub import one_line

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
]

MIN_TOKENS = 2  # the first token of a document has no loss


def check_dataset(dataset: str) -> None:
    """Refuse an unknown, missing or unreachable data set in a moment, reading nothing.

    For a command to call first: loading the model before the text would hide a refusal for
    seconds.

    Raises:
        UsageError: as `load_text`, as far as it shows without reading.
    """
    from var_moe.data.sources import check

    check(dataset)


def load_text(
    dataset: str | Path,
    split: str,
    *,
    text_column: str | None = None,
    max_documents: int | None = None,
    seed: int | None = 0,
) -> TextSplit:
    """Load one split of a data set.

    Args:
        dataset: ``demo``, ``demo-postgres``, ``demo-python``, ``demo-wordnet``, ``demo-kjv``;
            ``wikitext``; another Hub data set as ``name[:config]``; a .txt, .jsonl or .parquet
            file; a folder with files named after the splits; or several of these as ``a,b,c``.
            ``name::column`` names the column of a table that holds the text.
        split: ``calibration``, ``validation``, ``certify`` or ``test``; ``all`` for the whole
            of a file or a Hub data set; for a Hub data set also one of its own by name.
        text_column: the same as ``name::column``, for every data set of the name.
        max_documents: take a random subset of so many, in the order of the text; the subset of
            a smaller number is part of that of a larger one.
        seed: draws the subset; the same seed draws the same one.

    Raises:
        UsageError: it is missing, out of reach, of another form, or empty.
    """
    from var_moe.data.sources import load

    dataset = with_column(os.fspath(dataset), text_column)
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

    Chats are rendered with the tokenizer's chat template; token ids are taken as they are.

    Args:
        documents: a split, or documents.
        tokenizer: a transformers tokenizer.
        max_documents: take a random subset of so many, as `load_text` does, before tokenising.
        seed: draws the subset.
        min_tokens: shorter documents are dropped; one token alone has no loss.
        max_tokens: longer documents are cut to their first ``max_tokens``; None keeps all.

    Raises:
        UsageError: ``max_documents`` or ``max_tokens`` is below 1; or there are chats, and no
            chat template that takes them.
    """
    chosen = documents.documents if isinstance(documents, TextSplit) else documents
    chosen = _subset(chosen, max_documents, seed)
    check_count("max_tokens", max_tokens)
    ids = _token_ids(chosen, tokenizer)
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


def _token_ids(documents: Sequence[TextDocument], tokenizer: Any) -> list[list[int]]:
    """Each document's ids, by what its column holds."""
    found: list[list[int]] = [[]] * len(documents)
    kinds = [document.column.kind if document.column else "text" for document in documents]
    for kind in ("text", "chat"):
        places = [at for at, other in enumerate(kinds) if other == kind]
        if places:
            texts = [documents[at].text for at in places]
            if kind == "chat":
                texts = [rendered(documents[at], tokenizer) for at in places]
            # A chat template writes the special tokens itself.
            special = {} if kind == "text" else {"add_special_tokens": False}
            rows = tokenizer(texts, return_attention_mask=False, verbose=False, **special)
            for at, row in zip(places, rows["input_ids"], strict=True):
                found[at] = row
    for at, kind in enumerate(kinds):
        if kind == "ids":
            found[at] = json.loads(documents[at].text)
    return found


def rendered(document: TextDocument, tokenizer: Any) -> str:
    """A chat as text, by the tokenizer's chat template.

    Raises:
        UsageError: there is no template, or it does not take the chat.
    """
    column = document.column
    where = " ".join(filter(None, [document.dataset, f"document {document.id}"]))
    if column and not getattr(tokenizer, "chat_template", None):
        others = ", ".join(column.others) or "no other"
        raise UsageError(
            f"{where}: column {column.name!r} holds chats, and the tokenizer has no chat template; "
            f"--text_column names another column; beside it there is {others}"
        )
    try:
        return str(tokenizer.apply_chat_template(json.loads(document.text), tokenize=False))
    except Exception as error:  # whatever a template raises
        raise UsageError(
            f"{where}: the tokenizer's chat template does not take it ({one_line(error)})"
        ) from None


def _subset(
    documents: Sequence[TextDocument], at_most: int | None, seed: int | None
) -> Sequence[TextDocument]:
    if at_most is None:
        return documents
    check_count("max_documents", at_most)
    if at_most >= len(documents):
        return documents
    drawn = np.random.default_rng(check_seed(seed)).permutation(len(documents))[:at_most]
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
    from var_moe.data.given import given_rows, given_table

    texts = given_table(data)
    rows = texts if texts is not None else given_rows(data)
    if texts is None and isinstance(rows[0], str):
        texts = [TextDocument(str(i), "given", row) for i, row in enumerate(rows)]
    if texts is not None:
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


def require_documents(documents: Sequence[Any], needed: int, step: str) -> None:
    """Refuse too little text.

    Raises:
        UsageError: names the number of documents, the number needed, and what for.
    """
    if len(documents) < needed:
        raise UsageError(
            f"too few documents for {step}: {len(documents)}, at least {needed} needed"
        )
