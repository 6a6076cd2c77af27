"""Read the demo's four texts from installed Debian packages, as pages of clean blocks.

A page is the unit that is split (every section of it goes to one split); a block is a
paragraph, a heading, a table or a code listing. Nothing here is random.

| source    | Debian package      | page                                         |
|-----------|---------------------|----------------------------------------------|
| postgres  | postgresql-doc-15   | one HTML file of the manual                  |
| python    | python3.11-doc      | one .rst file of the documentation's sources |
| wordnet   | dict-wn             | a run of consecutive dictionary entries      |
| kjv       | bible-kjv(-text)    | one chapter                                  |
"""

from __future__ import annotations

import gzip
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

POSTGRES_DIR = Path("/usr/share/doc/postgresql-doc-15/html")
PYTHON_DIR = Path("/usr/share/doc/python3.11/html/_sources")
WORDNET_FILE = Path("/usr/share/dictd/wn.dict.dz")
WORDNET_PAGE_CHARS = (600, 1300)  # a packed page's length is drawn from this range

# Legal text, indexes, name lists and keyword tables: no prose to learn from.
POSTGRES_DROPPED = frozenset(
    {
        "legalnotice",
        "bookindex",
        "index",
        "biblio",
        "acronyms",
        "acknowledgments",
        "sql-keywords-appendix",
        "features-sql-standard",
        "unsupported-features-sql-standard",
        "git",
        "contrib-prog-client",
        "external-interfaces",
        "external-pl",
        "external-extensions",
        "release-prior",
    }
)
PYTHON_DROPPED = frozenset(
    {
        "license",
        "copyright",
        "about",
        "bugs",
        "contents",
        "index",
        "library/index",
        "c-api/index",
        "reference/index",
        "tutorial/index",
        "howto/index",
        "using/index",
        "extending/index",
        "distributing/index",
        "installing/index",
        "distutils/index",
        "faq/index",
        "whatsnew/index",
        "whatsnew/changelog",
    }
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A paragraph, listing or heading of a page."""

    text: str
    heading: bool = False


@dataclass(frozen=True, kw_only=True)
class Page:
    """One page of a source; `name` is unique within the source."""

    source: str
    name: str
    blocks: tuple[Block, ...]
    separator: str = "\n\n"

    @property
    def text(self) -> str:
        """The page's blocks as one text."""
        return self.separator.join(block.text for block in self.blocks)


class _ManualParser(HTMLParser):
    """DocBook's HTML as blocks, without navigation, tables of contents and index anchors."""

    BLOCKS = frozenset(
        {
            "p",
            "div",
            "li",
            "dt",
            "dd",
            "tr",
            "table",
            "ul",
            "ol",
            "dl",
            "blockquote",
            "h1",
            "h2",
            "h3",
            "h4",
            "h5",
            "h6",
        }
    )
    SKIPPED = frozenset({"navheader", "navfooter", "toc", "list-of-tables", "list-of-figures"})
    SKIPPED_TAGS = frozenset({"head", "script", "style"})
    VOID = frozenset({"br", "hr", "img", "col", "meta", "link", "input"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self._text: list[str] = []
        self._skip_depth = 0  # > 0 inside a skipped element: how many elements are open in it
        self._pre = 0
        self._row = 0
        self._cells = 0

    def _flush(self, *, heading: bool = False) -> None:
        raw = "".join(self._text).replace("\xa0", " ")
        if self._pre:
            text = "\n".join(line.rstrip() for line in raw.strip("\n").split("\n"))
        else:
            text = re.sub(r"\s+", " ", raw).strip()
        self._text = []
        if text:
            self.blocks.append(Block(text=text, heading=heading))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.VOID:
            if tag == "br" and not self._skip_depth:
                self._text.append("\n" if self._pre else " ")
            return
        classes = (dict(attrs).get("class") or "").split()
        if self._skip_depth or tag in self.SKIPPED_TAGS or self.SKIPPED.intersection(classes):
            self._skip_depth += 1
            return
        if tag == "tr":
            self._flush()
            self._row += 1
            self._cells = 0
        elif tag in ("td", "th"):
            self._text.append(" | " if self._cells else "")
            self._cells += 1
        elif self._row:  # paragraphs in a table's cell stay on the row's line
            self._text.append(" ")
        elif tag == "pre":
            self._flush()
            self._pre += 1
        elif tag in self.BLOCKS:
            self._flush()
            if tag == "li":
                self._text.append("* ")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID:
            return
        if self._skip_depth:
            self._skip_depth -= 1
        elif tag == "tr":
            self._flush()
            self._row -= 1
        elif self._row:
            self._text.append(" ")
        elif tag == "pre":
            self._flush()
            self._pre -= 1
        elif tag in self.BLOCKS:
            self._flush(heading=re.fullmatch("h[1-6]", tag) is not None)

    def handle_data(self, data: str) -> None:
        if not self._skip_depth:
            self._text.append(data)


def _merge_rows(blocks: list[Block]) -> Iterator[Block]:
    """Join a table's rows and a lone list mark with what follows them."""
    pending: list[str] = []
    for block in blocks:
        if block.text == "*":
            continue
        if " | " in block.text and not block.heading:
            pending.append(block.text)
            continue
        if pending:
            yield Block(text="\n".join(pending))
            pending = []
        yield block
    if pending:
        yield Block(text="\n".join(pending))


def html_blocks(text: str) -> Iterator[Block]:
    """The blocks of an HTML page."""
    parser = _ManualParser()
    parser.feed(text)
    parser.close()
    return _merge_rows(parser.blocks)


def postgres_pages(folder: Path = POSTGRES_DIR) -> Iterator[Page]:
    """The PostgreSQL 15 manual, a page per HTML file."""
    for path in sorted(folder.glob("*.html")):
        if path.stem in POSTGRES_DROPPED:
            continue
        blocks = tuple(html_blocks(path.read_text(encoding="utf-8")))
        yield Page(source="postgres", name=path.stem, blocks=blocks)


_RST_NOISE = re.compile(
    r"^\s*\.\. (?:_[^:\n]+:\s*$|index::|moduleauthor::|sectionauthor::|highlight::"
    r"|currentmodule::|\|[^|]+\| |versionadded::\s*$|XXX|testsetup|\w+ --\s*$|_`?[^`\n]+`?: http)"
)
_RST_RULE = re.compile(r"([=\-~^\"'*+#.])\1{3,}\s*")


def rst_blocks(text: str) -> Iterator[Block]:
    """Paragraphs of an .rst file as they stand, without labels, index marks and comments."""
    for raw in re.split(r"\n\s*\n", text.expandtabs(8)):
        lines = [line.rstrip() for line in raw.strip("\n").split("\n")]
        if not any(lines) or (_RST_NOISE.match(lines[0]) and len(lines) < 12):
            continue
        if len(lines) == 1 and _RST_RULE.fullmatch(lines[0].strip()):
            continue
        heading = any(_RST_RULE.fullmatch(line) for line in lines) and len(lines) <= 3
        yield Block(text="\n".join(lines), heading=heading)


def python_pages(folder: Path = PYTHON_DIR) -> Iterator[Page]:
    """The Python 3.11 documentation's sources, a page per .rst file."""
    for path in sorted(folder.rglob("*.rst.txt")):
        name = str(path.relative_to(folder)).removesuffix(".rst.txt")
        if name in PYTHON_DROPPED:
            continue
        blocks = tuple(rst_blocks(path.read_text(encoding="utf-8")))
        yield Page(source="python", name=name, blocks=blocks)


_SENSE = re.compile(r"^(?:(n|v|adj|adv) )?(\d+): ")
_NOTE = re.compile(r"\s*\[(?:syn|ant|also): .*?\](?=\s|$)")


def wordnet_senses(file: Path = WORDNET_FILE) -> Iterator[tuple[str, str, str]]:
    """(headword, part of speech, sense) of every sense, synonyms' repetitions included."""
    head, speech, parts = "", "", []
    with gzip.open(file, "rt", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            line = line.rstrip("\n")
            sense = _SENSE.match(line.strip()) if line.startswith("    ") else None
            if parts and (sense or not line.startswith("    ")):
                yield head, speech, " ".join(parts)
                parts = []
            if not line.startswith(" "):
                head = line.strip()
                continue
            if sense:
                speech = sense[1] or speech
                parts = [line.strip()[sense.end() :]]
            elif parts:
                parts.append(line.strip())
    if parts:
        yield head, speech, " ".join(parts)


def wordnet_pages(file: Path = WORDNET_FILE, *, seed: int) -> Iterator[Page]:
    """WordNet's glosses, each once, consecutive entries packed into pages.

    A synset's gloss is repeated under each of its words. It is kept under the first of them,
    so that no gloss stands twice; the synonyms stay in its `[syn: ...]` note. Entries keep
    the dictionary's alphabetical order.
    """
    rng = np.random.default_rng(seed)
    seen: set[str] = set()
    entries: list[str] = []
    last = ""
    for head, speech, sense in wordnet_senses(file):
        if head.startswith("00-database"):
            continue
        key = re.sub(r"\W+", " ", _NOTE.sub("", sense)).lower().strip()
        if not key or key in seen:
            continue
        seen.add(key)
        text = f"({speech}) {sense.replace('{', '').replace('}', '')}"
        if head == last:
            entries[-1] += f"\n  {text}"
        else:
            entries.append(f"{head}\n  {text}")
        last = head
    page: list[str] = []
    size, target, number = 0, int(rng.integers(*WORDNET_PAGE_CHARS)), 0
    for entry in entries:
        page.append(entry)
        size += len(entry) + 1
        if size >= target:
            blocks = (Block(text="\n".join(page)),)
            yield Page(source="wordnet", name=f"{number:05d}", blocks=blocks)
            page, size, target = [], 0, int(rng.integers(*WORDNET_PAGE_CHARS))
            number += 1


def kjv_pages(program: str = "bible") -> Iterator[Page]:
    """The King James Bible, a page per chapter, a block per verse without its number."""
    result = subprocess.run(
        [program, "-f", "gen1:1-rev22:21"], check=True, capture_output=True, text=True
    )
    chapter, verses = "", []
    for line in result.stdout.splitlines():
        match = re.match(r"(\d?\w+?)(\d+):(\d+) (.*)", line)
        if match is None:
            continue
        name = f"{match[1]}-{match[2]}"
        if name != chapter and verses:
            yield Page(source="kjv", name=chapter, blocks=tuple(verses), separator="\n")
            verses = []
        chapter = name
        verses.append(Block(text=match[4].strip()))
    if verses:
        yield Page(source="kjv", name=chapter, blocks=tuple(verses), separator="\n")
