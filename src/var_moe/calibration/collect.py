"""Collecting a profile: one pass of the unmodified model over calibration text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from var_moe.calibration.profile import PeerCalibration, RoutingProfile, profile_hash
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
from var_moe.execution.backends import open_backend
from var_moe.execution.backends.base import weighted_sum
from var_moe.execution.dispatch import dispatched
from var_moe.models.identity import identity
from var_moe.models.moe_layers import RouterLogits, experts_shape
from var_moe.routing.decision import ForwardContext
from var_moe.routing.keeping import leading_count, rank_slots, routing_mass, shares
from var_moe.storage import SCHEMA_VERSION, atomic_write, provenance, sha256_of

if TYPE_CHECKING:
    from var_moe.data.documents import EncodedDocument
    from var_moe.models.loading import LoadedModel

DEFAULT_TOKENS = 400_000
"""Calibration size unless told otherwise: `frequency_threshold` counts in a text of this size."""
_CHECKPOINT_FORMAT = 3
_CHECKPOINT_EVERY = 10  # forwards: some seconds of work


class _Collector:
    """The experts session of profiling: runs all pairs and takes notes."""

    def __init__(self, ids: np.ndarray, *, shape: dict[str, int], top_k: int, backend: str) -> None:
        layers, experts = shape["layers"], shape["experts"]
        self.lead = leading_count(top_k)
        self.statistics = RoutingStatistics(ids, layers=layers, experts=experts)
        self.residuals = ResidualSums(**shape, top_k=top_k)
        self.ratios = RatioHistogram(layers=layers, top_k=top_k)
        self.changes = OutputChange(layers=layers, top_k=top_k)
        self.logits: RouterLogits | None = None
        self._backend = open_backend(backend)
        self._rows = self._counted = torch.empty(0, dtype=torch.int64)

    def begin(self, context: ForwardContext) -> None:
        """The forward that starts."""
        self._counted = context.counted.reshape(-1).nonzero().squeeze(1)
        self._rows = self.statistics.rows(context.ids.reshape(-1)[self._counted])

    def experts(
        self, layer: int, module: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor
    ) -> Tensor:
        """One layer: run every pair, note the decision and what each expert gave."""
        outputs = self._backend.pairs(module, hidden, index)
        at = self._counted.to(index.device)
        rank = rank_slots(index[at], weight[at])
        ranked_index, ranked_weight = index[at].gather(1, rank), weight[at].gather(1, rank)
        ranked = outputs[at].gather(1, rank[:, :, None].expand(-1, -1, outputs.shape[2]))
        assert self.logits is not None
        self.statistics.add(
            layer,
            self._rows,
            entropy=self.logits.entropy(layer, index, weight)[at],
            confidence=routing_mass(ranked_weight[:, : self.lead], ranked_weight),
            index=ranked_index,
            mass=shares(ranked_weight),
        )
        self.residuals.add(
            layer, outputs=ranked, weight=ranked_weight, index=ranked_index, lead=self.lead
        )
        self.ratios.add(layer, ranked_weight)
        self.changes.add(layer, ranked, ranked_weight)
        return weighted_sum(outputs, weight, hidden.dtype)

    def _parts(self) -> tuple[RunningSums, ...]:
        return self.statistics, self.residuals, self.ratios, self.changes

    def save(self, path: Path, key: str, done: int) -> None:
        """Write a checkpoint after ``done`` forwards."""
        from safetensors.torch import save_file

        state: dict[str, Tensor] = {}
        for part in self._parts():
            state |= part.state_dict()
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
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for part in self._parts():
            part.load_state_dict(state)
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
    window: int | None = None,
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
        window: longest sequence of a forward; by default the model's context, at most 1,024.
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
    model, about = loaded.model, identity(loaded)
    ids = np.concatenate([document.ids for document in chosen])
    collector = _Collector(ids, shape=experts_shape(model), top_k=loaded.top_k, backend=backend)
    size = window or loaded.window
    key = f"{_CHECKPOINT_FORMAT}:{ids_hash(chosen)}:{sha256_of([str(about)])}"
    key += f":{tokens_per_batch}:{size}"
    done = collector.resume(checkpoint, key)
    with (
        dispatched(model, collector),
        RouterLogits(model, about["layers"]) as collector.logits,
        torch.inference_mode(),
    ):
        for number, rows in enumerate(batches(chosen, tokens_per_batch, window=size), start=1):
            if number <= done:
                continue
            context = collate(rows)
            collector.begin(context)
            model(
                input_ids=context.ids.to(loaded.device),
                attention_mask=context.valid.long().to(loaded.device),
                use_cache=False,
                logits_to_keep=1,
            )
            if progress:
                progress(collector.statistics.tokens, len(ids))
            if checkpoint and number % _CHECKPOINT_EVERY == 0:
                collector.save(checkpoint, key, number)
    if not torch.isfinite(collector.statistics.sums["entropy_mean"]).all():
        raise VarMoeError(f"model {loaded.name!r} gives non-finite router logits; try float32")
    source = {
        "dataset": dataset,
        "data_hash": data_hash,
        "ids_hash": ids_hash(documents),
        "tokens_asked": max_tokens,
    }
    profile = _profile(loaded, collector, {**about, **source})
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return profile


def _profile(loaded: LoadedModel, collector: _Collector, source: dict[str, Any]) -> RoutingProfile:
    tokens, residuals = collector.statistics.tokens, collector.residuals.means()
    frame = collector.statistics.frame(loaded.tokenizer, leading=collector.lead)
    vocabulary = max(int(loaded.model.config.get_text_config().vocab_size), len(loaded.tokenizer))
    head: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        **source,
        "tokens": tokens,
        "leading": collector.lead,
        "vocabulary": vocabulary,
        "entropy_max_nats": float(np.log(source["experts"])),
        "provenance": provenance(),
    }
    head["hash"] = profile_hash(frame, residuals, head)
    peers = PeerCalibration(
        ratios=collector.ratios.quantiles(tokens), sensitivity=collector.changes.sensitivity(tokens)
    )
    return RoutingProfile(stats=frame, residuals=residuals, head=head, peers=peers)
