"""What a report's page is made of: sections of pictures, tables and facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A plotly figure with the words that it is read by.

    Args:
        name: of its file when exported, and of its place in the page; lower case and hyphens.
        title: what it shows.
        caption: how to read it.
        figure: a plotly figure without a title of its own.
        least_width: pixels below which the page scrolls it sideways; 0 lets it shrink.
        small: whether it shares its row with its like.
    """

    name: str
    title: str
    caption: str
    figure: Any
    least_width: int = 0
    small: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text; all columns but the first ``words`` are figures, set to the right."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    words: int = 1
    marked: int | None = None  # the row that the eye should find
    block: ClassVar[str] = "table"  # the template's name for it


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Names and values."""

    rows: Mapping[str, str]
    title: str = ""
    block: ClassVar[str] = "facts"  # the template's name for it


@dataclass(frozen=True, kw_only=True)
class Notes:
    """Sentences, each on a line of its own."""

    lines: Sequence[str]
    title: str = ""
    block: ClassVar[str] = "notes"  # the template's name for it


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures one below the other, or side by side where they are small."""

    pictures: Sequence[Picture]
    block: ClassVar[str] = "pictures"  # the template's name for it


Block = Table | Facts | Notes | Pictures


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, a sentence, and blocks."""

    name: str  # anchor
    title: str
    intro: str = ""
    blocks: Sequence[Block] = field(default_factory=tuple)

    @property
    def pictures(self) -> list[Picture]:
        """All pictures of the section, in order."""
        return [
            picture
            for block in self.blocks
            if isinstance(block, Pictures)
            for picture in block.pictures
        ]


def section(name: str, title: str, blocks: Iterable[Block | None], *, intro: str = "") -> Section:
    """A section of the blocks that are there."""
    return Section(name=name, title=title, intro=intro, blocks=[one for one in blocks if one])


def pictures(*found: Picture | None) -> Pictures | None:
    """Those that are there, or nothing."""
    there = [one for one in found if one is not None]
    return Pictures(pictures=there) if there else None
