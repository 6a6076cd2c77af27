"""Collecting a profile: one pass of the unmodified model over calibration text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from var_moe.calibration.profile import RoutingProfile, profile_hash
from var_moe.calibration.statistics import (
    OutputChange,
    RatioHistogram,
    ResidualSums,
    RoutingStatistics,
    RunningSums,
)
from var_moe.data.documents import ids_hash
from var_moe.errors import UsageError, VarMoeError
from var_moe.evaluation.batching import batches, collate, drawn
from var_moe.models.identity import identity
from var_moe.models.moe_layers import experts_shape
from var_moe.routing.keeping import leading_count
from var_moe.storage import SCHEMA_VERSION, atomic_write, provenance, sha256_of
from var_moe.tracing.all_pairs import AllPairs, LayerDecisions

if TYPE_CHECKING:
    from var_moe.data.documents import EncodedDocument
    from var_moe.models.loading import LoadedModel

DEFAULT_TOKENS = 400_000
"""Calibration size unless told otherwise: `frequency_threshold` counts in a text of this size."""
_CHECKPOINT_FORMAT = 3
_CHECKPOINT_EVERY = 10  # forwards: some seconds of work


class _Collector(AllPairs):
    """Takes the sums of a profile."""

    def __init__(self, loaded: LoadedModel, ids: np.ndarray, backend: str) -> None:
        shape, top_k = experts_shape(loaded.model), loaded.top_k
        layers, experts = shape["layers"], shape["experts"]
        super().__init__(loaded.model, layers, backend)
        self.statistics = RoutingStatistics(ids, layers=layers, experts=experts)
        self.residuals = ResidualSums(**shape, top_k=top_k)
        self.ratios = RatioHistogram(layers=layers, top_k=top_k)
        self.changes = OutputChange(layers=layers, top_k=top_k)
        self._parts: tuple[RunningSums, ...] = (self.statistics, self.residuals)
        self._parts += (self.ratios, self.changes)

    def see(self, decided: LayerDecisions) -> None:
        for part in self._parts:
            part.add(decided)

    def save(self, path: Path, key: str, done: int) -> None:
        """Write a checkpoint after ``done`` forwards."""
        from safetensors.torch import save_file

        state = {name: value for part in self._parts for name, value in part.sums.items()}
        note = {"key": key, "done": str(done)}
        atomic_write(path, lambda temporary: save_file(state, temporary, metadata=note))

    def resume(self, path: Path | None, key: str) -> int:
        """Load a checkpoint of the same text and model; returns the forwards already done."""
        from safetensors import safe_open

        if path is None or not path.is_file():
            return 0
        with safe_open(path, framework="pt") as file:
            note = file.metadata() or {}
            if note.get("key") != key:
                return 0
            for part in self._parts:
                part.sums = {name: file.get_tensor(name) for name in part.sums}
        return int(note["done"])


def collect_profile(
    loaded: LoadedModel,
    documents: Sequence[EncodedDocument],
    *,
    dataset: str,
    data_hash: str,
    max_tokens: int | None = DEFAULT_TOKENS,
    seed: int = 0,
    tokens_per_batch: int = 4096,
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    backend: str = "sorted",
) -> RoutingProfile:
    """Run the unmodified model over calibration text and gather its routing statistics.

    Args:
        loaded: the model and its tokenizer.
        documents: calibration documents; ``max_tokens`` of them are used.
        dataset: name of the text, for the head.
        data_hash: hash of the text, for the head.
        max_tokens: calibration size, to which the last document is cut; recorded, as
            `frequency_threshold` counts in it.
        seed: draws the documents when ``max_tokens`` takes a part of them.
        tokens_per_batch: padded tokens per forward.
        checkpoint: file to save the running sums to, and to go on from when it is there.
        progress: called with tokens done and tokens in all.
        backend: experts backend.

    Raises:
        UsageError: no documents, or a model whose router can't be watched.
        VarMoeError: the model gave non-finite router logits.
    """
    chosen = list(drawn(documents, max_tokens, seed).values())
    if not chosen:
        raise UsageError(f"dataset {dataset!r}: no calibration text to profile; expected documents")
    about = identity(loaded)
    ids = np.concatenate([document.ids for document in chosen])
    collector = _Collector(loaded, ids, backend)
    key = f"{_CHECKPOINT_FORMAT}:{ids_hash(chosen)}:{sha256_of([str(about)])}"
    key += f":{tokens_per_batch}:{loaded.window}"
    done = collector.resume(checkpoint, key)
    with collector.watching(), torch.inference_mode():
        forwards = batches(chosen, tokens_per_batch, window=loaded.window)
        for number, rows in enumerate(forwards, start=1):
            if number <= done:
                continue
            collector.forward(collate(rows), logits_to_keep=1)
            if progress:
                progress(collector.statistics.tokens, len(ids))
            if checkpoint and number % _CHECKPOINT_EVERY == 0:
                collector.save(checkpoint, key, number)
    if not torch.isfinite(collector.statistics.sums["entropy_mean"]).all():
        raise VarMoeError(f"model {loaded.name!r} gives non-finite router logits; try float32")
    tokens, residuals = collector.statistics.tokens, collector.residuals.means()
    lead = leading_count(loaded.top_k)
    frame = collector.statistics.frame(loaded.tokenizer, leading=lead)
    vocabulary = max(int(loaded.model.config.get_text_config().vocab_size), len(loaded.tokenizer))
    head: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        **about,
        "dataset": dataset,
        "data_hash": data_hash,
        "ids_hash": ids_hash(documents),
        "tokens_asked": max_tokens,
        "tokens": tokens,
        "leading": lead,
        "vocabulary": vocabulary,
        "entropy_max_nats": float(np.log(about["experts"])),
        "provenance": provenance(),
    }
    head["hash"] = profile_hash(frame, residuals, head)
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return RoutingProfile(
        stats=frame,
        residuals=residuals,
        head=head,
        ratios=collector.ratios.quantiles(tokens),
        sensitivity=collector.changes.sensitivity(tokens),
    )
