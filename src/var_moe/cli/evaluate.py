"""``var-moe evaluate``: the unmodified model beside VAR or a peer, on the same tokens."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from var_moe.errors import UsageError


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
) -> int:
    """Compare the baseline with VAR or a peer: perplexity, tokens/s, experts per token, tiers.

    Args:
        model: demo, a local folder, or a Hub id.
        dataset: demo (or demo-postgres, ...), wikitext, a Hub name[:config], or a local file.
        split: part of the text to score.
        config: a VAR configuration (JSON).
        preset: conservative, balanced, aggressive, or keep_all; may be repeated.
        mode: overrides the configuration's mode.
        policy: a policy by name (naee, ser, top_p, ...) instead of a VAR configuration.
        set: name=value, a setting of --policy; may be repeated. The rest has its default.
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
    from var_moe.config import VARConfig
    from var_moe.storage import check_output_folder

    check_output_folder(output)
    changes = {} if mode is None else {"mode": mode, "residuals": None}
    configs: dict[str, VARConfig | None] = {}
    if config is not None:
        configs[config.name] = VARConfig.load(config).replace(**changes)
    for name in preset or ([] if config or policy else ["balanced"]):
        configs[name] = None if name == "keep_all" else VARConfig.preset(name, **changes)
    peer = _peer(policy, set or [])
    if decode_blocks < 0:
        raise UsageError(f"decode_blocks = {decode_blocks}: expected 0 or more")
    if blocks < 1 or (max_samples is not None and max_samples < 2):
        raise UsageError("blocks: expected at least 1; max_samples: expected at least 2")
    from var_moe.evaluation.text import check_dataset
    from var_moe.models.loading import check_name

    check_name(model)
    check_dataset(dataset)
    if not quiet:
        print(f"loading model {model} ...", file=sys.stderr, flush=True)
    from var_moe.cli.progress import StageProgress
    from var_moe.cli.tables import print_comparison, print_decoding
    from var_moe.storage import atomic_write_json

    with StageProgress() as progress:
        result = _measure(
            configs,
            peer,
            model=model,
            dataset=dataset,
            split=split,
            profile=profile,
            output=output,
            max_samples=max_samples,
            blocks=blocks,
            decode_blocks=decode_blocks,
            seed=seed,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            progress=None if quiet else progress,
        )
    atomic_write_json(output / "evaluation.json", result)
    text = result["text"]
    print_comparison(
        result["rows"],
        title=f"{model} on {text['dataset']} ({text['split']}, {result['documents']} documents)",
    )
    print_decoding(result["rows"])
    for note in result["notes"]:
        print(f"Note: {note}")
    print(f"Saved: {output / 'evaluation.json'}")
    return 0


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


def _measure(
    configs: dict[str, Any],
    peer: tuple[str, dict[str, Any]] | None,
    *,
    model: str,
    dataset: str,
    split: str,
    profile: Path | None,
    output: Path,
    max_samples: int | None,
    blocks: int,
    decode_blocks: int,
    seed: int,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    progress: Any,
) -> dict[str, Any]:
    from var_moe.evaluation.compare import Evaluator, keep_all
    from var_moe.evaluation.decode import BATCH_SIZES, DecodeSetting, Decoding
    from var_moe.evaluation.text import require_documents
    from var_moe.models.loading import load_model
    from var_moe.optimization.preparation import obtain_profile, read_text, sample_documents
    from var_moe.optimization.results import jsonable
    from var_moe.routing.registry import policy_spec
    from var_moe.routing.var import VARPolicy
    from var_moe.storage import SCHEMA_VERSION, provenance

    loaded = load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    text = read_text(dataset, split, loaded)
    documents = sample_documents(text.documents, max_samples, seed)
    require_documents(documents, 2, "comparing perplexities")
    stats, _ = obtain_profile(loaded, dataset, given=profile, folder=output, progress=progress)
    table = stats.table()
    policies = {
        name: keep_all() if config is None else VARPolicy(config, table, residuals=stats.residuals)
        for name, config in configs.items()
    }
    settings = {name: config and config.to_dict() for name, config in configs.items()}
    if peer is not None:
        name, given = peer
        spec = policy_spec(name)
        space = spec.search_space(loaded.top_k)
        chosen = {**{key: entry["default"] for key, entry in space.items()}, **given}
        policies[name], settings[name] = spec.make(chosen, stats.calibration()), chosen
    evaluator = Evaluator(loaded, documents, progress=progress)
    decoding = Decoding(loaded.model, documents, top_k=loaded.top_k)
    notes = evaluator.timing_notes()
    if text.data_hash == stats.head["data_hash"]:
        notes.append("this text was profiled: VAR looks better on it than on unseen text")
    rows: list[dict[str, Any]] = []
    for name, policy in policies.items():
        quality = evaluator.quality(policy, what=f"{name}: perplexity")
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
        for size in BATCH_SIZES if decode_blocks else ():
            if progress:
                progress(f"{name}: generating", BATCH_SIZES.index(size), len(BATCH_SIZES))
            setting = DecodeSetting(batch_size=size)
            decoded.append(decoding.speed(policy, setting, blocks=decode_blocks).to_dict())
        rows.append(
            {
                "name": name,
                "config": settings[name],
                **quality.to_dict(),
                **speed.to_dict(),
                "decode": decoded,
            }
        )
    found: dict[str, Any] = jsonable(
        {
            "schema_version": SCHEMA_VERSION,
            "rows": rows,
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
