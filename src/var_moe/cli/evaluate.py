"""``var-moe evaluate``: the unmodified model beside VAR or a peer, on the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from var_moe.cli.compensation import parse_compensation
from var_moe.cli.output import Answer
from var_moe.errors import UsageError

if TYPE_CHECKING:
    from var_moe.cli.subject import Ready
    from var_moe.config import VARConfig
    from var_moe.evaluation.compare import Progress
    from var_moe.routing.base import RoutingPolicy


def evaluate(
    *,
    model: str = "demo",
    dataset: str = "demo",
    split: str = "validation",
    config: Path | None = None,
    preset: Annotated[list[str] | None, Parameter(consume_multiple=False)] = None,
    mode: Literal["verified", "plain"] | None = None,
    policy: str | None = None,
    set: Annotated[list[str] | None, Parameter(consume_multiple=False)] = None,
    compensation: str | None = None,
    profile: Path | None = None,
    output: Path = Path("results/evaluate"),
    max_samples: int | None = None,
    blocks: int = 10,
    decode_blocks: int = 3,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> Answer:
    """Compare the baseline with VAR or a peer: perplexity, tokens/s, experts per token, tiers.

    Args:
        model: demo, a local folder, or a Hub id.
        dataset: demo (or demo-postgres, ...), wikitext, a Hub name[:config], or a local file; or
            several as a,b,c, which are also reported apart.
        split: part of the text to score.
        config: a VAR configuration (JSON).
        preset: conservative, balanced, aggressive, or keep_all; may be repeated.
        mode: overrides the configuration's mode.
        policy: a policy by name (naee, ser, top_p, ...) instead of a VAR configuration.
        set: name=value, a setting of --policy; may be repeated. The rest has its default.
        compensation: what stands in for the experts that --policy drops: none, means, learned, or
            the folder of a fitted one.
        profile: profile folder; by default the calibration split is profiled first.
        output: folder for evaluation.json.
        max_samples: score at most so many documents.
        blocks: timed blocks per arm.
        decode_blocks: timed blocks of generation per arm and batch size; 0 leaves it out.
        seed: draws the documents when max_samples takes a part of them.
        device: auto, cpu, cuda, ...
        dtype: auto, float32, bfloat16, float16.
        trust_remote_code: run a Hub model's own code.
        quiet: no progress.
    """
    from var_moe.cli.subject import Subject
    from var_moe.config import VARConfig

    changes = {} if mode is None else {"mode": mode, "residuals": None}
    configs: dict[str, VARConfig | None] = {}
    if config is not None:
        configs[config.name] = VARConfig.load(config).replace(**changes)
    for name in preset or ([] if config or policy else ["balanced"]):
        configs[name] = None if name == "keep_all" else VARConfig.preset(name, **changes)
    peer = _peer(policy, set or [])
    stand_in, place = parse_compensation(compensation)
    if stand_in is not None and peer is None:
        raise UsageError("--compensation belongs to --policy: name a policy")
    if decode_blocks < 0:
        raise UsageError(f"decode_blocks = {decode_blocks}: expected 0 or more")
    subject = Subject(
        model=model,
        dataset=dataset,
        split=split,
        profile=profile,
        output=output,
        compensation=place,
        max_samples=max_samples,
        seed=seed,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    subject.check(blocks=blocks, quiet=quiet)
    from var_moe.cli.progress import StageProgress
    from var_moe.cli.report import make_report
    from var_moe.cli.tables import print_apart, print_comparison, print_decoding
    from var_moe.storage import atomic_write_json

    with StageProgress() as progress:
        shown = None if quiet else progress
        ready = subject.ready(shown)
        policies = _policies(configs, peer, ready, stand_in)
        rows = _measure(policies, ready, blocks=blocks, decode_blocks=decode_blocks, progress=shown)
    result = ready.result(rows)
    atomic_write_json(output / "evaluation.json", result)
    text = result["text"]
    print_comparison(
        result["rows"],
        title=f"{model} on {text['dataset']} ({text['split']}, {result['documents']} documents)",
    )
    for row in result["rows"]:
        print_apart(row.get("by_dataset", []), title=f"{row['name']}, each data set by itself")
    print_decoding(result["rows"])
    for note in result["notes"]:
        print(f"Note: {note}")
    print(f"Saved: {output / 'evaluation.json'}")
    make_report(output)
    return Answer(result)


def _peer(name: str | None, assignments: list[str]) -> tuple[str, dict[str, Any]] | None:
    """The policy of ``--policy`` with the settings of ``--set``."""
    from var_moe.routing.registry import policy_spec

    if name is None:
        if assignments:
            raise UsageError("--set belongs to --policy: name a policy")
        return None
    policy_spec(name)
    settings: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {assignment!r}: expected name=value")
        settings[key] = _value(value)
    return name, settings


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _policies(
    configs: dict[str, VARConfig | None],
    peer: tuple[str, dict[str, Any]] | None,
    ready: Ready,
    compensation: str | None,
) -> list[tuple[str, dict[str, Any] | None, RoutingPolicy]]:
    """(name, settings, policy) of what is asked for."""
    from var_moe.evaluation.compare import keep_all
    from var_moe.routing.registry import policy_spec
    from var_moe.routing.var import VARPolicy

    table, means = ready.profile.table(), ready.profile.residuals
    found: list[tuple[str, dict[str, Any] | None, RoutingPolicy]] = [
        (name, None, keep_all())
        if config is None
        else (name, config.to_dict(), VARPolicy(config, table, residuals=means))
        for name, config in configs.items()
    ]
    if peer is not None:
        name, given = peer
        spec = policy_spec(name)
        space = spec.search_space(ready.loaded.top_k)
        settings = {**{key: entry["default"] for key, entry in space.items()}, **given}
        found.append((name, settings, spec.make(settings, ready.profile.calibration(compensation))))
    return found


def _measure(
    policies: list[tuple[str, dict[str, Any] | None, RoutingPolicy]],
    ready: Ready,
    *,
    blocks: int,
    decode_blocks: int,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """A row for the unmodified model, then one for each policy."""
    from var_moe.evaluation.apart import measure_apart
    from var_moe.evaluation.decode import BATCH_SIZES, DecodeSetting, Decoding

    evaluator = ready.evaluator
    decoding = Decoding(ready.loaded.model, evaluator.documents, top_k=evaluator.top_k)
    rows: list[dict[str, Any]] = []
    for name, settings, policy in policies:
        quality = evaluator.quality(policy, what=f"{name}: perplexity")
        apart = measure_apart(evaluator, policy, what=name)
        speed = evaluator.speed(policy, blocks=blocks)
        if not rows:
            rows.append(
                {
                    "name": "baseline",
                    "backend": evaluator.baseline_backend,
                    "perplexity": quality.change.baseline_perplexity,
                    "throughput_tps": speed.baseline_tps,
                    "experts_per_token": float(evaluator.top_k),
                }
            )
        decoded = []
        for done, size in enumerate(BATCH_SIZES if decode_blocks else ()):
            if progress:
                progress(f"{name}: generating", done, len(BATCH_SIZES))
            setting = DecodeSetting(batch_size=size)
            decoded.append(decoding.speed(policy, setting, blocks=decode_blocks).to_dict())
        rows.append(
            {
                "name": name,
                "config": settings,
                **quality.to_dict(),
                **speed.to_dict(),
                "by_dataset": [one.to_dict() for one in apart],
                "decode": decoded,
            }
        )
    return rows
