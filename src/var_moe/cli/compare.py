"""``var-moe compare``: VAR and its peers at equal experts per token, on the same tokens."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from var_moe.errors import UsageError

TURNING_DOCUMENTS = 40
_COLUMNS = (
    *("name", "target_experts_per_token", "experts_per_token"),
    *("degradation", "degradation_standard_error", "degradation_upper_95"),
    *("degradation_of_random_skip", "speedup", "speedup_low", "speedup_high", "learned_pct"),
)


def compare(
    *,
    policies: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    model: str = "demo",
    dataset: str = "demo",
    split: str = "validation",
    experts: Annotated[list[float] | None, Parameter(consume_multiple=True)] = None,
    profile: Path | None = None,
    output: Path = Path("results/compare"),
    max_samples: int | None = 400,
    blocks: int = 8,
    max_degradation: float = 0.01,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> int:
    """Compare policies where they run equally many experts: what it costs, what it brings.

    Args:
        policies: names (or comma-separated), by default all; random_skip, the control, is
            always among them.
        model: demo, a local folder, or a Hub id.
        dataset: demo (or demo-postgres, ...), wikitext, a Hub name[:config], or a local file.
        split: part of the text to score.
        experts: experts per token to compare at; by default 87.5%, 75% and 62.5% of K.
        profile: profile folder; by default the calibration split is profiled first.
        output: folder for comparison.json, comparison.csv and comparison.html.
        max_samples: score at most so many documents.
        blocks: timed blocks per arm and policy.
        max_degradation: the bound drawn into the plot.
        seed: draws the documents when max_samples takes a part of them.
        device: auto, cpu, cuda, ...
        dtype: auto, float32, bfloat16, float16.
        trust_remote_code: run a Hub model's own code.
        quiet: no progress.
    """
    from var_moe.evaluation.sweep import CONTROL, require_policies
    from var_moe.evaluation.text import check_dataset
    from var_moe.models.loading import check_name
    from var_moe.optimization.objective_protocol import check_bound
    from var_moe.routing.registry import policy_names, policy_spec
    from var_moe.storage import check_output_folder

    check_output_folder(output)
    check_bound(max_degradation)
    if blocks < 1 or (max_samples is not None and max_samples < 2):
        raise UsageError("blocks: expected at least 1; max_samples: expected at least 2")
    asked = [name for entry in policies or [] for name in entry.split(",") if name]
    if not asked:
        asked = [name for name in policy_names() if policy_spec(name).dials(2)]
    names = require_policies([CONTROL, *asked])
    check_name(model)
    check_dataset(dataset)
    if not quiet:
        print(f"loading model {model} ...", file=sys.stderr, flush=True)
    from var_moe.cli.progress import StageProgress
    from var_moe.report.comparison import save_comparison
    from var_moe.storage import atomic_write_json

    with StageProgress() as progress:
        result = _measure(
            names,
            experts,
            model=model,
            dataset=dataset,
            split=split,
            profile=profile,
            output=output,
            max_samples=max_samples,
            blocks=blocks,
            max_degradation=max_degradation,
            seed=seed,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            progress=None if quiet else progress,
        )
    atomic_write_json(output / "comparison.json", result)
    _write_csv(result["rows"], output / "comparison.csv")
    saved = ["comparison.json", "comparison.csv"]
    try:
        save_comparison(result, output / "comparison.html")
        saved.append("comparison.html")
    except UsageError as error:
        result["notes"].append(str(error))
    _print(result)
    for note in result["notes"]:
        print(f"Note: {note}")
    print(f"Saved: {', '.join(str(output / name) for name in saved)}")
    return 0


def _measure(
    names: tuple[str, ...],
    experts: list[float] | None,
    *,
    model: str,
    dataset: str,
    split: str,
    profile: Path | None,
    output: Path,
    max_samples: int | None,
    blocks: int,
    max_degradation: float,
    seed: int,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    progress: Any,
) -> dict[str, Any]:
    from var_moe.evaluation.compare import Evaluator
    from var_moe.evaluation.sweep import check_targets, control_at, sweep
    from var_moe.evaluation.text import require_documents
    from var_moe.models.loading import load_model
    from var_moe.optimization.preparation import obtain_profile, read_text, sample_documents
    from var_moe.optimization.results import jsonable
    from var_moe.storage import SCHEMA_VERSION, provenance

    loaded = load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    targets = check_targets(experts, loaded.top_k)
    text = read_text(dataset, split, loaded)
    documents = sample_documents(text.documents, max_samples, seed)
    require_documents(documents, 2, "comparing perplexities")
    stats, _ = obtain_profile(loaded, dataset, given=profile, folder=output, progress=progress)
    if stats.peers is None:
        raise UsageError(
            f"profile {profile}: made by an earlier version, without what other policies need; "
            f"make it again with `var-moe profile --model {model}`"
        )
    evaluator = Evaluator(loaded, documents, progress=progress)
    turning = evaluator.with_documents(sample_documents(documents, TURNING_DOCUMENTS, seed))
    turning.progress = None
    points = list(
        sweep(
            evaluator,
            turning,
            names,
            stats.calibration(),
            targets=targets,
            blocks=blocks,
            progress=progress,
        )
    )
    rows = []
    for point in points:
        executed = point.quality.report.experts_per_token
        cost = control_at(points, executed, evaluator.top_k)
        row = {"name": point.name, **point.to_dict(), "degradation_of_random_skip": cost}
        rows.append(row)
    notes = evaluator.timing_notes()
    if text.data_hash == stats.head["data_hash"]:
        notes.append("this text was profiled: policies look better on it than on unseen text")
    found: dict[str, Any] = jsonable(
        {
            "schema_version": SCHEMA_VERSION,
            "rows": rows,
            "targets_experts_per_token": list(targets),
            "max_degradation": max_degradation,
            "baseline": {
                "perplexity": evaluator.baseline_losses.perplexity,
                "backend": evaluator.baseline_backend,
                "experts_per_token": evaluator.top_k,
            },
            "notes": notes,
            "documents": len(documents),
            "text": text.to_dict(),
            "profile_hash": stats.hash,
            "setting": evaluator.setting.to_dict(),
            "model": {"name": loaded.name, "revision": loaded.revision, "dtype": loaded.dtype},
            "seed": seed,
            "provenance": provenance(),
        }
    )
    return found


def _write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    import pandas as pd

    from var_moe.storage import atomic_write

    flat = [
        {**row, "speedup_low": row["speedup_95"][0], "speedup_high": row["speedup_95"][1]}
        for row in rows
    ]
    frame = pd.DataFrame(flat, columns=list(_COLUMNS))
    atomic_write(path, lambda temporary: frame.to_csv(temporary, index=False))


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
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
            cost, (low, high) = row["degradation_of_random_skip"], row["speedup_95"]
            table.add_row(
                row["name"],
                f"{row['experts_per_token']:.3f}",
                f"{100 * row['degradation']:+.2f}%",
                f"{100 * row['degradation_standard_error']:.2f}",
                "" if cost is None else f"{100 * cost:+.2f}%",
                f"{row['speedup']:.3f}x",
                f"{low:.3f}-{high:.3f}",
            )
        table.add_section()
    Console(width=None if sys.stdout.isatty() else 118).print(table)
