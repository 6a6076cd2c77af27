"""What a page is made of: a headline, sections of pictures, tables and facts; and its HTML."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, ClassVar, NamedTuple, Self

Column = str | Callable[[Any], str]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A plotly figure with the words that it is read by.

    Args:
        name: of its file when exported, and of its place in the page; lower case and hyphens.
        title: what it shows.
        caption: how to read it.
        figure: a plotly figure without a title of its own.
    """

    name: str
    title: str
    caption: str
    figure: Any


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


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    title: str
    rows: Mapping[str, str]
    block: ClassVar[str] = "facts"


@dataclass(frozen=True)
class Notes:
    """Sentences, each on a line of its own."""

    title: str
    rows: Sequence[str]
    block: ClassVar[str] = "notes"


@dataclass(frozen=True)
class Pictures:
    """Pictures in one row, where the page is wide enough."""

    rows: Sequence[Picture]
    block: ClassVar[str] = "pictures"


Block = Table | Facts | Notes | Pictures


class Section(NamedTuple):
    """A heading, a sentence, and blocks."""

    name: str  # anchor
    title: str
    intro: str
    blocks: Sequence[Block]


def section(name: str, title: str, *blocks: Block | None, intro: str = "") -> Section:
    """A section of the blocks that are there and not empty."""
    return Section(name, title, intro, [one for one in blocks if one and one.rows])


def pictures(*given: Picture | None) -> Pictures:
    """Those that are there."""
    return Pictures([one for one in given if one])


GOOD, BAD, PLAIN = "good", "bad", "plain"


class Card(NamedTuple):
    """One figure, its unit or interval below it, and what it is."""

    label: str
    value: str
    detail: str = ""
    tone: str = PLAIN


class Answer(NamedTuple):
    """A sentence that holds by itself, and whether it is good news."""

    sentence: str
    tone: str = PLAIN


@dataclass(frozen=True, kw_only=True)
class Headline:
    """What a reader sees first: what was asked, the answers, the figures that count.

    The configuration is that of what is reported on; None where there are several.
    """

    title: str
    question: str
    answers: Sequence[Answer] = ()
    cards: Sequence[Card] = ()
    configuration: Mapping[str, Any] | None = None


class Report(NamedTuple):
    """A report's content, before it is a page."""

    headline: Headline
    sections: Sequence[Section]

    @property
    def pictures(self) -> list[Picture]:
        """All figures, in order; each name once."""
        blocks = [block for section in self.sections for block in section.blocks]
        return [one for block in blocks if isinstance(block, Pictures) for one in block.rows]


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
    page: str = (
        environment()
        .get_template("report.html.jinja")
        .render(
            headline=report.headline,
            sections=report.sections,
            figures={one.name: figure_json(one) for one in report.pictures},
            style=(templates / "report.css").read_text(encoding="utf-8"),
            script=(templates / "report.js").read_text(encoding="utf-8"),
            plotly=plotly,
        )
    )
    return page


def figure_json(picture: Picture) -> str:
    """A figure as JSON that can stand inside a script element."""
    # "</script>" inside a name would end the element, whatever the quotes around it.
    text: str = picture.figure.to_json()
    return text.replace("<", "\\u003c")
