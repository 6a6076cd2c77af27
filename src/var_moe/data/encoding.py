"""Token ids: of documents, of what the documented API takes, and whether a model takes them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from var_moe.data.columns import table_texts
from var_moe.data.documents import EncodedDocument, TextDocument, TextSplit
from var_moe.errors import UsageError, one_line

MIN_TOKENS = 2  # the first token of a document has no loss

_LOG = logging.getLogger(__name__)


def encode(documents: TextSplit | Sequence[TextDocument], tokenizer: Any) -> list[EncodedDocument]:
    """Tokenise each document by itself, special tokens included.

    Chats are rendered with the tokenizer's chat template; token ids are taken as they are.
    Documents of fewer than two tokens have no loss and are dropped.

    Raises:
        UsageError: there are chats, and no chat template that takes them.
    """
    chosen = documents.documents if isinstance(documents, TextSplit) else documents
    return [
        EncodedDocument(
            document.id, document.source, np.asarray(row, dtype=np.int64), document.dataset
        )
        for document, row in zip(chosen, _token_ids(chosen, tokenizer), strict=True)
        if len(row) >= MIN_TOKENS
    ]


def _token_ids(documents: Sequence[TextDocument], tokenizer: Any) -> list[list[int]]:
    """Each document's ids, by what its column holds."""
    rows: dict[int, list[int]] = {}
    texts: dict[int, str] = {}
    chats: dict[int, str] = {}
    for at, document in enumerate(documents):
        kind = document.column.kind if document.column else "text"
        if kind == "ids":
            rows[at] = json.loads(document.text)
        elif kind == "chat":
            chats[at] = _rendered(document, tokenizer)
        else:
            texts[at] = document.text
    # A chat template writes the special tokens itself.
    for some, special in ((texts, {}), (chats, {"add_special_tokens": False})):
        if some:
            given = list(some.values())
            ids = tokenizer(given, return_attention_mask=False, verbose=False, **special).input_ids
            rows.update(zip(some, ids, strict=True))
    return [rows[at] for at in range(len(documents))]


def _rendered(document: TextDocument, tokenizer: Any) -> str:
    """A chat as text, by the tokenizer's chat template."""
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
            token ids without padding: those of one document, of several, or a tokenizer's
            output, whose ``attention_mask`` leaves padding out.
        tokenizer: used for texts.

    Raises:
        UsageError: it is none of these, or nothing in it has two tokens.
    """
    where = "validation_data"
    if isinstance(getattr(data, "column_names", None), Mapping):  # a DatasetDict
        splits = ", ".join(map(str, data.column_names))
        raise UsageError(f"{where}: expected one split of the data set, of {splits}")
    if getattr(data, "column_names", None) is not None:
        texts, column = table_texts(data, where)
    else:
        if not isinstance(data, Mapping | str | bytes) and hasattr(data, "__iter__"):
            data = data.tolist() if hasattr(data, "tolist") else list(data)
        texts, column = _texts(data, where), None
    if texts:
        listed = [TextDocument(str(i), "given", t, column=column) for i, t in enumerate(texts)]
        documents = encode([one for one in listed if one.text.strip()], tokenizer)
        count = len(texts)
    else:
        rows = _id_rows(data, where)
        documents = [
            EncodedDocument(str(i), "given", ids)
            for i, ids in enumerate(rows)
            if len(ids) >= MIN_TOKENS
        ]
        count = len(rows)
    if not documents:
        raise UsageError(
            f"{where}: none of its {count} documents has {MIN_TOKENS} tokens or more; expected a "
            "non-empty list of texts, a datasets.Dataset with a text column, or token ids"
        )
    return documents


def _texts(data: Any, where: str) -> list[str]:
    """The texts of a list of them; none where it holds something else."""
    if not isinstance(data, list) or not data or not isinstance(data[0], str):
        return []
    for number, text in enumerate(data):
        if not isinstance(text, str):
            kind = type(text).__name__
            raise UsageError(f"{where}[{number}]: expected a text, got {kind}")
    return data


def _id_rows(data: Any, where: str) -> list[np.ndarray]:
    """The documents (S,) of token ids, of several such, or of a tokenizer's output."""
    if isinstance(data, Mapping):
        rows = _id_rows(data.get("input_ids"), where)
        if data.get("attention_mask") is None:
            return rows
        masks = _id_rows(data["attention_mask"], where)
        return [ids[mask != 0] for ids, mask in zip(rows, masks, strict=True)]
    data = data.tolist() if hasattr(data, "tolist") else data
    if not isinstance(data, list | tuple):
        kind = type(data).__name__
        raise UsageError(f"{where}: expected a text or token ids, got {kind}")
    if data and not isinstance(data[0], int | np.integer):
        return [ids for i, row in enumerate(data) for ids in _id_rows(row, f"{where}[{i}]")]
    ids = np.asarray(data if data else np.zeros(0, dtype=np.int64))
    if ids.dtype.kind not in "iu":
        raise UsageError(f"{where}: expected token ids, got {ids.dtype}")
    if ids.min(initial=0) < 0:
        raise UsageError(f"{where}: expected token ids from 0, got {ids.min()}")
    return [ids.astype(np.int64)]


# -- what a model takes ----------------------------------------------------------------------


def check_documents(
    documents: Sequence[EncodedDocument], model: Any, tokenizer: Any, where: str
) -> str:
    """Refuse ids that the model cannot embed; return, and log, a note on doubled start tokens.

    Raises:
        UsageError: see `check_ids`.
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
