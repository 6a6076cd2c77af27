"""``var-moe analyze``: where a forward's time goes, with and without VAR, and what bounds it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from var_moe.cli.options import ModelOptions, RunOptions, TextOptions, parse_compensation
from var_moe.cli.output import SPEEDUP, Answer, finish, table

QUICK_SAMPLES = 20


def analyze(
    *,
    model: ModelOptions = ModelOptions(),
    text: TextOptions = TextOptions(),
    var_config: Path | None = None,
    n_samples: int = 100,
    quick: bool = False,
    profile: Path | None = None,
    compensation: str | None = None,
    output: Path = Path("results/phase5"),
    run: RunOptions = RunOptions(),
) -> Answer:
    """Systems analysis: components, scaling, roofline, bottlenecks, predicted speedup.

    Args:
        var_config: a VAR configuration, or the best_config.json or certified_config.json of a
            search; by default the balanced preset.
        n_samples: documents of the text that is timed.
        quick: fewer documents and blocks; enough to see the picture.
        profile: profile folder; by default the one beside --var_config, else the calibration split
            is profiled first, where something is needed of a profile.
        compensation: folder of a learned compensation, where it is not the profile's own.
        output: folder for systems_analysis.json and profile_report.json; parts of it are written
            as soon as they are known.
    """
    from var_moe.cli.subject import Subject
    from var_moe.optimization.candidate import load_candidate, preset

    candidate = load_candidate(var_config) if var_config else preset("balanced")
    _, place = parse_compensation(compensation, folder_only=True)
    subject = Subject(
        model=model,
        text=text,
        run=run,
        profile=profile,
        config=var_config,
        output=output,
        compensation=place,
        max_samples=min(n_samples, QUICK_SAMPLES) if quick else n_samples,
    )
    subject.check(blocks=1)
    from var_moe.analysis.systems import PROFILE_FILE, SYSTEMS_FILE, AnalysisSettings, analyse
    from var_moe.growing import GrowingResult
    from var_moe.terminal import show

    with run.progress() as progress, GrowingResult(output / SYSTEMS_FILE) as kept:
        ready = subject.ready(progress, needs=candidate.needs, stand_ins=[candidate.compensation])
        systems = analyse(
            ready.evaluator,
            ready.profile,
            candidate,
            AnalysisSettings.quick() if quick else AnalysisSettings(),
            kept=kept,
            progress=progress,
        )
    components = systems.pop("profile")
    show(*tables(systems, components))
    finish({}, output / SYSTEMS_FILE, output / PROFILE_FILE, report=output)
    return Answer(systems)


def tables(systems: Mapping[str, Any], components: Mapping[str, Any]) -> list[Any]:
    """What is printed: parts, scaling, roofline, bottlenecks, measured against predicted."""
    rows = [
        f"{row['severity'].upper()} {row['name'].replace('_', ' ')}: {row['evidence']}. What to "
        f"do: {row['recommendation']}."
        for row in systems["bottlenecks"]
    ]
    comparison, stats = systems["comparison"], systems["var"]["var_stats"]
    low, high = comparison["actual_speedup_95"]
    return [
        _components(components),
        _scaling(systems),
        _roofline(systems["roofline"]),
        *(rows or ["No bottleneck found."]),
        f"{systems['var']['kind']}: {stats['experts_per_token']:.3f} of {stats['top_k']} experts "
        f"per token; fast {stats['fast_pct']:.1f}%, cached {stats['cached_pct']:.1f}%, learned "
        f"{stats['learned_pct']:.1f}%. Speedup {comparison['actual_speedup']:.3f}x [{low:.3f}, "
        f"{high:.3f}] against {systems['baseline']['backend']}; the cost model predicts "
        f"{comparison['predicted_speedup']:.3f}x ({comparison['prediction_error_pct']:.1f}% off), "
        f"and at most {comparison['largest_speedup']:.3f}x with the leading experts everywhere.",
        *(f"Note: {note}" for note in systems["notes"]),
    ]


def _components(report: Mapping[str, Any]) -> Any:
    arms = {"base": report["baseline"], "var": report["var"]}
    columns = {"component": "{name}"}
    for arm, blank in (("base", ""), ("var", " ")):  # the same headings twice
        columns |= {
            f"mean ms{blank}": f"{{{arm}[mean_ms]:.2f}}",
            f"share{blank}": f"{{{arm}[share]:.1%}}",
            f"p50{blank}": f"{{{arm}[p50_ms]:.2f}}",
            f"p99{blank}": f"{{{arm}[p99_ms]:.2f}}",
        }
    rows: list[dict[str, Any]] = [
        {"name": name, **{arm: of["components"][name] for arm, of in arms.items()}}
        for name in report["baseline"]["components"]
    ]
    whole = {arm: {"share": 1.0, **of["forward"]} for arm, of in arms.items()}
    made = table("Where a forward's time goes", columns, [*rows, {"name": "forward", **whole}])
    made.rows[-2].end_section = True
    made.caption = "left: unmodified model; right: VAR"
    return made


def _scaling(systems: Mapping[str, Any]) -> Any:
    columns = {
        "varied": "{what}",
        "batch x sequence": "{batch_size} x {sequence}",
        "baseline tokens/s": "{baseline_throughput_tps:,.0f} ({baseline_backend})",
        "VAR tokens/s": "{var_throughput_tps:,.0f}",
        "speedup [95%]": SPEEDUP,
    }
    rows = [{**row, "what": row["varied"].replace("_", " ")} for row in systems["scaling"]]
    return table("Scaling", columns, rows)


def _roofline(roofline: Mapping[str, Any]) -> Any:
    machine = roofline["machine"]
    columns = {
        "": "{name}",
        "active parameters": "{millions:,.1f}M",
        "GFLOP/s": "{gflops:,.1f}",
        "of GEMM": "{share_of_gemm:.0%}",
        "GB/s": "{gbytes:,.1f}",
        "of copy": "{share_of_copy:.0%}",
        "FLOP/byte": "{arithmetic_intensity_flops_per_byte:.1f}",
        "bound": "{bound}",
        "peak memory": "{mib:,.0f} MiB",
    }
    rows = [
        {
            **row,
            "name": name,
            "millions": row["active_parameters"] / 1e6,
            "gflops": row["achieved_flops_per_second"] / 1e9,
            "gbytes": row["achieved_bytes_per_second"] / 1e9,
            "mib": row["peak_memory_bytes"] / 2**20,
        }
        for name, row in ((name, roofline[name]) for name in ("baseline", "var"))
    ]
    title = (
        f"Roofline: {roofline['total_parameters'] / 1e6:,.1f}M parameters; this machine: "
        f"{machine['gemm_flops_per_second'] / 1e9:,.1f} GFLOP/s, "
        f"{machine['copy_bytes_per_second'] / 1e9:,.1f} GB/s"
    )
    return table(title, columns, rows)
