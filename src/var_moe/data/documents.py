"""What a document is, as text and as token ids: the unit of independence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from var_moe.errors import UsageError
from var_moe.storage import sha256_of


@dataclass(frozen=True)
class TextColumn:
    """The column of a table that a document is from, and what it holds."""

    name: str
    kind: str  # text, chat or ids
    others: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """Which column was taken, where that was a choice."""
        kinds = {"text": "", "chat": " as chats", "ids": " as token ids"}
        chosen = (self.name, self.kind) != ("text", "text")
        return f"column {self.name!r}{kinds[self.kind]}" if chosen else ""


@dataclass(frozen=True)
class TextDocument:
    """A unit of text that is independent of the others.

    Of a column of chats or token ids, ``text`` is a chat's messages or the ids as JSON, which
    `var_moe.data.text.encode` reads.
    """

    id: str
    source: str
    text: str
    dataset: str = ""  # where the text is of several data sets
    column: TextColumn | None = None  # where it is of a table


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


def ids_hash(documents: Iterable[EncodedDocument]) -> str:
    """Hash over the token ids: of one text, they change with a chat template or a start token."""
    return sha256_of(document.ids.tobytes() for document in documents)


def check_encoded(documents: Any) -> None:
    """Raise UsageError unless these are encoded documents: texts must be tokenised first."""
    listed = isinstance(documents, Sequence) and not isinstance(documents, str)
    for one in documents if listed else (documents,):
        if not isinstance(one, EncodedDocument):
            raise UsageError(
                f"documents: got {type(one).__name__}, expected a list of encoded documents, as "
                "var_moe.data.text.encode(load_text(...), tokenizer) returns them"
            )


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
