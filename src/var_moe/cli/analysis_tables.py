"""The tables of ``var-moe analyze``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from var_moe.terminal import show


def print_analysis(
    systems: Mapping[str, Any], components: Mapping[str, Any], *, folder: Path
) -> None:
    """All tables, and where the files are."""
    print_components(components)
    print_scaling(systems["scaling"])
    print_roofline(systems["roofline"])
    print_bottlenecks(systems["bottlenecks"])
    print_systems(systems)
    for note in systems["notes"]:
        print(f"Note: {note}")
    print(f"Saved: {folder / 'systems_analysis.json'}, {folder / 'profile_report.json'}")


def _table(title: str, left: str, *right: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column(left)
    for heading in right:
        table.add_column(heading, justify="right")
    return table


def print_components(report: Mapping[str, Any]) -> None:
    """Milliseconds of each part, the unmodified model beside VAR."""
    columns = ("mean ms", "share", "p50", "p99")
    table = _table("Where a forward's time goes", "component", *columns, *columns)
    names = list(report["baseline"]["components"])
    for name in names:
        rows = [report[arm]["components"][name] for arm in ("baseline", "var")]
        cells = []
        for row in rows:
            cells += [f"{row['mean_ms']:.2f}", f"{100 * row['share']:.1f}%"]
            cells += [f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}"]
        table.add_row(name, *cells)
    totals = [report[arm]["forward"] for arm in ("baseline", "var")]
    cells = []
    for row in totals:
        cells += [f"{row['mean_ms']:.2f}", "100%", f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}"]
    table.add_section()
    table.add_row("forward", *cells)
    table.caption = "left: unmodified model; right: VAR"
    show(table)


def print_scaling(rows: Sequence[Mapping[str, Any]]) -> None:
    """Throughput and speedup by sequence length and batch size."""
    table = _table(
        "Scaling",
        "varied",
        "batch x sequence",
        "baseline tokens/s",
        "VAR tokens/s",
        "speedup [95%]",
    )
    for row in rows:
        low, high = row["speedup_95"]
        table.add_row(
            row["varied"].replace("_", " "),
            f"{row['batch_size']} x {row['sequence']}",
            f"{row['baseline_throughput_tps']:,.0f} ({row['baseline_backend']})",
            f"{row['var_throughput_tps']:,.0f}",
            f"{row['speedup']:.3f} [{low:.3f}, {high:.3f}]",
        )
    show(table)


def print_roofline(found: Mapping[str, Any]) -> None:
    """What is reached of what the machine can."""
    machine = found["machine"]
    table = _table(
        f"Roofline: {found['total_parameters'] / 1e6:,.1f}M parameters; this machine: "
        f"{machine['gemm_flops_per_second'] / 1e9:,.1f} GFLOP/s, "
        f"{machine['copy_bytes_per_second'] / 1e9:,.1f} GB/s",
        "",
        *("active parameters", "GFLOP/s", "of GEMM", "GB/s", "of copy", "FLOP/byte", "bound"),
        "peak memory",
    )
    for name in ("baseline", "var"):
        row = found[name]
        table.add_row(
            name,
            f"{row['active_parameters'] / 1e6:,.1f}M",
            f"{row['achieved_flops_per_second'] / 1e9:,.1f}",
            f"{100 * row['share_of_gemm']:.0f}%",
            f"{row['achieved_bytes_per_second'] / 1e9:,.1f}",
            f"{100 * row['share_of_copy']:.0f}%",
            f"{row['arithmetic_intensity_flops_per_byte']:.1f}",
            row["bound"],
            f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB",
        )
    show(table)


def print_bottlenecks(rows: Sequence[Mapping[str, Any]]) -> None:
    """In plain words."""
    if not rows:
        show("No bottleneck found.")
    for row in rows:
        name = row["name"].replace("_", " ")
        show(
            f"{row['severity'].upper()} {name}: {row['evidence']}. What to do: "
            f"{row['recommendation']}.",
        )


def print_systems(systems: Mapping[str, Any]) -> None:
    """Measured against predicted."""
    found, stats = systems["comparison"], systems["var"]["var_stats"]
    low, high = found["actual_speedup_95"]
    show(
        f"{systems['var']['kind']}: {stats['experts_per_token']:.3f} of {stats['top_k']} experts "
        f"per token; fast {stats['fast_pct']:.1f}%, cached {stats['cached_pct']:.1f}%, learned "
        f"{stats['learned_pct']:.1f}%. Speedup {found['actual_speedup']:.3f}x [{low:.3f}, "
        f"{high:.3f}] against {systems['baseline']['backend']}; the cost model predicts "
        f"{found['predicted_speedup']:.3f}x ({found['prediction_error_pct']:.1f}% off), and at "
        f"most {found['largest_speedup']:.3f}x with the leading experts everywhere.",
    )
