"""The best score after n full evaluations, as SVG and, where plotly is installed, as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from var_moe.storage import atomic_write

COLOURS = ("#bbbbbb", "#ccbb44", "#4477aa", "#228833", "#ee6677")
TITLE = "Best feasible score after n full evaluations (median and quartiles over seeds)"
X_TITLE, Y_TITLE = "full evaluations", "best feasible score, search text"
WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 184, 40, 52

Curves = Mapping[str, Mapping[str, Sequence[float]]]
"""By label: low, median and high after 1, 2, ... evaluations."""


def svg_plot(curves: Curves) -> str:
    """A standalone SVG: a line and a band per method; a dashed line goes on where it ended."""
    last = max(len(one["median"]) for one in curves.values())
    values = [v for one in curves.values() for name in ("low", "high") for v in one[name]]
    low, high = min(values), max(values)
    pad = 0.05 * (high - low or 0.1)
    low, high = low - pad, high + pad

    def x(number: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (number - 1) / max(last - 1, 1)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    def path(points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{x(n):.1f},{y(v):.1f}" for n, v in points)

    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="13">{TITLE}</text>',
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{X_TITLE}</text>',
        f'<text transform="translate(16 {(TOP + bottom) / 2}) rotate(-90)" '
        f'text-anchor="middle">{Y_TITLE}</text>',
    ]
    for step in range(6):
        value = low + (high - low) * step / 5
        at = y(value)
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}" stroke="#eee"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:.2f}</text>')
    for number in sorted({1, last, *range(10, last, 10)}):
        parts.append(
            f'<text x="{x(number):.1f}" y="{bottom + 16}" text-anchor="middle">{number}</text>'
        )
    for place, (label, one) in enumerate(curves.items()):
        colour = COLOURS[place % len(COLOURS)]
        count = len(one["median"])
        numbers = range(1, count + 1)
        band = [*zip(numbers, one["low"], strict=True)]
        band += reversed([*zip(numbers, one["high"], strict=True)])
        line = [*zip(numbers, one["median"], strict=True)]
        parts.append(f'<polygon points="{path(band)}" fill="{colour}" opacity="0.15"/>')
        parts.append(_line(path(line), colour))
        if count < last:
            parts.append(_line(path([line[-1], (last, line[-1][1])]), colour, dashed=True))
        at = TOP + 10 + 20 * place
        parts.append(
            f'<line x1="{right + 14}" x2="{right + 38}" y1="{at}" y2="{at}" stroke="{colour}" '
            f'stroke-width="3"/><text x="{right + 44}" y="{at + 4}">{label}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def html_plot(curves: Curves, path: Path) -> bool:
    """The same with plotly, whose script the page takes from the network; False without plotly."""
    try:
        import plotly.graph_objects as go
    except ImportError:
        return False
    figure = go.Figure()
    for place, (label, one) in enumerate(curves.items()):
        colour = COLOURS[place % len(COLOURS)]
        numbers = list(range(1, len(one["median"]) + 1))
        style = {"mode": "lines", "legendgroup": label, "line_color": colour}
        figure.add_scatter(
            x=numbers + numbers[::-1],
            y=[*one["low"], *reversed(one["high"])],
            fill="toself",
            opacity=0.2,
            line_width=0,
            showlegend=False,
            hoverinfo="skip",
            **style,
        )
        figure.add_scatter(x=numbers, y=list(one["median"]), name=label, **style)
    figure.update_layout(
        title=TITLE, xaxis_title=X_TITLE, yaxis_title=Y_TITLE, template="plotly_white"
    )
    atomic_write(path, lambda temporary: figure.write_html(temporary, include_plotlyjs="cdn"))
    return True


def _line(points: str, colour: str, *, dashed: bool = False) -> str:
    style = ' stroke-dasharray="2 5"' if dashed else ""
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{style}/>'
