"""``var-moe compare``: VAR and its peers at equal experts per token, on the same tokens."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from var_moe.cli.compensation import parse_compensation
from var_moe.cli.output import Answer
from var_moe.errors import UsageError

if TYPE_CHECKING:
    from var_moe.cli.subject import Ready, Subject
    from var_moe.evaluation.compare import Progress
    from var_moe.evaluation.sweep import Point

TURNING_DOCUMENTS = 40
_COLUMNS = (
    *("name", "target_experts_per_token", "experts_per_token"),
    *("degradation", "degradation_standard_error", "degradation_upper_95"),
    *("degradation_of_random_skip", "speedup", "speedup_low", "speedup_high", "learned_pct"),
    *("policy", "dial", "compensation"),
)


def compare(
    *,
    policies: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    model: str = "demo",
    dataset: str = "demo",
    split: str = "validation",
    experts: Annotated[list[float] | None, Parameter(consume_multiple=True)] = None,
    compensation: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    from_: Annotated[Path | None, Parameter(name="--from")] = None,
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
) -> Answer:
    """Compare policies where they run equally many experts: what it costs, what it brings.

    Args:
        policies: names (or comma-separated), by default all; random_skip, the control, is
            always among them.
        model: demo, a local folder, or a Hub id.
        dataset: demo (or demo-postgres, ...), wikitext, a Hub name[:config], or a local file.
        split: part of the text to score.
        experts: experts per token to compare at; by default 87.5%, 75% and 62.5% of K.
        compensation: what stands in for dropped experts, for all policies that only drop: none,
            means, learned, or the folder of a fitted one; several are compared. By default each
            policy does as it is made.
        from_: folder of an earlier comparison: its settings are measured again, on another --split
            or --dataset, and nothing is turned.
        profile: profile folder; by default the calibration split is profiled first.
        output: folder for comparison.json, comparison.csv and report.html.
        max_samples: score at most so many documents.
        blocks: timed blocks per arm and policy; 0 leaves the timing out.
        max_degradation: the bound drawn into the plot.
        seed: draws the documents when max_samples takes a part of them.
        device: auto, cpu, cuda, ...
        dtype: auto, float32, bfloat16, float16.
        trust_remote_code: run a Hub model's own code.
        quiet: no progress.
    """
    from var_moe.cli.subject import Subject
    from var_moe.evaluation.sweep import CONTROL, require_policies
    from var_moe.optimization.objective_protocol import check_bound
    from var_moe.routing.registry import policy_names, policy_spec

    check_bound(max_degradation)
    earlier = _earlier(from_, output, policies=policies, experts=experts)
    asked = [name for entry in policies or [] for name in entry.split(",") if name]
    if not asked:
        asked = [name for name in policy_names() if policy_spec(name).dials(2)]
    names = require_policies([CONTROL, *asked])
    given = [entry for one in compensation or [] for entry in one.split(",") if entry]
    parsed = [parse_compensation(entry) for entry in given]
    folders = [folder for _, folder in parsed if folder is not None]
    if len(folders) > 1:
        raise UsageError("--compensation: expected one folder at the most")
    subject = Subject(
        model=model,
        dataset=dataset,
        split=split,
        profile=profile,
        output=output,
        compensation=folders[0] if folders else None,
        max_samples=max_samples,
        seed=seed,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    if blocks < 0:
        raise UsageError(f"blocks = {blocks}: expected at least 0")
    subject.check(blocks=max(1, blocks), quiet=quiet)
    from var_moe.cli.progress import StageProgress
    from var_moe.cli.report import make_report
    from var_moe.cli.tables import print_policies
    from var_moe.storage import atomic_write_json

    with StageProgress() as progress:
        result = _measure(
            names,
            experts,
            subject,
            earlier=earlier,
            compensations=[name for name, _ in parsed] or [None],
            blocks=blocks,
            max_degradation=max_degradation,
            progress=None if quiet else progress,
        )
    atomic_write_json(output / "comparison.json", result)
    _write_csv(result["rows"], output / "comparison.csv")
    print_policies(result)
    for note in result["notes"]:
        print(f"Note: {note}")
    print(f"Saved: {output / 'comparison.json'}, {output / 'comparison.csv'}")
    make_report(output)
    return Answer(result)


def _measure(
    names: tuple[str, ...],
    experts: list[float] | None,
    subject: Subject,
    *,
    earlier: dict[str, Any] | None,
    compensations: list[str | None],
    blocks: int,
    max_degradation: float,
    progress: Progress | None,
) -> dict[str, Any]:
    from var_moe.evaluation.again import measure_again
    from var_moe.evaluation.sweep import check_targets, control_at
    from var_moe.models.checks import check_droppable

    ready = subject.ready(progress)
    check_droppable(ready.loaded.name, ready.loaded.top_k)
    evaluator = ready.evaluator
    targets = check_targets(experts, evaluator.top_k)
    if ready.profile.peers is None:
        raise UsageError(
            f"profile {subject.profile}: made by an earlier version, without what other policies "
            f"need; make it again with `var-moe profile --model {shlex.quote(subject.model)}`"
        )
    stand_ins = ready.profile.compensations()
    hashes = {name: one.hash for name, one in stand_ins.items() if one is not None}
    if earlier is None:
        points = _turned(names, ready, targets, compensations, blocks, progress)
    else:
        known = earlier.get("compensation_hashes", {})
        if earlier["profile_hash"] != ready.profile.hash:
            raise UsageError(
                f"--from: measured with profile {earlier['profile_hash'][:12]}, but --profile is "
                f"{ready.profile.hash[:12]}; give the same one"
            )
        other = [name for name, value in hashes.items() if known.get(name, value) != value]
        if other:
            raise UsageError(
                f"--from: compensation {other[0]!r} was another one there; give its folder with "
                "--compensation"
            )
        targets = tuple(earlier["targets_experts_per_token"])
        chosen = [row for row in earlier["rows"] if _wanted(row, compensations)]
        calibration = ready.profile.calibration
        points = list(
            measure_again(evaluator, chosen, calibration, blocks=blocks, progress=progress)
        )
    rows = []
    for point in points:
        executed = point.quality.report.experts_per_token
        alike = [one for one in points if one.compensation == point.compensation]
        cost = control_at(alike, executed, evaluator.top_k)
        rows.append({"name": point.name, **point.to_dict(), "degradation_of_random_skip": cost})
    return ready.result(
        rows,
        targets_experts_per_token=list(targets),
        compensation_hashes=hashes,
        max_degradation=max_degradation,
        baseline={
            "perplexity": evaluator.baseline_losses.perplexity,
            "backend": evaluator.baseline_backend,
            "experts_per_token": evaluator.top_k,
        },
    )


def _turned(
    names: tuple[str, ...],
    ready: Ready,
    targets: tuple[float, ...],
    compensations: list[str | None],
    blocks: int,
    progress: Progress | None,
) -> list[Point]:
    from var_moe.evaluation.sweep import droppers, sweep
    from var_moe.optimization.preparation import sample_documents

    evaluator = ready.evaluator
    small = sample_documents(evaluator.documents, TURNING_DOCUMENTS, ready.subject.seed)
    turning = evaluator.with_documents(small)
    turning.progress = None
    return [
        point
        for compensation in compensations
        for point in sweep(
            evaluator,
            turning,
            names if compensation is None else droppers(names),
            ready.profile.calibration(compensation),
            targets=targets,
            blocks=blocks,
            compensation=compensation,
            progress=progress,
        )
    ]


def _earlier(
    folder: Path | None, output: Path, *, policies: list[str] | None, experts: list[float] | None
) -> dict[str, Any] | None:
    """The earlier comparison that is asked for.

    Raises:
        UsageError: there is none, it would be overwritten, or more is asked than it holds.
    """
    if folder is None:
        return None
    if policies or experts:
        raise UsageError("--policies and --experts do not belong to --from: its rows say both")
    if folder.resolve() == output.resolve():
        raise UsageError(f"--output {output}: would overwrite --from; name another folder")
    from var_moe.evaluation.again import earlier_comparison

    return earlier_comparison(folder)


def _wanted(row: dict[str, Any], compensations: list[str | None]) -> bool:
    return compensations == [None] or row["compensation"] in compensations


def _write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    import pandas as pd

    from var_moe.storage import atomic_write

    flat = [
        {**row, **dict(zip(("speedup_low", "speedup_high"), row["speedup_95"] or (), strict=False))}
        for row in rows
    ]
    frame = pd.DataFrame(flat, columns=list(_COLUMNS))
    atomic_write(path, lambda temporary: frame.to_csv(temporary, index=False))
