"""What ``var-moe compare`` measured: what each policy's cuts cost, and what they bring."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from typing import Any

from var_moe.report.blocks import Notes, Picture, Section, Table, pictures, section
from var_moe.report.folder import Results
from var_moe.report.theme import (
    GREY,
    SERIES,
    empty_figure,
    limit,
    line_at,
    percent,
    settings,
    speedup,
)

CONTROL = "random_skip"


def comparison_section(results: Results) -> Section:
    """Policies at equal experts per token, with a figure for each compensation, the best first."""
    comparison = results["comparison"]
    text, ahead = comparison["text"], sorted(comparison["rows"], key=lambda r: r["degradation"])
    kinds = list(dict.fromkeys(row.get("compensation") for row in ahead))
    return section(
        "policies",
        "Policies at equal experts per token",
        pictures(*(experts_figure(comparison, kind, alone=len(kinds) == 1) for kind in kinds)),
        *(
            _table([row for row in ahead if row["target_experts_per_token"] == target], target)
            for target in comparison["targets_experts_per_token"]
        ),
        Notes("", comparison["notes"]),
        intro=f"{comparison['model']['name']} on {text['dataset']} ({text['split']}), "
        f"{comparison['documents']:,} documents, perplexity "
        f"{comparison['baseline']['perplexity']:.3f}.",
    )


def experts_figure(comparison: Mapping[str, Any], kind: str | None, *, alone: bool) -> Picture:
    """Degradation against executed experts per token, of one compensation."""
    rows = comparison["rows"]
    figure = empty_figure("experts per token", "perplexity change, %", height=520)
    ways = dict.fromkeys((row["policy"], row.get("dial")) for row in rows)
    colours = dict(zip((way for way in ways if way[0] != CONTROL), cycle(SERIES), strict=False))
    some = [row for row in rows if row.get("compensation") == kind]
    some.sort(key=lambda row: -row["experts_per_token"])
    for name in dict.fromkeys(row["name"] for row in some):
        points = [row for row in some if row["name"] == name]
        way = (points[0]["policy"], points[0].get("dial"))
        figure.add_scatter(
            x=[point["experts_per_token"] for point in points],
            y=[100 * point["degradation"] for point in points],
            error_y={"array": [196 * point["degradation_standard_error"] for point in points]},
            text=[f"{name}<br>{settings(point['settings'])}" for point in points],
            name=name.removesuffix(f" + {kind}"),
            mode="lines+markers",
            line={"color": colours.get(way, GREY)},
        )
    # One scale for all, so that the eye compares them.
    most = max(row["degradation"] + 2 * row["degradation_standard_error"] for row in rows)
    least = min(row["degradation"] - 2 * row["degradation_standard_error"] for row in rows)
    figure.update_yaxes(range=[100 * (min(least, 0) - 0.03 * most), 103 * most])
    figure.update_xaxes(autorange="reversed")
    bound = comparison["max_degradation"]
    line_at(figure, f"bound {limit(bound)}", y=100 * bound)
    return Picture(
        name="policies-experts" if alone else f"policies-experts-{kind}",
        title="What cuts cost" if alone else f"What cuts cost, compensation: {kind}",
        caption="Lower is better; further right, fewer experts run. Bars are 95% intervals over "
        "documents. The grey line is the control: the same number of cuts, at random.",
        figure=figure,
    )


def _table(rows: list[Mapping[str, Any]], target: float) -> Table | None:
    columns: dict[str, Any] = {
        "policy": "{name}",
        "experts per token": "{experts_per_token:.3f}",
        "perplexity change": lambda row: percent(row["degradation"]),
        "± s.e.": lambda row: f"{100 * row['degradation_standard_error']:.2f}",
        "random skipping": lambda row: percent(row["degradation_of_random_skip"]),
    }
    if any(row["speedup"] is not None for row in rows):
        columns["speedup [95%]"] = speedup
    return Table.of(f"At {target:g} experts per token", rows, columns, marked=0)
