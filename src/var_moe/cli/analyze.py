"""``var-moe analyze``: where a forward's time goes, with and without VAR, and what bounds it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from var_moe.cli.compensation import parse_compensation
from var_moe.cli.output import Answer
from var_moe.config import check_count
from var_moe.errors import UsageError

QUICK_SAMPLES = 20


def analyze(
    *,
    model: str = "demo",
    dataset: str = "demo",
    split: str = "validation",
    var_config: Path | None = None,
    n_samples: int = 100,
    quick: bool = False,
    profile: Path | None = None,
    compensation: str | None = None,
    output: Path = Path("results/phase5"),
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> Answer:
    """Systems analysis: components, scaling, roofline, bottlenecks, predicted speedup.

    Args:
        model: demo, a local folder, or a Hub id.
        dataset: demo (or demo-postgres, ...), wikitext, a Hub name[:config], or a local file.
        split: part of the text that is timed.
        var_config: a VAR configuration, or the best_config.json or certified_config.json of a
            search; by default the balanced preset.
        n_samples: documents of the text that is timed.
        quick: fewer documents and blocks; enough to see the picture.
        profile: profile folder; by default the one beside --var_config, else the calibration split
            is profiled first, where something is needed of a profile.
        compensation: folder of a learned compensation, where it is not the profile's own.
        output: folder for systems_analysis.json and profile_report.json; parts of it are written
            as soon as they are known.
        seed: draws the documents.
        device: auto, cpu, cuda, ...
        dtype: auto, float32, bfloat16, float16.
        threads: of torch on the CPU; by default its own choice.
        trust_remote_code: run a Hub model's own code.
        quiet: no progress.
    """
    from var_moe.cli.subject import Subject
    from var_moe.optimization.candidate import load_candidate, preset

    candidate = load_candidate(var_config) if var_config else preset("balanced")
    name, place = parse_compensation(compensation)
    if name is not None and place is None:
        raise UsageError(f"--compensation {name}: the configuration names it; expected a folder")
    check_count("threads", threads)
    subject = Subject(
        model=model,
        dataset=dataset,
        split=split,
        profile=profile,
        config=var_config,
        output=output,
        compensation=place,
        max_samples=min(n_samples, QUICK_SAMPLES) if quick else n_samples,
        seed=seed,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    subject.check(blocks=1, quiet=quiet)
    import torch

    from var_moe.analysis.systems import PROFILE_FILE, SYSTEMS_FILE, AnalysisSettings, analyse
    from var_moe.cli.progress import StageProgress
    from var_moe.cli.report import make_report
    from var_moe.growing import GrowingResult
    from var_moe.terminal import show

    if threads is not None:
        torch.set_num_threads(threads)
    with StageProgress() as progress, GrowingResult(output / SYSTEMS_FILE) as kept:
        shown = None if quiet else progress
        ready = subject.ready(shown, needs=candidate.needs, stand_ins=[candidate.compensation])
        systems = analyse(
            ready.evaluator,
            ready.profile,
            candidate,
            AnalysisSettings.quick() if quick else AnalysisSettings(),
            kept=kept,
            progress=shown,
        )
    components = systems.pop("profile")
    show(*tables(systems, components))
    print(f"Saved: {output / SYSTEMS_FILE}, {output / PROFILE_FILE}")
    make_report(output)
    return Answer(systems)


def tables(systems: Mapping[str, Any], components: Mapping[str, Any]) -> list[Any]:
    """What is printed: parts, scaling, roofline, bottlenecks, measured against predicted."""
    rows = [
        f"{row['severity'].upper()} {row['name'].replace('_', ' ')}: {row['evidence']}. What to "
        f"do: {row['recommendation']}."
        for row in systems["bottlenecks"]
    ]
    found, stats = systems["comparison"], systems["var"]["var_stats"]
    low, high = found["actual_speedup_95"]
    return [
        _components(components),
        _scaling(systems),
        _roofline(systems["roofline"]),
        *(rows or ["No bottleneck found."]),
        f"{systems['var']['kind']}: {stats['experts_per_token']:.3f} of {stats['top_k']} experts "
        f"per token; fast {stats['fast_pct']:.1f}%, cached {stats['cached_pct']:.1f}%, learned "
        f"{stats['learned_pct']:.1f}%. Speedup {found['actual_speedup']:.3f}x [{low:.3f}, "
        f"{high:.3f}] against {systems['baseline']['backend']}; the cost model predicts "
        f"{found['predicted_speedup']:.3f}x ({found['prediction_error_pct']:.1f}% off), and at "
        f"most {found['largest_speedup']:.3f}x with the leading experts everywhere.",
        *(f"Note: {note}" for note in systems["notes"]),
    ]


def _components(report: Mapping[str, Any]) -> Any:
    from var_moe.terminal import figures_table

    columns = ("mean ms", "share", "p50", "p99")
    table = figures_table("Where a forward's time goes", "component", *columns, *columns)

    def cells(row: Mapping[str, Any]) -> list[str]:
        share = f"{100 * row.get('share', 1):.1f}%"
        return [f"{row['mean_ms']:.2f}", share, f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}"]

    arms = [report["baseline"], report["var"]]
    for name in arms[0]["components"]:
        table.add_row(name, *(cell for arm in arms for cell in cells(arm["components"][name])))
    table.add_section()
    table.add_row("forward", *(cell for arm in arms for cell in cells(arm["forward"])))
    table.caption = "left: unmodified model; right: VAR"
    return table


def _scaling(systems: Mapping[str, Any]) -> Any:
    from var_moe.terminal import figures_table

    headings = ("batch x sequence", "baseline tokens/s", "VAR tokens/s", "speedup [95%]")
    table = figures_table("Scaling", "varied", *headings)
    for row in systems["scaling"]:
        low, high = row["speedup_95"]
        table.add_row(
            row["varied"].replace("_", " "),
            f"{row['batch_size']} x {row['sequence']}",
            f"{row['baseline_throughput_tps']:,.0f} ({row['baseline_backend']})",
            f"{row['var_throughput_tps']:,.0f}",
            f"{row['speedup']:.3f} [{low:.3f}, {high:.3f}]",
        )
    return table


def _roofline(found: Mapping[str, Any]) -> Any:
    from var_moe.terminal import figures_table

    machine = found["machine"]
    table = figures_table(
        f"Roofline: {found['total_parameters'] / 1e6:,.1f}M parameters; this machine: "
        f"{machine['gemm_flops_per_second'] / 1e9:,.1f} GFLOP/s, "
        f"{machine['copy_bytes_per_second'] / 1e9:,.1f} GB/s",
        *("", "active parameters", "GFLOP/s", "of GEMM", "GB/s", "of copy", "FLOP/byte", "bound"),
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
    return table
