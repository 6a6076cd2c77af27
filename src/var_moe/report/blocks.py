"""What a page is made of: a headline, sections of pictures, tables and facts; and its HTML."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, ClassVar, Self

Column = str | Callable[[Any], str]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A plotly figure with the words that it is read by.

    Args:
        name: of its file when exported, and of its place in the page; lower case and hyphens.
        title: what it shows.
        caption: how to read it.
        figure: a plotly figure without a title of its own.
        small: whether it shares its row with its like.
    """

    name: str
    title: str
    caption: str
    figure: Any
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

    @classmethod
    def of(
        cls,
        title: str,
        rows: Iterable[Mapping[str, Any]],
        columns: Mapping[str, Column],
        **more: Any,
    ) -> Self | None:
        """One line per row, or nothing where there is none.

        Args:
            title: of the table.
            rows: what a result file holds.
            columns: heading -> a format of the row's entries, as ``"{perplexity:.3f}"``, or what
                makes the cell of a row.
            more: further fields.
        """
        cells = [
            tuple(
                one.format(**row) if isinstance(one, str) else one(row) for one in columns.values()
            )
            for row in rows
        ]
        return cls(title=title, headings=list(columns), rows=cells, **more) if cells else None


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


def pictures(*given: Picture | None) -> Pictures | None:
    """Those that are there, or nothing."""
    there = [one for one in given if one is not None]
    return Pictures(pictures=there) if there else None


GOOD, BAD, PLAIN = "good", "bad", "plain"


@dataclass(frozen=True, kw_only=True)
class Card:
    """One figure, its unit or interval below it, and what it is."""

    label: str
    value: str
    detail: str = ""
    tone: str = PLAIN


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A sentence that holds by itself, and whether it is good news."""

    sentence: str
    tone: str = PLAIN


@dataclass(frozen=True, kw_only=True)
class Headline:
    """What a reader sees first.

    Args:
        title: of the page.
        question: what was asked.
        answers: the answers, the strongest first.
        cards: figures that count.
        configuration: of what is reported on; empty where there are several.
    """

    title: str
    question: str
    answers: tuple[Answer, ...]
    cards: tuple[Card, ...] = ()
    configuration: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """A report's content, before it is a page."""

    headline: Headline
    sections: tuple[Section, ...]

    @property
    def pictures(self) -> list[Picture]:
        """All figures, in order; each name once."""
        return [picture for section in self.sections for picture in section.pictures]


def environment(*, html: bool = True) -> Any:
    """This package's templates, to be filled in."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("var_moe.report"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(report: Report) -> str:
    """The page; one with figures needs plotly."""
    plotly = ""
    if report.pictures:
        from plotly.offline import get_plotlyjs

        plotly = get_plotlyjs()
    templates = files("var_moe.report") / "templates"
    template = environment().get_template("report.html.jinja")
    page: str = template.render(
        headline=report.headline,
        sections=report.sections,
        figures={one.name: figure_json(one) for one in report.pictures},
        style=(templates / "report.css").read_text(encoding="utf-8"),
        script=(templates / "report.js").read_text(encoding="utf-8"),
        plotly=plotly,
    )
    return page


def figure_json(picture: Picture) -> str:
    """A figure as JSON that can stand inside a script element."""
    plain = json.loads(picture.figure.to_json())
    # "</script>" inside a name would end the element, whatever the quotes around it.
    return json.dumps({"data": plain["data"], "layout": plain["layout"]}).replace("<", "\\u003c")
