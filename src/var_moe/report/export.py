"""Figures of a report as files for papers: PNG, SVG or PDF, by kaleido."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from var_moe.errors import UsageError
from var_moe.extras import require
from var_moe.report.page import build_report
from var_moe.storage import atomic_write

FORMATS = ("png", "svg", "pdf")
WIDTH = 900
_INK, _GRID, _LINE = "#1c2026", "#e3e6eb", "#9aa2ad"


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
