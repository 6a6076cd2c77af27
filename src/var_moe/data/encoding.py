"""Token ids: of documents, of what the documented API takes, and whether a model takes them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from var_moe.config import check_count
from var_moe.data.columns import table_texts
from var_moe.data.documents import EncodedDocument, TextDocument, TextSplit
from var_moe.errors import UsageError, one_line

MIN_TOKENS = 2  # the first token of a document has no loss

_LOG = logging.getLogger(__name__)
_EXPECTED = (
    "expected a non-empty list of texts, a datasets.Dataset with a text column, or token ids"
)


def encode(
    documents: TextSplit | Sequence[TextDocument],
    tokenizer: Any,
    *,
    max_tokens: int | None = None,
) -> list[EncodedDocument]:
    """Tokenise each document by itself, special tokens included.

    Chats are rendered with the tokenizer's chat template; token ids are taken as they are.
    Documents of fewer than two tokens have no loss and are dropped.

    Args:
        documents: a split, or documents.
        tokenizer: a transformers tokenizer.
        max_tokens: longer documents are cut to their first ``max_tokens``; None keeps all.

    Raises:
        UsageError: ``max_tokens`` is below 1; or there are chats, and no chat template that takes
            them.
    """
    chosen = documents.documents if isinstance(documents, TextSplit) else documents
    check_count("max_tokens", max_tokens)
    return [
        EncodedDocument(
            document.id,
            document.source,
            np.asarray(row[:max_tokens], dtype=np.int64),
            document.dataset,
        )
        for document, row in zip(chosen, _token_ids(chosen, tokenizer), strict=True)
        if len(row) >= MIN_TOKENS
    ]


def _token_ids(documents: Sequence[TextDocument], tokenizer: Any) -> list[list[int]]:
    """Each document's ids, by what its column holds."""
    kinds = [document.column.kind if document.column else "text" for document in documents]
    rows: dict[int, list[int]] = {
        at: json.loads(documents[at].text) for at, kind in enumerate(kinds) if kind == "ids"
    }
    texts = {at: documents[at].text for at, kind in enumerate(kinds) if kind == "text"}
    chats = {
        at: _rendered(documents[at], tokenizer) for at, kind in enumerate(kinds) if kind == "chat"
    }
    # A chat template writes the special tokens itself.
    for some, special in ((texts, {}), (chats, {"add_special_tokens": False})):
        if some:
            given = list(some.values())
            ids = tokenizer(given, return_attention_mask=False, verbose=False, **special).input_ids
            rows.update(zip(some, ids, strict=True))
    return [rows[at] for at in range(len(documents))]


def _rendered(document: TextDocument, tokenizer: Any) -> str:
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


# -- what the documented API takes -----------------------------------------------------------


def as_documents(data: Any, tokenizer: Any) -> list[EncodedDocument]:
    """Documents from what the documented API takes; those of fewer than two tokens are dropped.

    Args:
        data: a list of texts; a datasets.Dataset with a column of texts (or ``input_ids``); or
            token ids without padding: a 2-D tensor or array, whose rows are documents, a list
            of such, of 1-D ones, or of a tokenizer's outputs, or a single 1-D one. Where a
            tokenizer's output has an ``attention_mask``, padding is left out by it.
        tokenizer: used for texts.

    Raises:
        UsageError: it is none of these, or nothing in it has two tokens.
    """
    rows: Sequence[Any]
    if getattr(data, "column_names", None) is not None:
        rows = _table_documents(data)
    else:
        rows = _given_rows(data)
        if isinstance(rows[0], str):
            rows = [TextDocument(str(i), "given", row) for i, row in enumerate(rows)]
    if rows and isinstance(rows[0], TextDocument):
        documents = encode([row for row in rows if row.text.strip()], tokenizer)
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


def _table_documents(data: Any) -> list[TextDocument]:
    """The documents of a datasets.Dataset.

    Raises:
        UsageError: it has splits, or no column that is clearly the text.
    """
    if isinstance(data.column_names, Mapping):  # a DatasetDict
        splits = ", ".join(map(str, data.column_names))
        raise UsageError(f"validation_data: expected one split of the data set, of {splits}")
    texts, column = table_texts(data, "validation_data", hint="give select_columns of one of them")
    return [TextDocument(str(i), "given", text, column=column) for i, text in enumerate(texts)]


def _given_rows(data: Any) -> list[Any]:
    """One row per document: all of them texts, or all of them ids (S,) int64.

    Raises:
        UsageError: it is neither, or empty; names the first row that does not fit.
    """
    if hasattr(data, "tolist") and isinstance(listed := data.tolist(), list):
        if not listed or not isinstance(listed[0], str):  # an array of texts is a list of them
            return _given_ids(data, "validation_data")
        data = listed
    if isinstance(data, Mapping):
        return _given_ids(data, "validation_data")
    # A number is an array without dimensions: it has __iter__ and can't be iterated.
    listable = hasattr(data, "__iter__") and not isinstance(data, str | bytes)
    rows = list(data) if listable and not hasattr(data, "tolist") else []
    if not rows:
        raise UsageError(f"validation_data: {_EXPECTED}, got {_what(data)}")
    if isinstance(rows[0], str):
        for number, row in enumerate(rows):
            if not isinstance(row, str):
                raise UsageError(f"validation_data[{number}]: expected a text, got {_what(row)}")
        return rows
    if isinstance(rows[0], int | np.integer):  # a flat list is one document
        return _given_ids(rows, "validation_data")
    return [ids for i, row in enumerate(rows) for ids in _given_ids(row, f"validation_data[{i}]")]


def _given_ids(row: Any, where: str) -> list[np.ndarray]:
    """The documents (S,) of a 1-D or 2-D row of token ids, or of a tokenizer's output."""
    mask = None
    if isinstance(row, Mapping):
        row, mask = row.get("input_ids"), row.get("attention_mask")
        if isinstance(row, list | tuple) and row and isinstance(row[0], list | tuple):
            masks = [None] * len(row) if mask is None else list(mask)
            pairs = [{"input_ids": r, "attention_mask": m} for r, m in zip(row, masks, strict=True)]
            return [ids for pair in pairs for ids in _given_ids(pair, where)]
    try:
        ids = np.asarray(row.tolist() if hasattr(row, "tolist") else row)
    except (TypeError, ValueError):  # ragged, or no numbers at all
        raise UsageError(f"{where}: expected a text or token ids, got {_what(row)}") from None
    if ids.size == 0 and ids.ndim == 1:
        ids = ids.astype(np.int64)  # an empty document, which numpy takes for floats
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        raise UsageError(f"{where}: expected a text or token ids, got {_what(row)}")
    if ids.size and ids.min() < 0:
        raise UsageError(f"{where}: expected token ids from 0, got {ids.min()}")
    rows = np.atleast_2d(ids.astype(np.int64))  # (documents, S)
    if mask is None:
        return list(rows)
    kept = np.atleast_2d(np.asarray(mask.tolist() if hasattr(mask, "tolist") else mask)) != 0
    return [ids[keep] for ids, keep in zip(rows, kept, strict=True)]


def _what(value: Any) -> str:
    kind = type(value).__name__
    shape = getattr(value, "shape", None)
    return kind if shape is None else f"{kind} of shape {tuple(shape)} and {value.dtype}"


# -- what a model takes ----------------------------------------------------------------------


def check_documents(
    documents: Sequence[EncodedDocument], model: Any, tokenizer: Any, where: str
) -> str:
    """Refuse ids that the model cannot embed; return, and log, a note on doubled start tokens.

    Raises:
        UsageError: as `check_ids`.
    """
    for document in documents:
        check_ids(document.ids, model, tokenizer, where)
    start = getattr(tokenizer, "bos_token_id", None)
    twice = sum(
        start is not None and bool((document.ids[:2] == start).all()) for document in documents
    )
    if not twice:
        return ""
    note = (
        f"{twice} of {len(documents)} documents begin with the start token "
        f"{tokenizer.bos_token!r} twice, which changes perplexity: leave it out of the text"
    )
    _LOG.warning("%s: %s", where, note)
    return note


def check_ids(ids: Any, model: Any, tokenizer: Any, where: str) -> None:
    """Refuse token ids at or beyond the rows of the model's embedding.

    Only ids that occur count: tokenizers of released models often have fewer or more entries
    than the embedding has rows.

    Raises:
        UsageError: names the token, its id and both sizes.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    highest = int(np.max(ids, initial=-1))
    if highest < rows:
        return
    token = tokenizer.convert_ids_to_tokens(highest) if highest < len(tokenizer) else None
    named = f"token {token!r} has id {highest}" if token else f"there is a token id {highest}"
    raise UsageError(
        f"{where}: {named}, and the model's embedding has {rows} rows (the tokenizer has "
        f"{len(tokenizer)} tokens): use the model's own tokenizer, or resize_token_embeddings"
    )
