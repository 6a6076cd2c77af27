"""``var-moe compare``: VAR and its peers at equal experts per token, on the same tokens."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from var_moe.cli.options import (
    ModelOptions,
    RunOptions,
    SpeedOptions,
    TextOptions,
    Words,
    parse_compensation,
)
from var_moe.cli.output import SPEEDUP, CommandResult, finish, table
from var_moe.config import MAX_DEGRADATION, check_count
from var_moe.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from var_moe.cli.subject import Ready
    from var_moe.evaluation.evaluator import Progress
    from var_moe.growing import GrowingResult

    Calibration = Callable[[str | None], dict[str, Any]]

TURNING_DOCUMENTS = 40


def compare(
    *,
    policies: Words = None,
    model: ModelOptions = ModelOptions(),
    text: TextOptions = TextOptions(),
    speed: SpeedOptions = SpeedOptions(),
    experts: Annotated[list[float] | None, Parameter(consume_multiple=True)] = None,
    compensation: Words = None,
    from_: Annotated[Path | None, Parameter(name="--from")] = None,
    profile: Path | None = None,
    output: Path = Path("results/compare"),
    max_samples: int | None = 400,
    blocks: int = 8,
    max_degradation: float = MAX_DEGRADATION,
    run: RunOptions = RunOptions(),
) -> CommandResult:
    """Compare policies where they run equally many experts: what it costs, what it brings.

    Args:
        policies: names (or comma-separated), by default all; random_skip, the control, is
            always among them.
        experts: experts per token to compare at; by default 87.5%, 75% and 62.5% of K.
        compensation: what stands in for dropped experts, for all policies that only drop: none,
            means, learned, or the folder of a fitted one; several are compared. By default each
            policy does as it is made.
        from_: folder of an earlier comparison: its settings are measured again, on another --split
            or --dataset, and nothing is turned.
        profile: profile folder; by default the calibration split is profiled first, where a policy
            needs it.
        output: folder for comparison.json, written after each point, and report.html.
        max_samples: score at most so many documents.
        blocks: timed blocks per arm and policy; 0 leaves the timing out.
        max_degradation: the bound drawn into the plot.
    """
    from var_moe.cli.subject import Subject
    from var_moe.config import check_bound
    from var_moe.routing.registry import policy_names, policy_spec

    check_bound(max_degradation)
    earlier = _earlier(from_, output, policies=policies, experts=experts)
    asked = [name for entry in policies or [] for name in entry.split(",") if name]
    for name in asked:
        policy_spec(name)
    given = [entry for one in compensation or [] for entry in one.split(",") if entry]
    parsed = [parse_compensation(entry) for entry in given]
    folders = [folder for _, folder in parsed if folder is not None]
    if len(folders) > 1:
        raise UsageError("--compensation: expected one folder at the most")
    subject = Subject(
        model=model,
        text=text,
        run=run,
        profile=profile,
        output=output,
        compensation=folders[0] if folders else None,
        max_samples=max_samples,
        speed=speed,
    )
    check_count("blocks", blocks, 0)
    subject.check(blocks=max(1, blocks))
    from var_moe.evaluation.sweep import CONTROL, check_targets, measure_again, require_policies
    from var_moe.growing import GrowingResult
    from var_moe.models.checks import check_droppable
    from var_moe.terminal import show

    if not asked:
        variants = {policy_spec(name).variant_of for name in policy_names()}
        asked = [n for n in policy_names() if policy_spec(n).sweeps(2) and n not in variants]
    names = require_policies([CONTROL, *asked])
    compensations = [name for name, _ in parsed] or [None]
    needed_by, stand_ins = names, compensations
    if earlier is not None:
        rows = [r for r in earlier["rows"] if not parsed or r["compensation"] in compensations]
        needed_by = tuple(row["policy"] for row in rows)
        stand_ins = [row["compensation"] for row in rows]
    needs = {need for name in needed_by for need in policy_spec(name).needs}
    needs |= {"compensation" for name in stand_ins if name not in (None, "none")}
    file = output / "comparison.json"
    with run.progress() as progress, GrowingResult(file) as kept:
        ready = subject.ready(progress, needs=needs, stand_ins=stand_ins)
        check_droppable(ready.loaded.name, ready.evaluator.top_k)
        known = cache(ready.calibration_with)  # it holds tables as large as the vocabulary
        if earlier is None:
            targets = check_targets(experts, ready.evaluator.top_k)
            points = _turned(names, ready, targets, compensations, known, progress)
        else:
            _check_same(earlier, ready)
            targets = tuple(earlier["targets_experts_per_token"])
            points = measure_again(ready.evaluator, rows, known, progress=progress)
        result = _measure(
            points,
            ready,
            known,
            targets=targets,
            blocks=blocks,
            max_degradation=max_degradation,
            kept=kept,
            progress=progress,
        )
    show(*_tables(result))
    return finish(result, file, report=output)


def _tables(result: dict[str, Any]) -> list[Any]:
    """The rows of each target, the best first."""
    text, ahead = result["text"], sorted(result["rows"], key=lambda row: row["degradation"])
    columns = {
        "policy": "{name}",
        "experts per token": "{experts_per_token:.3f}",
        "perplexity change": "{degradation:+.2%}",
        "± s.e.": "{degradation_standard_error:.2%}",
        "random skipping": "{degradation_of_random_skip:+.2%}",
        "speedup [95%]": SPEEDUP,
    }
    intro = (
        f"{result['model']['name']} on {text['dataset']} ({text['split']}, "
        f"{result['documents']} documents), perplexity {result['baseline']['perplexity']:.3f}"
    )
    tables = []
    for target in result["targets_experts_per_token"]:
        rows = [row for row in ahead if row["target_experts_per_token"] == target]
        tables.append(table(f"At {target:g} experts per token", columns, rows))
    return [intro, *tables]


def _measure(
    found: Iterable[dict[str, Any]],
    ready: Ready,
    calibration: Calibration,
    *,
    targets: tuple[float, ...],
    blocks: int,
    max_degradation: float,
    kept: GrowingResult,
    progress: Progress,
) -> dict[str, Any]:
    """Score all points, then time them; each is kept as soon as it is known."""
    from var_moe.evaluation.sweep import control_at, timed

    evaluator, rows = ready.evaluator, list[dict[str, Any]]()

    def keep(missing: str | None) -> dict[str, Any]:
        for row in rows:
            alike = [one for one in rows if one["compensation"] == row["compensation"]]
            cost = control_at(alike, row["experts_per_token"], evaluator.top_k)
            row["degradation_of_random_skip"] = cost
        result = ready.result(
            rows,
            targets_experts_per_token=list(targets),
            compensation_hashes=_hashes(ready),
            max_degradation=max_degradation,
            baseline={
                "perplexity": evaluator.baseline_losses.perplexity,
                "backend": evaluator.baseline_backend,
                "experts_per_token": evaluator.top_k,
            },
        )
        return kept.save(result, missing=missing)

    for row in found:
        rows.append(row)
        keep("further points, throughput" if blocks else "further points")
    for number, row in enumerate(rows if blocks else ()):
        keep("throughput" if number == 0 else f"throughput after {rows[number - 1]['name']}")
        progress(f"timing {row['name']}", number, len(rows))
        rows[number] = timed(evaluator, row, calibration(row["compensation"]), blocks=blocks)
    return keep(None)


def _turned(
    names: tuple[str, ...],
    ready: Ready,
    targets: tuple[float, ...],
    compensations: list[str | None],
    calibration: Calibration,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    from var_moe.evaluation.sweep import check_made, sweep
    from var_moe.optimization.preparation import sample_documents
    from var_moe.routing.registry import policy_spec

    evaluator = ready.evaluator
    small = sample_documents(evaluator.documents, TURNING_DOCUMENTS, ready.subject.run.seed)
    turning = evaluator.with_documents(small)
    turning.progress = None
    # Plain VAR alone runs experts that the router did not choose: no compensation helps it.
    droppers = tuple(name for name in names if policy_spec(name).settings.get("mode") != "plain")
    chosen = {one: names if one is None else droppers for one in compensations}
    for compensation, own in chosen.items():  # before anything is measured
        check_made(own, calibration(compensation), top_k=evaluator.top_k)
    for compensation, own in chosen.items():
        yield from sweep(
            evaluator,
            turning,
            own,
            calibration(compensation),
            targets=targets,
            compensation=compensation,
            progress=progress,
        )


def _hashes(ready: Ready) -> dict[str, str]:
    """Of the compensations that there are, by name."""
    known = {} if ready.profile is None else ready.profile.compensations()
    return {name: one.hash for name, one in known.items() if one is not None}


def _check_same(earlier: dict[str, Any], ready: Ready) -> None:
    """Refuse another profile or compensation than the earlier comparison was made with.

    Raises:
        UsageError: says which.
    """
    profile, before = ready.profile, earlier["profile_hash"]
    if profile is not None and before != profile.hash:
        raise UsageError(
            f"--from: measured with profile {str(before)[:12]}, but --profile is "
            f"{profile.hash[:12]}; give the same one"
        )
    known = earlier.get("compensation_hashes", {})
    other = [name for name, value in _hashes(ready).items() if known.get(name, value) != value]
    if other:
        raise UsageError(
            f"--from: compensation {other[0]!r} was another one there; give its folder with "
            "--compensation"
        )


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
    from var_moe.evaluation.sweep import earlier_comparison

    return earlier_comparison(folder)
