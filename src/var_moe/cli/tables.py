"""Tables on stdout for results that are plain dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from var_moe.terminal import show


def print_validation(result: Mapping[str, Any], *, folder: Path) -> None:
    """The result of ``--validate``: figures, factors, criteria."""
    from rich.table import Table

    from var_moe.optimization.summary import MET

    text, low_high = result["text"], result["speedup_95"]
    show(
        f"{text['dataset']} ({text['split']}): perplexity "
        f"{result['baseline_perplexity']:.3f} -> {result['perplexity']:.3f}, "
        f"{100 * result['degradation']:+.2f}% (95% upper bound "
        f"{100 * result['degradation_upper_95']:+.2f}%, {result['documents']} documents)",
    )
    if result.get("worst_dataset"):
        show(
            f"judged on the worst data set, {result['worst_dataset']}: "
            f"{100 * result['worst_degradation']:+.2f}% (95% upper bound "
            f"{100 * result['worst_degradation_upper_95']:+.2f}%, "
            f"{result['worst_documents']} documents)",
        )
    print_apart(result["by_dataset"], title="Each data set by itself")
    back, skip = result["backend_factor"], result["skipping_factor"]
    own = result["backend"]
    show(
        f"speedup {result['speedup']:.3f}x [{low_high[0]:.3f}, {low_high[1]:.3f}] against "
        f"{result['baseline_backend']} ~ backend ({own}) {back['median']:.3f} x "
        f"skipping {skip['median']:.3f} "
        f"(the executed pairs predict {result['predicted_speedup']:.3f}x); "
        f"{result['baseline_throughput_tps']:,.0f} -> "
        f"{result['throughput_tps']:,.0f} tokens/s; baseline against itself "
        f"{result['noise_floor']['median']:.3f}",
    )
    show(
        f"{result['experts_per_token']:.3f} of {result['top_k']} experts per token; fast "
        f"{result['fast_pct']:.1f}%, cached {result['cached_pct']:.1f}%, learned "
        f"{result['learned_pct']:.1f}%; speedups of {len(result['runs'])} runs: "
        + ", ".join(f"{run['speedup']:.3f}" for run in result["runs"]),
    )
    control = result["random_skip"]
    show(
        f"control: random skipping at {control['experts_per_token']:.3f} experts per token costs "
        f"{100 * control['degradation']:+.2f}%",
    )
    table = Table(title="Success criteria", title_justify="left")
    for heading in ("criterion", "measured", "met"):
        table.add_column(heading)
    for row in result["criteria"]:
        table.add_row(row["name"], row["measured"], MET[row["met"]])
    show(table)
    for note in result["notes"]:
        show(f"Note: {note}")
    show(f"Saved: {folder / 'validation_results.json'}")


def print_comparison(rows: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """The table of ``var-moe evaluate``."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in ("", "PPL", "change (95% upper)", "tokens/s", "speedup [95%]"):
        table.add_column(heading, justify="left" if not heading else "right")
    for heading in ("experts/token", "fast/cached/learned %", "cache hits %"):
        table.add_column(heading, justify="right")
    for row in rows:
        if row["name"] == "baseline":
            table.add_row(
                f"baseline ({row['backend']})",
                f"{row['perplexity']:.3f}",
                "",
                f"{row['throughput_tps']:,.0f}",
                "1.00",
                f"{row['experts_per_token']:.2f}",
                "0 / 0 / 100",
                "",
            )
            continue
        low, high = row["speedup_95"]
        table.add_row(
            row["name"],
            f"{row['perplexity']:.3f}",
            f"{100 * row['degradation']:+.2f}% ({100 * row['degradation_upper_95']:+.2f}%)",
            f"{row['throughput_tps']:,.0f}",
            f"{row['speedup']:.3f} [{low:.3f}, {high:.3f}]",
            f"{row['experts_per_token']:.3f}",
            f"{row['fast_pct']:.1f} / {row['cached_pct']:.1f} / {row['learned_pct']:.1f}",
            f"{100 * row['cache_hit_rate']:.1f}",
        )
    show(table)


def print_apart(rows: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Each data set by itself, where there are several."""
    from var_moe.optimization.summary import apart_table

    if rows:
        show(apart_table(rows, title=title))


def print_described(rows: Sequence[Mapping[str, Any]]) -> None:
    """A certificate's data sets, with pages as the units."""
    from var_moe.terminal import figures_table

    if not rows:
        return
    claimed = "descriptive, not claimed" if rows[0]["descriptive"] else "the claim is about each"
    table = figures_table(
        f"Each data set ({claimed})",
        *("data set", "pages", "PPL baseline", "PPL", "change", "upper", "experts/token"),
    )
    for row in rows:
        low, high = row["degradation_interval"]
        table.add_row(
            row["dataset"],
            f"{row['units']:,}",
            f"{row['baseline_perplexity']:.3f}",
            f"{row['perplexity']:.3f}",
            f"{100 * row['degradation']:+.2f}% [{100 * low:.2f}, {100 * high:.2f}]",
            f"{100 * row['degradation_upper']:+.2f}%",
            f"{row['experts_per_token']:.3f}",
        )
    show(table)


def print_decoding(rows: Sequence[Mapping[str, Any]]) -> None:
    """Generation's part of ``var-moe evaluate``, where it was timed."""
    from rich.table import Table

    table = Table(title="generation, greedy", title_justify="left")
    table.add_column("")
    for heading in ("batch", "new tokens", "tokens/s", "speedup [95%]", "baseline", "tokens/s"):
        table.add_column(heading, justify="right")
    for row in rows:
        for one in row.get("decode") or ():
            low, high = one["speedup_95"]
            table.add_row(
                row["name"],
                str(one["batch_size"]),
                str(one["new_tokens"]),
                f"{one['throughput_tps']:,.0f}",
                f"{one['speedup']:.3f} [{low:.3f}, {high:.3f}]",
                one["baseline_backend"],
                f"{one['baseline_throughput_tps']:,.0f}",
            )
    if table.row_count:
        show(table)


def print_policies(result: Mapping[str, Any]) -> None:
    """The table of ``var-moe compare``."""
    from rich.table import Table

    text, baseline = result["text"], result["baseline"]
    table = Table(
        title=f"{result['model']['name']} on {text['dataset']} ({text['split']}, "
        f"{result['documents']} documents), perplexity {baseline['perplexity']:.3f}"
    )
    table.add_column("policy")
    for column in ("experts/token", "PPL change", "± s.e.", "random skip", "speedup", "95%"):
        table.add_column(column, justify="right")
    for target in result["targets_experts_per_token"]:
        rows = [r for r in result["rows"] if r["target_experts_per_token"] == target]
        for row in sorted(rows, key=lambda row: row["degradation"]):
            cost, speed, interval = row["degradation_of_random_skip"], "", ""
            if row["speedup"] is not None:
                speed = f"{row['speedup']:.3f}x"
                interval = "{:.3f}-{:.3f}".format(*row["speedup_95"])
            table.add_row(
                row["name"],
                f"{row['experts_per_token']:.3f}",
                f"{100 * row['degradation']:+.2f}%",
                f"{100 * row['degradation_standard_error']:.2f}",
                "" if cost is None else f"{100 * cost:+.2f}%",
                speed,
                interval,
            )
        table.add_section()
    show(table)


def front_answer(best: Mapping[str, Any], max_degradation: float) -> str:
    """The verified point that answers a bound, in one sentence."""
    limit, speed = f"{100 * max_degradation:g}%", "not timed"
    if best["speedup_95"]:  # none where the point broke the bound of its own search
        speed = "{:.3f}x [{:.3f}, {:.3f}]".format(best["speedup"], *best["speedup_95"])
    return (
        f"Fastest verified configuration with degradation below {limit}: {speed} at "
        f"{100 * best['degradation']:+.2f}% perplexity "
        f"(95% upper bound {100 * best['degradation_upper_95']:+.2f}%), "
        f"{best['experts_per_token']:.2f} experts per token"
    )


def print_front(points: Sequence[Mapping[str, Any]], *, max_degradation: float) -> None:
    """The verified points of a search's front."""
    from rich.table import Table

    limit = f"{100 * max_degradation:g}%"
    table = Table(title="Verified points, the safest first", title_justify="left")
    for heading in ("", "change (95% upper)", "speedup [95%]", "experts/token", "keeps " + limit):
        table.add_column(heading, justify="right" if heading else "left")
    for point in points:
        if not point["verified"]:
            continue
        ends = point["speedup_95"]
        table.add_row(
            point["name"],
            f"{100 * point['degradation']:+.2f}% ({100 * point['degradation_upper_95']:+.2f}%)",
            f"{point['speedup']:.3f} [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "not timed",
            f"{point['experts_per_token']:.3f}",
            "yes" if point["degradation_upper_95"] < max_degradation else "no",
        )
    show(table)
