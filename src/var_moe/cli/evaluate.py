"""``var-moe evaluate``: the unmodified model beside VAR or a peer, on the same tokens."""

from __future__ import annotations

import json
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
from var_moe.cli.output import CommandResult, finish, show_section
from var_moe.config import check_count
from var_moe.errors import UsageError

if TYPE_CHECKING:
    from var_moe.cli.subject import Ready
    from var_moe.evaluation.evaluator import Progress
    from var_moe.growing import GrowingResult
    from var_moe.optimization.candidate import Candidate
    from var_moe.routing.base import RoutingPolicy

DECODED_TOGETHER = (1, 16)
"""Prompts that text is generated after at once."""


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
) -> CommandResult:
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
    from var_moe.cli.subject import Subject, named_candidates
    from var_moe.optimization.candidate import Candidate

    presets = preset or ([] if config or policy else ["balanced"])
    if mode is not None and config is None and {*presets} <= {"keep_all"}:
        raise UsageError(f"--mode {mode} belongs to VAR: name a --config or --preset of it")
    if policy is None and set:
        raise UsageError("--set belongs to --policy: name a policy")
    # Without a policy to help, a compensation is one that a configuration names.
    stand_in, place = parse_compensation(compensation, folder_only=policy is None)
    candidates = named_candidates([config] if config else [], presets, mode)
    if policy is not None:
        candidates[policy] = Candidate(
            policy=policy, settings=_settings(set or []), compensation=stand_in
        )
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
    from var_moe.optimization.search_space import defaults as default_point
    from var_moe.report.measured import evaluation_section

    if policy is not None:
        candidates[policy].spec.check(candidates[policy].settings)
    file = output / "evaluation.json"
    with run.progress() as progress, GrowingResult(file) as kept:
        ready = subject.ready(
            progress,
            needs=frozenset().union(*(one.needs for one in candidates.values())),
            stand_ins=[one.compensation for one in candidates.values()],
        )
        if policy is not None:
            defaults = default_point(candidates[policy].spec.search_space(ready.loaded.top_k))
            settings = {**defaults, **candidates[policy].settings}
            candidates[policy] = replace(candidates[policy], settings=settings)
        policies = [(name, one, one.make(ready.profile)) for name, one in candidates.items()]
        result = _measure(
            policies,
            ready,
            blocks=blocks,
            decode_blocks=decode_blocks,
            kept=kept,
            progress=progress,
        )
    show_section(evaluation_section, evaluation=result)
    return finish(result, file, report=output)


def _settings(assignments: list[str]) -> dict[str, Any]:
    """The settings of ``--set``."""
    settings: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {assignment!r}: expected name=value")
        try:
            settings[key] = json.loads(value)
        except ValueError:  # a word
            settings[key] = value
    return settings


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
    from var_moe.evaluation.speed_setting import SpeedSetting

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
    settings = [SpeedSetting.of("decode", size) for size in DECODED_TOGETHER]
    decoding = [evaluator.with_setting(setting) for setting in settings]
    for row, (name, _, policy) in zip(rows[1:], policies, strict=True):
        for done, (setting, timed) in enumerate(zip(settings, decoding, strict=True)):
            kept.save(ready.result(rows), missing="generation")
            progress(f"{name}: generating", done, len(settings))
            speed = timed.speed(policy, blocks=decode_blocks, factors=False)
            generated = {"prompt_tokens": setting.sequence, "new_tokens": setting.new_tokens}
            row["decode"].append({"batch_size": setting.batch_size, **generated, **speed.to_dict()})
    return kept.save(ready.result(rows))
