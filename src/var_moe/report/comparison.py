"""What ``var-moe compare`` measured: what each policy's cuts cost, and what they bring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from var_moe.report.blocks import Notes, Picture, Section, Table, pictures, section
from var_moe.report.folder import Results
from var_moe.report.theme import GREY, SERIES, empty_figure, interval_bars, line_at
from var_moe.report.wording import limit, percent, settings, speedup

CONTROL = "random_skip"


def comparison_section(results: Results) -> Section | None:
    """Policies at equal experts per token."""
    found = results.get("comparison")
    if found is None:
        return None
    text = found["text"]
    return section(
        "policies",
        "Policies at equal experts per token",
        [
            pictures(*(experts_figure(found, one) for one in _compensations(found))),
            pictures(speed_figure(found)),
            *(_table(found, target) for target in found["targets_experts_per_token"]),
            Notes(lines=found["notes"]) if found["notes"] else None,
        ],
        intro=f"{found['model']['name']} on {text['dataset']} ({text['split']}), "
        f"{found['documents']:,} documents, perplexity {found['baseline']['perplexity']:.3f}.",
    )


def _compensations(found: Mapping[str, Any]) -> list[str | None]:
    """What stood in for dropped experts, what costs least first."""
    rows = found["rows"]
    kinds = dict.fromkeys(row.get("compensation") for row in rows)
    return sorted(
        kinds,
        key=lambda one: min(row["degradation"] for row in rows if row.get("compensation") == one),
    )


def experts_figure(found: Mapping[str, Any], compensation: str | None) -> Picture:
    """Degradation against executed experts per token, of one compensation."""
    rows, alone = found["rows"], len(_compensations(found)) == 1
    lines = []
    for name, style, points in _lines(rows):
        if alone:
            lines.append((name, style, points))
        elif points[0].get("compensation") == compensation:
            solid = {**style, "line": {**style["line"], "dash": "solid"}}
            lines.append((name.removesuffix(f" + {compensation}"), solid, points))
    figure = _figure(found, "experts per token", lines)
    # One scale for all, so that the eye compares them.
    most = max(row["degradation"] + 2 * row["degradation_standard_error"] for row in rows)
    least = min(row["degradation"] - 2 * row["degradation_standard_error"] for row in rows)
    figure.update_yaxes(range=[100 * (min(least, 0) - 0.03 * most), 103 * most])
    figure.update_xaxes(autorange="reversed")
    return Picture(
        name="policies-experts" if alone else f"policies-experts-{compensation}",
        title="What cuts cost" if alone else f"What cuts cost, compensation: {compensation}",
        caption="Lower is better; further right, fewer experts run. Bars are 95% intervals over "
        "documents. The grey line is the control: the same number of cuts, at random.",
        figure=figure,
    )


def speed_figure(found: Mapping[str, Any]) -> Picture | None:
    """Degradation against measured speedup, where it was timed."""
    lines = [line for line in _lines(found["rows"]) if all(p["speedup"] for p in line[2])]
    if not lines:
        return None
    return Picture(
        name="policies-speed",
        title="What cuts bring",
        caption="Measured speedup against the unmodified model; bars are 95% intervals over "
        "interleaved blocks.",
        figure=_figure(found, "speedup", lines),
    )


_Line = tuple[str, dict[str, Any], list[Mapping[str, Any]]]
"""Name, style and points."""


def _figure(found: Mapping[str, Any], x: str, lines: Sequence[_Line]) -> Any:
    """Perplexity change against experts per token or speedup, which has the error bars."""
    figure = empty_figure(x, "perplexity change, %", height=520)
    for name, style, points in lines:
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
            name=name,
            **bars,
            **style,
        )
    line_at(figure, f"bound {limit(found['max_degradation'])}", y=100 * found["max_degradation"])
    return figure


def _lines(rows: Sequence[Mapping[str, Any]]) -> list[_Line]:
    """Name, style and points of each policy and way of turning it, most experts first.

    A policy has one colour, and a dash for each compensation.
    """
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(row["name"], []).append(row)
    policies = list(dict.fromkeys((row["policy"], row.get("dial")) for row in rows))
    policies = [one for one in policies if one[0] != CONTROL]
    dashes = dict(
        zip(
            dict.fromkeys(row.get("compensation") for row in rows),
            ("solid", "dash", "dot", "dashdot"),
            strict=False,
        )
    )
    found = []
    for name, points in grouped.items():
        first = points[0]
        key = (first["policy"], first.get("dial"))
        colour = GREY if key[0] == CONTROL else SERIES[policies.index(key) % len(SERIES)]
        dash = dashes.get(first.get("compensation"), "solid")
        style = {"mode": "lines+markers", "line": {"color": colour, "dash": dash}}
        found.append((name, style, sorted(points, key=lambda row: -row["experts_per_token"])))
    return found


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
