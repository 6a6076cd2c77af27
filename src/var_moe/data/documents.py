"""Documents, and how they are grouped into pages and divided into splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from var_moe.config import check_seed
from var_moe.errors import UsageError
from var_moe.storage import sha256_of

Item = TypeVar("Item")

SPLITS = ("calibration", "validation", "certify", "test")

# Whole percent, so that no rounding decides a border.
SHARES = {"calibration": 40, "validation": 25, "certify": 15, "test": 20}


@dataclass(frozen=True)
class TextColumn:
    """The column of a table that holds the text."""

    name: str
    kind: str  # text, chat or ids
    others: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """Names the column, unless it is plainly ``text``."""
        kinds = {"text": "", "chat": " as chats", "ids": " as token ids"}
        chosen = (self.name, self.kind) != ("text", "text")
        return f"column {self.name!r}{kinds[self.kind]}" if chosen else ""


@dataclass(frozen=True)
class TextDocument:
    """One row, section or article of a data set.

    For a column of chats or token ids, ``text`` is the messages or the ids as JSON, which
    `var_moe.data.encoding.encode` reads.
    """

    id: str
    source: str
    text: str
    dataset: str = ""  # set where the text consists of several data sets
    column: TextColumn | None = None  # set where it comes from a table


@dataclass(frozen=True, kw_only=True)
class TextSplit:
    """The documents of one split of a data set.

    ``independent`` is False where documents are parts of one text, so that intervals over
    documents are too narrow. ``note`` says how the split was made. ``parts`` are the data sets
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
        """Hash of the documents' texts, in order."""
        return sha256_of(document.text for document in self.documents)


@dataclass(frozen=True)
class EncodedDocument:
    """The token ids of a document."""

    id: str
    source: str
    ids: np.ndarray  # (S,) int64
    dataset: str = ""  # set where the text consists of several data sets


def ids_hash(documents: Iterable[EncodedDocument]) -> str:
    """Hash of the token ids; a chat template or a start token changes it, the text alone not."""
    return sha256_of(document.ids.tobytes() for document in documents)


def check_encoded(documents: Any) -> None:
    """Raise UsageError unless these are encoded documents."""
    for one in documents if isinstance(documents, list | tuple) else (documents,):
        if not isinstance(one, EncodedDocument):
            raise UsageError(
                f"documents: got {type(one).__name__}, expected a list of encoded documents, as "
                "var_moe.data.encoding.encode(load_text(...), tokenizer) returns them"
            )


def require_documents(documents: Sequence[Any], needed: int, step: str) -> None:
    """Raise UsageError, naming ``step`` and both numbers, if there are fewer than ``needed``."""
    if len(documents) < needed:
        raise UsageError(
            f"too few documents for {step}: {len(documents)}, at least {needed} needed"
        )


def page_of(document_id: str) -> str:
    """The page of a section (ids ``page#number``); any other document is its own page."""
    page, _, number = document_id.rpartition("#")
    return page if page and number.isdigit() else document_id


def by_page(documents: Sequence[EncodedDocument]) -> list[list[EncodedDocument]]:
    """Documents grouped by page, in the order in which the pages first occur."""
    pages: dict[str, list[EncodedDocument]] = {}
    for document in documents:
        pages.setdefault(page_of(document.id), []).append(document)
    return list(pages.values())


def shuffled_pages(
    documents: Sequence[EncodedDocument], *, seed: int
) -> list[list[EncodedDocument]]:
    """Documents grouped by page, the pages in a random order.

    Sections of one page share its subject, so the page is the unit of independence.
    """
    groups = by_page(documents)
    return [groups[i] for i in np.random.default_rng(check_seed(seed)).permutation(len(groups))]


def one_per_page(documents: Sequence[EncodedDocument], seed: int = 0) -> list[EncodedDocument]:
    """One random section of each page, in random order."""
    order = np.random.default_rng(check_seed(seed)).permutation(len(documents))
    return [sections[0] for sections in by_page([documents[position] for position in order])]


def in_turn(groups: Sequence[Sequence[Item]], *, equal: bool = False) -> list[Item]:
    """Interleave groups evenly; each keeps its own order.

    Every prefix holds the groups in proportion to their sizes; with ``equal``, one item of each
    group is taken in turn until it is used up.
    """
    places = [
        (float(at) if equal else (at + 0.5) / len(group), number, at)
        for number, group in enumerate(groups)
        for at in range(len(group))
    ]
    return [groups[number][at] for _, number, at in sorted(places)]


def share_of(text: str, splits: Sequence[str]) -> str:
    """Choose one of ``splits`` for a document by a hash of its text, in proportion to `SHARES`.

    The first eight bytes of the SHA-256 of the UTF-8 text, as a big-endian integer, are mapped
    evenly onto the sum of the shares. The choice is the same on every machine, and documents of
    equal text get the same split.
    """
    total = sum(SHARES[name] for name in splits)
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    point = int.from_bytes(digest[:8], "big") * total >> 64  # 0 .. total - 1
    for name in splits:
        if point < SHARES[name]:
            return name
        point -= SHARES[name]
    raise AssertionError("the shares cover every point")
