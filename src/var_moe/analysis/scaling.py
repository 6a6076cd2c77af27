"""How throughput and speedup change with sequence length and batch size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from var_moe.evaluation.batching import full_batches
from var_moe.evaluation.evaluator import Evaluator
from var_moe.evaluation.throughput import backend_arm, fastest_backend, policy_arm, time_arms
from var_moe.routing.base import RoutingPolicy

SEQUENCES = (64, 128, 256, 512)
BATCH_SIZES = (1, 2, 4, 8)
FEW_TOKENS = 1024
"""Below this many tokens a forward takes a moment: more of them in a block, for the same noise."""


def measure_scaling(
    evaluator: Evaluator,
    policy: RoutingPolicy,
    *,
    sequences: Sequence[int] = SEQUENCES,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    blocks: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Time the unmodified model and a policy, interleaved, in each setting.

    Sequence lengths are taken at the evaluator's batch size, batch sizes at its sequence length.
    The baseline is the fastest backend of each setting.

    Returns:
        A row per setting: ``varied`` (sequence or batch_size), batch_size, sequence, both
        throughputs, the backend, speedup and its interval; a length beyond the model's window
        is left out.
    """
    usual = evaluator.setting
    settings = [
        *(("sequence", usual.batch_size, s) for s in sequences if s <= evaluator.loaded.window),
        *(("batch_size", b, min(usual.sequence, evaluator.loaded.window)) for b in batch_sizes),
    ]
    known: dict[tuple[int, int], dict[str, Any]] = {}
    rows = []
    for done, (varied, batch_size, sequence) in enumerate(settings):
        if progress:
            progress("timing sequence lengths and batch sizes", done, len(settings))
        at = (batch_size, sequence)
        if at not in known:
            known[at] = _one(evaluator, policy, batch_size, sequence, blocks)
        rows.append({"varied": varied, **known[at]})
    if progress:
        progress("timing sequence lengths and batch sizes", len(settings), len(settings))
    return rows


def _one(
    evaluator: Evaluator, policy: RoutingPolicy, batch_size: int, sequence: int, blocks: int
) -> dict[str, Any]:
    model = evaluator.model
    forwards = max(1, min(8, FEW_TOKENS // (batch_size * sequence)))
    batches = full_batches(
        evaluator.documents, batch_size=batch_size, sequence=sequence, count=forwards
    )
    backend, _ = fastest_backend(model, batches, top_k=evaluator.top_k, blocks=min(blocks, 4))
    arms = {
        "baseline": backend_arm(model, backend),
        "var": policy_arm(model, policy, backend=evaluator.backend),
    }
    timings = time_arms(model, arms, batches, blocks=blocks)
    speedup = timings.ratio("baseline", "var")
    return {
        "batch_size": batch_size,
        "sequence": sequence,
        "tokens": batch_size * sequence,
        "forwards_per_block": forwards,
        "blocks": blocks,
        "baseline_backend": backend,
        "baseline_throughput_tps": timings.throughput("baseline"),
        "var_throughput_tps": timings.throughput("var"),
        "speedup": speedup.median,
        "speedup_95": [speedup.low, speedup.high],
    }
