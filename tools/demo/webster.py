"""Webster's Revised Unabridged Dictionary of 1913, for the train split alone.

Read from the package dict-gcide (the GNU Collaborative International Dictionary of English).
Only what is marked as of 1913 is taken, which is in the public domain; what others added
since, some of it from WordNet, is left out. Its entries teach the form of a definition, so they
are written as `sources.wordnet_pages` writes WordNet's.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from sources import WORDNET_PAGE_CHARS, Block, Page

FILE = Path("/usr/share/dictd/gcide.dict.dz")
SOURCE = "webster"

_HEAD = re.compile(r"^([A-Z][^\\]*?) \\[^\\]*\\[^,]*, (n|v|a|adv|prep|conj|interj)\b")
_SPEECH = {"a": "adj"}
_FROM_1913 = re.compile(r"\s*\[1913 Webster\]\s*$")
_NUMBER = re.compile(r"^(?:\d+\.|\([a-z]\))\s+")
_FIELD = re.compile(r"^\((?:[A-Z][\w&. ]*|[a-z])\)\s+")
_ACCENT = re.compile(r"\[[^\]\w]*([A-Za-z]{1,2})[^\]\w]*\]")
_MARKS = re.compile(r"\[[^\]]{0,6}\]|[{}]")
_DERIVED = re.compile(r"(?:^|\s)--\s?[A-Z].*|\s\(b\)\s.*")  # derived words, a second sense
_ODD = re.compile(r"\?{2,}|\\|\bSyn:|\[")


def entries(file: Path = FILE) -> Iterator[tuple[str, str, list[str]]]:
    """(headword, part of speech, definitions of 1913) of each entry that has any."""
    head, speech, found = "", "", []
    with gzip.open(file, "rt", encoding="utf-8", errors="replace") as lines:
        paragraph: list[str] = []
        for line in [*lines, ""]:
            line = line.rstrip("\n")
            if not line.startswith(" ") and (match := _HEAD.match(line)):
                if found:
                    yield head, speech, found
                head, speech, found = match[1], _SPEECH.get(match[2], match[2]), []
                paragraph = []
                continue
            if line.startswith("   "):
                paragraph.append(line)
                continue
            if (text := _definition(paragraph)) is not None and head:
                found.append(text)
            if line and not line.startswith(" "):
                if found:
                    yield head, speech, found
                head, found = "", []
            paragraph = []
    if found:
        yield head, speech, found


def _definition(paragraph: list[str]) -> str | None:
    """The paragraph's text, if it is a definition of 1913 and no quotation or phrase."""
    if not paragraph or paragraph[0].startswith("         ") or "{" in paragraph[0][:6]:
        return None
    text = " ".join(line.strip() for line in paragraph)
    if not _FROM_1913.search(text):
        return None
    text = _FROM_1913.sub("", text)
    text = _MARKS.sub("", _ACCENT.sub(r"\1", text)).rpartition("]")[2]  # an etymology's end
    text = _DERIVED.sub("", _FIELD.sub("", _NUMBER.sub("", text.strip())))
    text = re.sub(r"\s+", " ", text).strip().rstrip(".;")
    if len(text) < 20 or _ODD.search(text) or text.startswith(("See ", "Same as ", "Note:")):
        return None
    return text[0].lower() + text[1:]


def webster_pages(file: Path = FILE, *, seed: int) -> list[Page]:
    """Consecutive entries packed into pages of the length of WordNet's."""
    rng = np.random.default_rng(seed)
    pages: list[Page] = []
    page: list[str] = []
    size, target = 0, int(rng.integers(*WORDNET_PAGE_CHARS))
    for head, speech, definitions in entries(file):
        word = head.lower() if speech != "n" else head[0].lower() + head[1:]
        page.append("\n".join([word, *(f"  ({speech}) {text}" for text in definitions)]))
        size += len(page[-1]) + 1
        if size >= target:
            block = Block(text="\n".join(page))
            pages.append(Page(source=SOURCE, name=f"{len(pages):05d}", blocks=(block,)))
            page, size, target = [], 0, int(rng.integers(*WORDNET_PAGE_CHARS))
    return pages
