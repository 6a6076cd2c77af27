"""What ``var-moe guard`` found: which text the guard alarms on, and how soon."""

from __future__ import annotations

from var_moe.report.blocks import Section, Table, section
from var_moe.report.folder import Results


def guard_section(results: Results) -> Section | None:
    """The data sets that were played to the guard."""
    found = results.get("guard")
    if found is None:
        return None
    rows = [
        (
            row["text"],
            f"{row['documents']:,}",
            "no" if row["alarm_at"] is None else f"after {row['alarm_at']:,}",
        )
        for row in found["checks"]
    ]
    return section(
        "guard",
        "The guard",
        [Table(title="Played to it", headings=("text", "documents", "alarm"), rows=rows)],
    )
