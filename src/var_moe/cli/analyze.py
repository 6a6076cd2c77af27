"""``var-moe analyze``: where a forward's time goes, with and without VAR, and what bounds it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from var_moe.cli.options import ModelOptions, RunOptions, TextOptions, parse_compensation
from var_moe.cli.output import SPEEDUP, TIERS, CommandResult, finish, table

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
) -> CommandResult:
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
    from var_moe.analysis.pipeline import PROFILE_FILE, SYSTEMS_FILE, AnalysisSettings, analyse
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
    show(*_parts(systems, components))
    finish({"notes": systems["notes"]}, output / SYSTEMS_FILE, output / PROFILE_FILE, report=output)
    return CommandResult(systems)


def _parts(systems: Mapping[str, Any], components: Mapping[str, Any]) -> list[Any]:
    """What is printed: parts, scaling, roofline, bottlenecks, measured against predicted."""
    stats, comparison = systems["var"]["var_stats"], systems["comparison"]
    low, high = comparison["actual_speedup_95"]
    return [
        _components(components),
        _scaling(systems["scaling"]),
        _roofline(systems["roofline"]),
        *(
            f"{row['severity'].upper()} {row['name'].replace('_', ' ')}: {row['evidence']}. What "
            f"to do: {row['recommendation']}."
            for row in systems["bottlenecks"]
        ),
        f"{systems['var']['kind']}: {stats['experts_per_token']:.3f} of {stats['top_k']} experts "
        f"per token; fast/cached/learned {TIERS.format_map(stats)}%. Speedup "
        f"{comparison['actual_speedup']:.3f}x [{low:.3f}, {high:.3f}] against "
        f"{systems['baseline']['backend']}; the cost model predicts "
        f"{comparison['predicted_speedup']:.3f}x ({comparison['prediction_error_pct']:.1f}% off), "
        f"and at most {comparison['largest_speedup']:.3f}x with the leading experts everywhere.",
    ]


def _components(report: Mapping[str, Any]) -> Any:
    columns = {"component": "{name}"}
    for arm in ("baseline", "var"):
        columns |= {
            f"{arm} ms": f"{{{arm}[mean_ms]:.2f}}",
            f"{arm} share": f"{{{arm}[share]:.1%}}",
            f"{arm} p99": f"{{{arm}[p99_ms]:.2f}}",
        }
    arms = {
        arm: {**report[arm]["components"], "forward": {"share": 1.0, **report[arm]["forward"]}}
        for arm in ("baseline", "var")
    }
    rows = [
        {"name": name, **{arm: of[name] for arm, of in arms.items()}} for name in arms["baseline"]
    ]
    return table("Where a forward's time goes", columns, rows)


def _scaling(rows: Iterable[Mapping[str, Any]]) -> Any:
    columns = {
        "batch x sequence": "{batch_size} x {sequence}",
        "baseline tokens/s": "{baseline_throughput_tps:,.0f} ({baseline_backend})",
        "VAR tokens/s": "{var_throughput_tps:,.0f}",
        "speedup [95%]": SPEEDUP,
    }
    return table("Scaling", columns, rows)


def _roofline(roofline: Mapping[str, Any]) -> Any:
    columns = {
        "": "{name}",
        "active parameters": "{active_parameters:.2e}",
        "FLOP/s": "{achieved_flops_per_second:.2e}",
        "of GEMM": "{share_of_gemm:.0%}",
        "byte/s": "{achieved_bytes_per_second:.2e}",
        "of copy": "{share_of_copy:.0%}",
        "FLOP/byte": "{arithmetic_intensity_flops_per_byte:.1f}",
        "bound": "{bound}",
        "peak bytes": "{peak_memory_bytes:.2e}",
    }
    rows = [{"name": arm, **roofline[arm]} for arm in ("baseline", "var")]
    return table("Roofline", columns, rows)
