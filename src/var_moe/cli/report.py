"""``var-moe report``: a results folder as one page, and its figures as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from var_moe.cli.output import CommandResult


def report(
    results: Path,
    *,
    output: Path | None = None,
    figures: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
) -> CommandResult:
    """Make one HTML page of whatever results a folder holds.

    The page needs no network, has a light and a dark face, and can be printed. Nothing is
    measured: what a command did not save is left out.

    Args:
        results: folder of tune, certify, evaluate, compare, analyze or profile.
        output: the page's file; report.html in the folder by default.
        figures: also each figure as a file, in these formats: png, svg, pdf; into the folder
            figures beside the page.
    """
    from var_moe.report.page import check_formats, export_figures, write_report
    from var_moe.storage import SCHEMA_VERSION

    check_formats(figures or ())
    path = write_report(results, output)
    print(f"Report: {path}")
    written: list[Path] = []
    if figures:
        written = export_figures(results, figures, path.parent / "figures")
        print(f"Figures: {len(written)} in {path.parent / 'figures'}")
    return CommandResult(
        {
            "schema_version": SCHEMA_VERSION,
            "report": str(path),
            "figures": [str(one) for one in written],
        }
    )
