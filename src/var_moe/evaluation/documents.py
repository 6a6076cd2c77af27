"""What a document is, as text and as token ids: the unit of independence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from var_moe.errors import UsageError
from var_moe.storage import sha256_of


@dataclass(frozen=True)
class TextDocument:
    """A unit of text that is independent of the others."""

    id: str
    source: str
    text: str
    dataset: str = ""  # where the text is of several data sets


@dataclass(frozen=True, kw_only=True)
class TextSplit:
    """The documents of one split of a data set.

    ``independent`` is False where documents are parts of one text, so that intervals over
    documents are too narrow; ``note`` says how the split came about; ``parts`` are the data sets
    of a mixture.
    """

    dataset: str
    split: str
    documents: tuple[TextDocument, ...]
    independent: bool = True
    note: str = ""
    parts: tuple[TextSplit, ...] = ()

    @cached_property
    def content_hash(self) -> str:
        """Hash over the documents, in order."""
        return sha256_of(document.text for document in self.documents)


@dataclass(frozen=True)
class EncodedDocument:
    """A document's token ids."""

    id: str
    source: str
    ids: np.ndarray  # (S,) int64
    dataset: str = ""  # where the text is of several data sets


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
    have = ", ".join(map(str, columns)) or "none"
    raise UsageError(f"{where}: no column 'text'; it has {have}; rename the one that is meant")


def page_of(document_id: str) -> str:
    """The page that a document is a section of (ids ``page#number``), else the document itself."""
    page, _, number = document_id.rpartition("#")
    return page if page and number.isdigit() else document_id


def by_page(documents: Sequence[EncodedDocument]) -> list[list[EncodedDocument]]:
    """Documents by their page (`page_of`), pages in the order in which they first occur."""
    found: dict[str, list[EncodedDocument]] = {}
    for document in documents:
        found.setdefault(page_of(document.id), []).append(document)
    return list(found.values())
