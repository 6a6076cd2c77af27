"""What ``var-moe tune --validate`` measured on held-out text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from var_moe.report.blocks import Notes, Section, Table, section
from var_moe.report.folder import Results
from var_moe.report.wording import between, change, factor, percent, speedup

_MET = {True: "yes", False: "no", None: "-"}


def held_out_section(results: Results) -> Section | None:
    """The configuration on text that nothing was chosen on."""
    found = results.get("validation")
    if found is None:
        return None
    text = found["text"]
    return section(
        "held-out",
        f"On {'text that was seen' if found.get('seen') else 'held-out text'} ({text['split']})",
        [
            _figures(found),
            Table(
                title="Success criteria",
                headings=("criterion", "measured", "met"),
                words=2,
                rows=[
                    (row["name"], row["measured"], _MET[row["met"]]) for row in found["criteria"]
                ],
            ),
            datasets_table(found.get("by_dataset") or ()),
            Notes(lines=found["notes"]) if found["notes"] else None,
        ],
        intro=f"{text['dataset']}, {text['split']}: {found['documents']:,} documents, perplexity "
        f"{found['baseline_perplexity']:.3f} of the unmodified model.",
    )


def _figures(found: Mapping[str, Any]) -> Table:
    control, noise = found["random_skip"], found["noise_floor"]
    back, skip = found["backend_factor"], found["skipping_factor"]
    rows = [
        ("perplexity", f"{found['perplexity']:.3f}"),
        ("change (95% upper bound)", change(found)),
        ("random skipping at as many experts, the control", percent(control["degradation"])),
        ("experts per token", f"{found['experts_per_token']:.3f} of {found['top_k']}"),
        (f"speedup against {found['baseline_backend']} [95%]", speedup(found)),
        ("  of which our path keeping all pairs", _ratio(back)),
        ("  of which skipping", _ratio(skip)),
        ("predicted from executed pairs", factor(found["predicted_speedup"])),
        ("single runs", ", ".join(factor(run["speedup"]) for run in found["runs"])),
        ("baseline against itself, the noise", _ratio(noise)),
    ]
    return Table(title="Measured", headings=("", ""), rows=rows)


def _ratio(value: Mapping[str, float]) -> str:
    return f"{factor(value['median'])} {between((value['low'], value['high']))}"


def datasets_table(rows: Any, *, title: str = "Each data set by itself") -> Table | None:
    """One row per data set, from what ``evaluation.evaluator.Apart.to_dict`` gives."""
    if not rows:
        return None
    return Table(
        title=title,
        headings=(
            *("data set", "documents", "perplexity before", "after", "change (95% upper)"),
            "experts per token",
        ),
        rows=[
            (
                row["dataset"],
                f"{row['documents']:,}",
                f"{row['baseline_perplexity']:.3f}",
                f"{row['perplexity']:.3f}",
                change(row),
                f"{row['experts_per_token']:.3f}",
            )
            for row in rows
        ],
    )
