"""Text as documents, the unit of independence: loading a split, and tokenising it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from var_moe.errors import UsageError
from var_moe.storage import sha256_of

SPLITS = ("calibration", "validation", "certify", "test")


@dataclass(frozen=True)
class TextDocument:
    """A unit of text that is independent of the others."""

    id: str
    source: str
    text: str


@dataclass(frozen=True, kw_only=True)
class TextSplit:
    """The documents of one split of a data set.

    ``independent`` is False where documents are parts of one text, so that intervals over
    documents are too narrow; ``note`` says how the split came about.
    """

    dataset: str
    split: str
    documents: tuple[TextDocument, ...]
    independent: bool = True
    note: str = ""

    @property
    def content_hash(self) -> str:
        """Hash over the documents, in order."""
        return sha256_of(document.text for document in self.documents)


@dataclass(frozen=True)
class EncodedDocument:
    """A document's token ids."""

    id: str
    source: str
    ids: np.ndarray  # (S,) int64


def load_text(dataset: str, split: str) -> TextSplit:
    """Load one split of a data set.

    Args:
        dataset: ``demo``, ``demo-postgres``, ``demo-python``, ``demo-wordnet``, ``demo-kjv``;
            ``wikitext``; another Hub data set as ``name[:config]``; a .txt, .jsonl or .parquet
            file; a folder with files named after the splits.
        split: ``calibration``, ``validation``, ``certify`` or ``test``; ``all`` for a file.

    Raises:
        UsageError: it is missing, out of reach, of another form, or empty.
    """
    from var_moe.evaluation.sources import demo_split, hub_split, local_split, looks_local

    if split not in (*SPLITS, "all"):
        raise UsageError(f"split {split!r}: expected one of {', '.join(SPLITS)} (or all)")
    if dataset == "demo" or dataset.startswith("demo-"):
        found = demo_split(dataset, split)
    elif looks_local(dataset):
        found = local_split(dataset, split)
    else:
        found = hub_split(dataset, split)
    if not found.documents:
        raise UsageError(f"{dataset}: no text in split {split!r}; expected non-empty documents")
    return found


def encode(documents: TextSplit | Sequence[TextDocument], tokenizer: Any) -> list[EncodedDocument]:
    """Tokenise documents as the tokenizer does a text of its own, special tokens included."""
    chosen = documents.documents if isinstance(documents, TextSplit) else documents
    if not chosen:
        return []
    ids = tokenizer([document.text for document in chosen], verbose=False)["input_ids"]
    return [
        EncodedDocument(document.id, document.source, np.asarray(row, dtype=np.int64))
        for document, row in zip(chosen, ids, strict=True)
        if len(row) > 0
    ]


def as_documents(data: Any, tokenizer: Any) -> list[EncodedDocument]:
    """Documents from what the documented API takes.

    Args:
        data: a list of texts, a datasets.Dataset with a text column, a 2-D tensor or array of
            token ids, or a list of 1-D ones; each entry is a document.
        tokenizer: used for texts.

    Raises:
        UsageError: it is none of these, or empty.
    """
    if hasattr(data, "column_names"):
        data = data[text_column(data.column_names, {}, "validation_data")]
    if hasattr(data, "tolist") and not isinstance(data, str):
        data = data.tolist()
    rows = [] if isinstance(data, str | bytes) or not hasattr(data, "__iter__") else list(data)
    if not rows:
        raise UsageError(
            "validation_data: expected a non-empty list of texts, a datasets.Dataset with a text "
            f"column, or token ids, got {type(data).__name__}"
        )
    if all(isinstance(row, str) for row in rows):
        texts = [TextDocument(str(i), "given", row) for i, row in enumerate(rows) if row.strip()]
        return encode(texts, tokenizer)
    documents = []
    for number, row in enumerate(rows):
        if isinstance(row, dict):  # a tokenizer's output
            row = row.get("input_ids")
        ids = np.asarray(row.tolist() if hasattr(row, "tolist") else row)
        if ids.dtype.kind not in "iu":
            raise UsageError(
                f"validation_data[{number}]: expected a text or token ids, got {type(row).__name__}"
            )
        documents.append(EncodedDocument(str(number), "given", ids.reshape(-1).astype(np.int64)))
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


def text_column(columns: Sequence[str], kinds: dict[str, bool], where: str) -> str:
    """The column that holds the text: ``text``, else the only one of strings.

    Args:
        columns: names.
        kinds: whether a column holds strings, where known.
        where: for the message.
    """
    if "text" in columns:
        return "text"
    strings = [name for name in columns if kinds.get(name)]
    if len(strings) == 1:
        return strings[0]
    raise UsageError(f"{where}: no column 'text'; it has {', '.join(map(str, columns)) or 'none'}")
