"""``var-moe evaluate``: the unmodified model beside VAR or a peer, on the same tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from var_moe.cli.options import (
    Mode,
    ModelOptions,
    Repeated,
    RunOptions,
    TextOptions,
    parse_compensation,
)
from var_moe.cli.output import CHANGE, SPEEDUP, TIERS, Answer, finish, table
from var_moe.config import check_count
from var_moe.errors import UsageError

if TYPE_CHECKING:
    from var_moe.cli.subject import Ready
    from var_moe.evaluation.evaluator import Progress
    from var_moe.growing import GrowingResult
    from var_moe.optimization.candidate import Candidate
    from var_moe.routing.base import RoutingPolicy


def evaluate(
    *,
    model: ModelOptions = ModelOptions(),
    text: TextOptions = TextOptions(),
    config: Path | None = None,
    preset: Repeated = None,
    mode: Mode = None,
    policy: str | None = None,
    set: Repeated = None,
    compensation: str | None = None,
    profile: Path | None = None,
    output: Path = Path("results/evaluate"),
    max_samples: int | None = None,
    blocks: int = 10,
    decode_blocks: int = 3,
    run: RunOptions = RunOptions(),
) -> Answer:
    """Compare the baseline with VAR or a peer: perplexity, tokens/s, experts per token, tiers.

    Args:
        config: a configuration that any command wrote, such as best_config.json or
            certified_config.json, or a VAR configuration (JSON).
        preset: conservative, balanced, aggressive, or keep_all; may be repeated.
        mode: overrides the mode of VAR's configuration and presets.
        policy: a policy by name (naee, ser, top_p, ...) instead of a VAR configuration.
        set: name=value, a setting of --policy; may be repeated. The rest has its default.
        compensation: what stands in for the experts that --policy drops: none, means, learned, or
            the folder of a fitted one, which also serves a --config that names learned.
        profile: profile folder; by default the one beside --config, else the calibration split is
            profiled first, where something is needed of a profile.
        output: folder for evaluation.json, which is written after each part.
        max_samples: score at most so many documents.
        blocks: timed blocks per arm.
        decode_blocks: timed blocks of generation per arm and batch size; 0 leaves it out.
    """
    from var_moe.cli.subject import Subject

    presets = preset or ([] if config or policy else ["balanced"])
    candidates = _candidates(config, presets, mode=mode)
    stand_in, place = parse_compensation(compensation)
    if policy is not None:
        candidates[policy] = _peer(policy, set or [], stand_in)
    elif set:
        raise UsageError("--set belongs to --policy: name a policy")
    _check_compensation(compensation, stand_in, place, policy, candidates)
    check_count("decode_blocks", decode_blocks, 0)
    subject = Subject(
        model=model,
        text=text,
        run=run,
        profile=profile,
        config=config,
        output=output,
        compensation=place,
        max_samples=max_samples,
    )
    subject.check(blocks=blocks)
    from var_moe.growing import GrowingResult
    from var_moe.routing.registry import policy_spec

    if policy is not None:
        policy_spec(policy).check(candidates[policy].settings)
    file = output / "evaluation.json"
    with run.progress() as progress, GrowingResult(file) as kept:
        ready = subject.ready(
            progress,
            needs=frozenset().union(*(one.needs for one in candidates.values())),
            stand_ins=[one.compensation for one in candidates.values()],
        )
        policies = _policies(candidates, ready, with_defaults=policy)
        result = _measure(
            policies,
            ready,
            blocks=blocks,
            decode_blocks=decode_blocks,
            kept=kept,
            progress=progress,
        )
    _show(result)
    return finish(result, file, report=output)


def _show(result: dict[str, Any]) -> None:
    """All beside each other, each data set by itself, and generation where it was timed."""
    from var_moe.optimization.summary import apart_table
    from var_moe.terminal import show

    text, (baseline, *rows) = result["text"], result["rows"]
    columns = {
        "": "{name}",
        "PPL": "{perplexity:.3f}",
        "change (95% upper)": CHANGE,
        "tokens/s": "{throughput_tps:,.0f}",
        "speedup [95%]": SPEEDUP,
        "experts/token": "{experts_per_token:.3f}",
        "fast/cached/learned %": TIERS,
        "cache hits": "{cache_hit_rate:.1%}",
    }
    first = {
        **baseline,
        "name": f"baseline ({baseline['backend']})",
        **dict.fromkeys(("degradation", "degradation_upper_95", "cache_hit_rate")),
        **{"speedup": 1.0, "speedup_95": (1.0, 1.0)},
        **{"fast_pct": 0.0, "cached_pct": 0.0, "learned_pct": 100.0},
    }
    title = (
        f"{result['model']['name']} on {text['dataset']} ({text['split']}, "
        f"{result['documents']} documents)"
    )
    show(table(title, columns, [first, *rows]))
    for row in rows:
        if row.get("by_dataset"):
            show(apart_table(row["by_dataset"], title=f"{row['name']}, each data set by itself"))
    decoding = [{"name": row["name"], **one} for row in rows for one in row.get("decode") or ()]
    columns = {
        "": "{name}",
        "batch": "{batch_size}",
        "new tokens": "{new_tokens}",
        "tokens/s": "{throughput_tps:,.0f}",
        "speedup [95%]": SPEEDUP,
        "baseline": "{baseline_backend}",
        "tokens/s ": "{baseline_throughput_tps:,.0f}",
    }
    if decoding:
        show(table("generation, greedy", columns, decoding))


def _candidates(
    config: Path | None, presets: list[str], *, mode: str | None
) -> dict[str, Candidate]:
    """The configuration and the presets that are asked for, by name."""
    from var_moe.optimization.candidate import load_candidate, preset

    if mode is not None and config is None and set(presets) <= {"keep_all"}:
        raise UsageError(f"--mode {mode} belongs to VAR: name a --config or --preset of it")
    found: dict[str, Candidate] = {}
    if config is not None:
        found[config.name] = load_candidate(config).in_mode(mode)
    return found | {name: preset(name, mode) for name in presets}


def _peer(name: str, assignments: list[str], compensation: str | None) -> Candidate:
    """The policy of ``--policy`` with the settings of ``--set``."""
    from var_moe.optimization.candidate import Candidate

    settings: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {assignment!r}: expected name=value")
        settings[key] = _value(value)
    return Candidate(policy=name, settings=settings, compensation=compensation)


def _check_compensation(
    asked: str | None,
    name: str | None,
    place: Path | None,
    policy: str | None,
    candidates: dict[str, Candidate],
) -> None:
    """Refuse a compensation that nothing would use.

    A name is of ``--policy``; a folder also serves a configuration that names ``learned``.

    Raises:
        UsageError: says to whom it belongs.
    """
    if name is None or policy is not None:
        return
    if place is None:
        raise UsageError(
            f"--compensation {asked} belongs to --policy: name a policy; a configuration names "
            "its own"
        )
    choices = [
        one.compensation or ("learned" if "damage" in one.needs else "none")
        for one in candidates.values()
    ]
    if "learned" not in choices:
        raise UsageError(
            f"--compensation {asked}: nothing here uses it; name a policy with --policy, or a "
            "configuration with compensation 'learned'"
        )


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _policies(
    candidates: dict[str, Candidate], ready: Ready, *, with_defaults: str | None
) -> list[tuple[str, Candidate, RoutingPolicy]]:
    """What is asked for, made; settings that ``--set`` leaves out have their defaults."""
    found: list[tuple[str, Candidate, RoutingPolicy]] = []
    for name, one in candidates.items():
        if name == with_defaults:
            space = one.spec.search_space(ready.loaded.top_k)
            defaults = {key: entry["default"] for key, entry in space.items()}
            one = replace(one, settings={**defaults, **one.settings})
        found.append((name, one, one.make(ready.profile)))
    return found


def _measure(
    policies: list[tuple[str, Candidate, RoutingPolicy]],
    ready: Ready,
    *,
    blocks: int,
    decode_blocks: int,
    kept: GrowingResult,
    progress: Progress,
) -> dict[str, Any]:
    """A row for the unmodified model and one for each policy; kept as soon as parts are known."""
    from var_moe.evaluation.evaluator import measure_by_dataset
    from var_moe.evaluation.throughput import BATCH_SIZES, Decoding

    evaluator = ready.evaluator
    baseline: dict[str, Any] = {
        "name": "baseline",
        "backend": evaluator.baseline_backend,
        "perplexity": evaluator.baseline_losses.perplexity,
        "experts_per_token": float(evaluator.top_k),
    }
    rows: list[dict[str, Any]] = [baseline]
    later = ["throughput", *(["generation"] if decode_blocks else [])]
    for number, (name, candidate, policy) in enumerate(policies):
        quality = evaluator.quality(policy, what=f"{name}: perplexity")
        row: dict[str, Any] = {
            "name": name,
            "kind": candidate.kind,
            "config": dict(candidate.settings) or None,
        }
        rows.append({**row, **quality.to_dict(), "by_dataset": []})
        waiting = [other for other, *_ in policies[number + 1 :]]
        kept.save(ready.result(rows), missing=", ".join([*waiting, *later]))
        rows[-1]["by_dataset"] = measure_by_dataset(evaluator, policy, what=name)
    for row, (_, _, policy) in zip(rows[1:], policies, strict=True):
        kept.save(ready.result(rows), missing=", ".join(later))
        speed = evaluator.speed(policy, blocks=blocks)
        baseline.setdefault("throughput_tps", speed.baseline_tps)
        row |= {**speed.to_dict(), "decode": []}
    if not decode_blocks:
        return kept.save(ready.result(rows))
    decoding = Decoding(
        ready.loaded.model,
        evaluator.documents,
        top_k=evaluator.top_k,
        backend=evaluator.running_backend,
    )
    for row, (name, _, policy) in zip(rows[1:], policies, strict=True):
        for done, size in enumerate(BATCH_SIZES):
            kept.save(ready.result(rows), missing="generation")
            progress(f"{name}: generating", done, len(BATCH_SIZES))
            row["decode"].append(decoding.speed(policy, size, blocks=decode_blocks))
    return kept.save(ready.result(rows))
