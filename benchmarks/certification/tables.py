"""The simulation as a page of markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def _share(found: Mapping[str, float]) -> str:
    return f"{100 * found['rate']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    line = "| " + " | ".join(headings) + " |"
    return [line, "|---" * len(headings) + "|", *("| " + " | ".join(row) + " |" for row in rows)]


def markdown(found: Mapping[str, Any]) -> str:
    """Tables of what `simulate` returned."""
    bound, alpha, studies = found["bound"], found["alpha"], found["studies"]
    ways = ("t", "bootstrap", "fixed", "naive")
    lines = [
        "# Do certificates hold what they promise?",
        "",
        f"`python -m benchmarks.certification`: {studies:,} studies per row on pages resampled "
        "from the demo's recorded losses (`benchmarks/certification/losses.csv`), whose true "
        "perplexity ratio is known. Shares in percent, with exact binomial 95% intervals.",
        "",
        f"## False certifications at exactly +{100 * bound:g}% (promised: at most "
        f"{100 * alpha:g}%)",
        "",
        "*certificate* is what `var-moe certify` does: the larger of both p-values, with the "
        "worst page counted once more. *t* and *bootstrap* are these tests alone and without it; "
        "*measured < 1%* looks at the point estimate. Stress rows go beyond anything recorded, "
        "and are shown for where the promise ends.",
        "",
        *_table(
            (
                *("population", "pages", "t", "bootstrap"),
                *("**certificate**", f"measured < {100 * bound:g}%"),
            ),
            [
                (
                    row["population"] + (" (stress)" if row["stress"] else ""),
                    f"{row['pages']}",
                    *(_share(row[way]) for way in ways),
                )
                for row in found["false_certifications"]
            ],
        ),
        "",
        "## Power: certificates where the truth is below the bound",
        "",
        *_table(
            ("population", "pages", "truth", "t alone", "certificate"),
            [
                (
                    row["population"],
                    f"{row['pages']}",
                    f"+{100 * row['truth']:.1f}%",
                    f"{100 * row['t']['rate']:.1f}",
                    _share(row["fixed"]),
                )
                for row in found["power"]
            ],
        ),
        "",
        "## Tuned and judged on one text: the best of many",
        "",
        f"Every configuration is at exactly +{100 * bound:g}%. Naive: the best measured is said "
        "to be below the bound. Certificate: the ten best, in that order, by fixed sequence on "
        "as much other text.",
        "",
        *_table(
            ("pages", "configurations", "naive, best", "naive, a single one", "certificate"),
            [
                (
                    f"{row['pages']}",
                    f"{row['tries']}",
                    _share(row["naive_best"]),
                    _share(row["naive_single"]),
                    _share(row["certificate"]),
                )
                for row in found["best_of_many"]
            ],
        ),
        "",
        "## Sections or pages as units",
        "",
        f"At exactly +{100 * bound:g}%, the t test with the worst unit once more.",
        "",
        *_table(
            ("policy", "pages", "sections as units", "pages as units"),
            [
                (
                    row["population"],
                    f"{row['pages']}",
                    _share(row["documents_as_units"]),
                    _share(row["pages_as_units"]),
                )
                for row in found["units"]
            ],
        ),
    ]
    return "\n".join(lines) + "\n"
