"""A results folder as one HTML file that needs no network, or its figures as files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from var_moe.errors import UsageError
from var_moe.extras import require
from var_moe.report.blocks import Report, Section, render
from var_moe.report.certificate import certificate_section
from var_moe.report.comparison import comparison_section
from var_moe.report.folder import FILES, STATS_FILE, Results, read_results
from var_moe.report.forward import layers_section, speed_section
from var_moe.report.headline import headline
from var_moe.report.measured import (
    evaluation_section,
    guard_section,
    held_out_section,
    seeds_section,
)
from var_moe.report.origin import left_out_section, origin_section
from var_moe.report.routing import hypotheses_section, routing_section
from var_moe.report.search import search_section
from var_moe.report.systems import systems_section
from var_moe.storage import atomic_write, atomic_write_text, entries_of

REPORT_FILE = "report.html"
FORMATS = ("png", "svg", "pdf")
WIDTH = 900
_INK, _GRID, _LINE = "#1c2026", "#e3e6eb", "#9aa2ad"

SECTIONS: tuple[tuple[Callable[[Results], Section], tuple[str, ...]], ...] = (
    (certificate_section, ("certificate",)),
    (left_out_section, ()),
    (held_out_section, ("validation",)),
    (seeds_section, ("stability",)),
    (comparison_section, ("comparison",)),
    (evaluation_section, ("evaluation",)),
    (systems_section, ("analysis", "components")),
    (hypotheses_section, ("routing",)),
    (guard_section, ("guard",)),
    (search_section, ("search", "metadata", "front")),
    (layers_section, ()),
    (speed_section, ("cost",)),
    (routing_section, ()),
    (origin_section, ()),
)
"""In the order of the page: each with the parts that it reads, of which the first must be there."""


def build_report(folder: str | Path) -> Report:
    """What there is to report of a results folder.

    Raises:
        UsageError: no results there, or a file that is broken; names it; or plotly is missing.
    """
    require("plotly")
    results = read_results(Path(folder))
    sections = []
    for make, parts in SECTIONS:
        if not parts or parts[0] in results.parts:
            read = " or ".join(FILES[name] for name in parts if name in results.parts)
            with entries_of(results.folder / (read or STATS_FILE)):
                sections.append(make(results))
    with entries_of(results.folder):
        top = headline(results)
    return Report(top, [one for one in sections if one.blocks])


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


def export_figures(folder: str | Path, formats: Sequence[str], output: str | Path) -> list[Path]:
    """Write each figure of a results folder's report as ``<name>.<format>``.

    Args:
        folder: results of any command.
        formats: of `FORMATS`.
        output: folder for the files.

    Raises:
        UsageError: see `check_formats`; no results, or kaleido's browser is missing.
    """
    check_formats(formats)
    written = []
    for picture in build_report(folder).pictures:
        figure = _for_paper(picture.figure)
        for kind in formats:
            path = Path(output) / f"{picture.name}.{kind}"
            atomic_write(path, lambda place, f=figure, k=kind: _write(f, place, k))  # type: ignore[misc]
            written.append(path)
    return written


def check_formats(formats: Sequence[str]) -> None:
    """Check what figures need, before anything is written.

    Raises:
        UsageError: an unknown format, or kaleido is missing.
    """
    unknown = [one for one in formats if one not in FORMATS]
    if unknown:
        raise UsageError(f"figure format {unknown[0]!r}: expected one of {', '.join(FORMATS)}")
    if formats:
        require("kaleido")


def _write(figure: Any, place: Path, kind: str) -> None:
    try:
        place.write_bytes(
            figure.to_image(format=kind, width=WIDTH, scale=2 if kind == "png" else 1)
        )
    except Exception as error:  # kaleido's own kinds of errors change with its versions
        line = " ".join(str(error).split())[:160]
        raise UsageError(
            f"kaleido cannot draw ({line}); it needs Chrome or Chromium: `kaleido_get_chrome`, or "
            "set BROWSER_PATH"
        ) from None


def _for_paper(figure: Any) -> Any:
    """The light face, on white."""
    copy = type(figure)(figure)
    copy.update_layout(paper_bgcolor="#ffffff", plot_bgcolor="#ffffff", font={"color": _INK})
    for update in (copy.update_xaxes, copy.update_yaxes):
        update(gridcolor=_GRID, linecolor=_LINE, tickcolor=_LINE)
    return copy
