"""What ``var-moe compare`` measured: what each policy's cuts cost, and what they bring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from var_moe.report.blocks import Notes, Picture, Section, Table, pictures, section
from var_moe.report.folder import Results
from var_moe.report.theme import (
    GREY,
    SERIES,
    empty_figure,
    interval_bars,
    limit,
    line_at,
    percent,
    settings,
    speedup,
)

CONTROL = "random_skip"
Rows = Sequence[Mapping[str, Any]]


def comparison_section(results: Results) -> Section:
    """Policies at equal experts per token, with a figure for each compensation, the best first."""
    found = results.get("comparison")
    text, rows = found["text"], found["rows"]
    ahead = sorted(rows, key=lambda row: row["degradation"])
    kinds = list(dict.fromkeys(row.get("compensation") for row in ahead))
    return section(
        "policies",
        "Policies at equal experts per token",
        [
            pictures(*(experts_figure(found, kind, alone=len(kinds) == 1) for kind in kinds)),
            pictures(speed_figure(found)),
            *(_table(found, target) for target in found["targets_experts_per_token"]),
            Notes(lines=found["notes"]) if found["notes"] else None,
        ],
        intro=f"{found['model']['name']} on {text['dataset']} ({text['split']}), "
        f"{found['documents']:,} documents, perplexity {found['baseline']['perplexity']:.3f}.",
    )


def experts_figure(found: Mapping[str, Any], kind: str | None, *, alone: bool) -> Picture:
    """Degradation against executed experts per token, of one compensation."""
    rows = found["rows"]
    figure = _figure(
        found, "experts per token", [row for row in rows if row.get("compensation") == kind]
    )
    # One scale for all, so that the eye compares them.
    most = max(row["degradation"] + 2 * row["degradation_standard_error"] for row in rows)
    least = min(row["degradation"] - 2 * row["degradation_standard_error"] for row in rows)
    figure.update_yaxes(range=[100 * (min(least, 0) - 0.03 * most), 103 * most])
    figure.update_xaxes(autorange="reversed")
    return Picture(
        name="policies-experts" if alone else f"policies-experts-{kind}",
        title="What cuts cost" if alone else f"What cuts cost, compensation: {kind}",
        caption="Lower is better; further right, fewer experts run. Bars are 95% intervals over "
        "documents. The grey line is the control: the same number of cuts, at random.",
        figure=figure,
    )


def speed_figure(found: Mapping[str, Any]) -> Picture | None:
    """Degradation against measured speedup, of the policies that were timed at every target."""
    untimed = {row["name"] for row in found["rows"] if not row["speedup"]}
    rows = [row for row in found["rows"] if row["name"] not in untimed]
    if not rows:
        return None
    return Picture(
        name="policies-speed",
        title="What cuts bring",
        caption="Measured speedup against the unmodified model; bars are 95% intervals over "
        "interleaved blocks.",
        figure=_figure(found, "speedup", rows),
    )


def _figure(found: Mapping[str, Any], x: str, rows: Rows) -> Any:
    """Perplexity change against experts per token or speedup, which has the error bars.

    A policy has one colour in all figures, and a dash for each compensation of a figure.
    """
    figure = empty_figure(x, "perplexity change, %", height=520)
    ways = [(row["policy"], row.get("dial")) for row in found["rows"] if row["policy"] != CONTROL]
    colours = dict(zip(dict.fromkeys(ways), SERIES * len(ways), strict=False))
    kinds = dict.fromkeys(row.get("compensation") for row in rows)
    dashes = dict(zip(kinds, ("solid", "dash", "dot", "dashdot"), strict=False))
    for name in dict.fromkeys(row["name"] for row in rows):
        points = sorted(
            (row for row in rows if row["name"] == name), key=lambda row: -row["experts_per_token"]
        )
        first = points[0]
        values = [point[x.replace(" ", "_")] for point in points]
        if x == "speedup":
            ends = [point["speedup_95"] for point in points]
            bars: dict[str, Any] = {"error_x": interval_bars(values, ends, thickness=1)}
        else:
            errors = [196 * point["degradation_standard_error"] for point in points]
            bars = {"error_y": {"array": errors}}
        figure.add_scatter(
            x=values,
            y=[100 * point["degradation"] for point in points],
            text=[f"{name}<br>{settings(point['settings'])}" for point in points],
            name=name if len(kinds) > 1 else name.removesuffix(f" + {first.get('compensation')}"),
            mode="lines+markers",
            line={
                "color": colours.get((first["policy"], first.get("dial")), GREY),
                "dash": dashes.get(first.get("compensation"), "solid"),
            },
            **bars,
        )
    bound = found["max_degradation"]
    line_at(figure, f"bound {limit(bound)}", y=100 * bound)
    return figure


def _table(found: Mapping[str, Any], target: float) -> Table | None:
    rows = [row for row in found["rows"] if row["target_experts_per_token"] == target]
    columns: dict[str, Any] = {
        "policy": "{name}",
        "experts per token": "{experts_per_token:.3f}",
        "perplexity change": lambda row: percent(row["degradation"]),
        "± s.e.": lambda row: f"{100 * row['degradation_standard_error']:.2f}",
        "random skipping": lambda row: percent(row["degradation_of_random_skip"]),
    }
    if any(row["speedup"] is not None for row in rows):
        columns["speedup [95%]"] = speedup
    ordered = sorted(rows, key=lambda row: row["degradation"])
    return Table.of(f"At {target:g} experts per token", ordered, columns, marked=0)
