"""A results folder as one HTML file: no network, light and dark, printable."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

from var_moe.errors import UsageError
from var_moe.extras import require
from var_moe.report.blocks import Picture, Section
from var_moe.report.certified import certificate_section
from var_moe.report.comparison import comparison_section
from var_moe.report.evaluated import evaluation_section
from var_moe.report.folder import FILES, STATS_FILE, Results, read_results
from var_moe.report.guarded import guard_section
from var_moe.report.headline import Headline, headline
from var_moe.report.held_out import held_out_section
from var_moe.report.hypotheses import hypotheses_section
from var_moe.report.importance import importance_section
from var_moe.report.layers import layers_section
from var_moe.report.origin import origin_section
from var_moe.report.routing import routing_section
from var_moe.report.search import search_section
from var_moe.report.seeds import seeds_section
from var_moe.report.speed import speed_section
from var_moe.report.systems import systems_section
from var_moe.report.unfinished import foreign_section, unfinished_section
from var_moe.storage import atomic_write_text

REPORT_FILE = "report.html"
Made = TypeVar("Made")

SECTIONS: tuple[Callable[[Results], Section | None], ...] = (
    certificate_section,
    unfinished_section,
    foreign_section,
    held_out_section,
    seeds_section,
    comparison_section,
    evaluation_section,
    systems_section,
    hypotheses_section,
    guard_section,
    search_section,
    importance_section,
    layers_section,
    speed_section,
    routing_section,
    origin_section,
)
"""In the order of the page; a section whose results are not there is left out."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """A report's content, before it is a page."""

    headline: Headline
    sections: tuple[Section, ...]

    @property
    def pictures(self) -> list[Picture]:
        """All figures, in order; each name once."""
        return [picture for section in self.sections for picture in section.pictures]


def build_report(folder: str | Path) -> Report:
    """What there is to report of a results folder.

    Raises:
        UsageError: no results there, or a file that is broken; names it; or plotly is missing.
    """
    require("plotly")
    results = read_results(Path(folder))
    made = [_made(make, results) for make in SECTIONS]
    return Report(
        headline=_made(headline, results),
        sections=tuple(one for one in made if one is not None),
    )


def _made(make: Callable[[Results], Made], results: Results) -> Made:
    """A part of the page; an error names the files that it was made from."""
    results.asked.clear()
    try:
        return make(results)
    except (LookupError, TypeError, AttributeError, ValueError, StopIteration) as error:
        asked = results.asked & results.parts.keys()
        read = [file for name, file in FILES.items() if name in asked]
        lacks = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UsageError(
            f"{results.folder}: not as this version of var_moe writes it: "
            f"{' or '.join(read) or STATS_FILE} ({lacks}); run the command again"
        ) from error


def render(report: Report) -> str:
    """The page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("var_moe.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates = files("var_moe.report") / "templates"
    return environment.get_template("report.html.jinja").render(
        headline=report.headline,
        sections=report.sections,
        figures={one.name: figure_json(one) for one in report.pictures},
        style=(templates / "report.css").read_text(encoding="utf-8"),
        script=(templates / "report.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs() if report.pictures else "",
    )


def figure_json(picture: Picture) -> str:
    """A figure as JSON that can stand inside a script element."""
    plain = json.loads(picture.figure.to_json())
    # "</script>" inside a name would end the element, whatever the quotes around it.
    return json.dumps({"data": plain["data"], "layout": plain["layout"]}).replace("<", "\\u003c")


def write_report(folder: str | Path, path: str | Path | None = None) -> Path:
    """Write the report of a results folder.

    Args:
        folder: results of any command.
        path: of the file; ``report.html`` in the folder by default.

    Returns:
        The file's path.

    Raises:
        UsageError: see `build_report`.
    """
    place = Path(path) if path is not None else Path(folder) / REPORT_FILE
    if place.is_dir():
        raise UsageError(f"{place}: is a folder; --output expects the page's file")
    atomic_write_text(place, render(build_report(folder)))
    return place
