"""How much a search's answer depends on its seed."""

from __future__ import annotations

from var_moe.report.blocks import Section, Table, section
from var_moe.report.folder import Results
from var_moe.report.wording import change, settings, speedup


def seeds_section(results: Results) -> Section | None:
    """The winners of several seeds, one row each."""
    found = results.get("stability")
    if found is None:
        return None
    rows = [
        (
            str(run["seed"]),
            change(run),
            speedup(run),
            f"{run['experts_per_token']:.3f}",
            settings(run["config"]),
        )
        if run["found"]
        else (str(run["seed"]), "nothing kept the bound", "", "", "")
        for run in found["runs"]
    ]
    headings = ("seed", "change (95% upper)", "speedup [95%]", "experts per token", "winner")
    table = Table(title="Winners", headings=headings, rows=rows)
    return section("seeds", f"{len(rows)} seeds", [table])
