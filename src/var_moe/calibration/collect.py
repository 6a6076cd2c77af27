"""Collecting a profile: one pass of the unmodified model over calibration text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from var_moe.calibration.peers import PeerStatistics
from var_moe.calibration.profile import RoutingProfile, profile_hash
from var_moe.calibration.residuals import ResidualFit
from var_moe.calibration.statistics import RoutingStatistics
from var_moe.data.documents import ids_hash
from var_moe.errors import UsageError, VarMoeError
from var_moe.evaluation.batching import Window, batches, collate, drawn
from var_moe.execution.backends.sorted import weighted_sum as weighted
from var_moe.execution.dispatch import attach, detach, experts_modules, pair_backend
from var_moe.models.identity import identity
from var_moe.models.router_hooks import RouterLogits
from var_moe.routing.ranking import leading_count, rank_slots, routing_mass, shares
from var_moe.storage import SCHEMA_VERSION, atomic_write, provenance, sha256_of

if TYPE_CHECKING:
    import pandas as pd

    from var_moe.data.documents import EncodedDocument
    from var_moe.models.loading import LoadedModel

DEFAULT_TOKENS = 400_000
"""Calibration size unless told otherwise: `frequency_threshold` counts in a text of this size."""
_CHECKPOINT_FORMAT = 2
_CHECKPOINT_EVERY = 10  # forwards: some seconds of work


class _Collector:
    """The experts session of profiling: runs all pairs and takes notes."""

    def __init__(self, layers: int, experts: int, backend: str) -> None:
        self.layers, self.experts_count = layers, experts
        self.statistics = RoutingStatistics(layers=layers, experts=experts)
        self.residuals: ResidualFit | None = None
        self.peers = PeerStatistics()
        self.top_k = 0
        self.logits: RouterLogits | None = None
        self._backend = pair_backend(backend)
        self._rows = torch.empty(0, dtype=torch.int64)
        self._counted = torch.empty(0, dtype=torch.int64)

    def begin(self, ids: Tensor, counted: Tensor) -> None:
        """The tokens of the forward that starts: (B, S) ids and which of them count."""
        self._counted = counted.reshape(-1).nonzero().squeeze(1)
        self._rows = self.statistics.rows(ids.reshape(-1)[self._counted])
        self.statistics.tokens += self._counted.shape[0]

    def prepare(self, top_k: int, hidden_size: int) -> ResidualFit:
        """Allocate what depends on the router's K."""
        self.top_k = top_k
        self.residuals = ResidualFit(
            layers=self.layers, experts=self.experts_count, top_k=top_k, hidden_size=hidden_size
        )
        return self.residuals

    def experts(
        self, layer: int, module: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor
    ) -> Tensor:
        """One layer: run every pair, note the decision and what each expert gave."""
        outputs = self._backend(module, hidden, index)
        at = self._counted.to(index.device)
        rank = rank_slots(index[at], weight[at])
        ranked_index, ranked_weight = index[at].gather(1, rank), weight[at].gather(1, rank)
        lead = leading_count(index.shape[1])
        assert self.logits is not None
        self.statistics.add(
            layer,
            self._rows,
            entropy=self.logits.entropy(layer, index, weight)[at],
            confidence=routing_mass(ranked_weight[:, :lead], ranked_weight),
            index=ranked_index,
            mass=shares(ranked_weight),
        )
        fit = self.residuals or self.prepare(index.shape[1], hidden.shape[1])
        ranked_outputs = outputs[at].gather(1, rank[:, :, None].expand(-1, -1, outputs.shape[2]))
        fit.add(layer, outputs=ranked_outputs, weight=ranked_weight, index=ranked_index, lead=lead)
        self.peers.add(layer, ranked_index, ranked_weight, ranked_outputs)
        return weighted(outputs, weight, hidden.dtype)


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
    model = loaded.model
    modules = experts_modules(model)
    experts = int(getattr(modules[0][1], "num_experts", 0)) if modules else 0
    collector = _Collector(len(modules), experts, backend)
    about = identity(loaded)
    weights = sha256_of([str(about)])
    total = sum(len(document.ids) for document in chosen)
    size = window or loaded.window
    text = ids_hash(chosen)
    key = f"{_CHECKPOINT_FORMAT}:{text}:{weights}:{tokens_per_batch}:{size}"
    done = _resume(collector, checkpoint, key)
    before = attach(model, collector)
    try:
        with RouterLogits(model, len(modules)) as collector.logits, torch.inference_mode():
            for number, batch in enumerate(batches(chosen, tokens_per_batch, window=size)):
                if number < done:
                    continue
                _forward(model, collector, batch, loaded.device)
                if progress:
                    progress(collector.statistics.tokens, total)
                if checkpoint and (number + 1) % _CHECKPOINT_EVERY == 0:
                    _save_state(collector, checkpoint, key, number + 1)
    finally:
        detach(model, before)
    if not torch.isfinite(collector.statistics.entropy.mean).all():
        raise VarMoeError(f"model {loaded.name!r} gives non-finite router logits; try float32")
    head = {
        **about,
        "dataset": dataset,
        "data_hash": data_hash,
        "ids_hash": ids_hash(documents),
        "tokens_asked": max_tokens,
    }
    profile = _finish(loaded, collector, head)
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return profile


def _forward(model: Any, collector: _Collector, batch: list[Window], device: Any) -> None:
    tokens = collate(batch)
    collector.begin(tokens.ids, tokens.counted)
    model(
        input_ids=tokens.ids.to(device),
        attention_mask=tokens.valid.long().to(device),
        use_cache=False,
        logits_to_keep=1,
    )


def _save_state(collector: _Collector, path: Path, key: str, done: int) -> None:
    from safetensors.torch import save_file

    state = collector.statistics.state_dict() | collector.peers.state_dict()
    if collector.residuals is not None:
        state |= collector.residuals.state_dict()
        state["top_k"] = torch.tensor(collector.top_k)
    note = {"key": key, "done": str(done)}
    atomic_write(path, lambda temporary: save_file(state, temporary, metadata=note))


def _resume(collector: _Collector, path: Path | None, key: str) -> int:
    """Load a checkpoint of the same text and model; returns the forwards already done."""
    if path is None or not path.is_file():
        return 0
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        note = file.metadata() or {}
        if note.get("key") != key:
            return 0
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    collector.statistics.load_state_dict(state)
    collector.peers.load_state_dict(state)
    if "residual_moment" in state:
        fit = collector.prepare(int(state["top_k"]), state["residual_moment"].shape[2])
        fit.load_state_dict(state)
    return int(note["done"])


def _finish(loaded: LoadedModel, collector: _Collector, source: dict[str, Any]) -> RoutingProfile:
    statistics = collector.statistics
    assert collector.residuals is not None
    residuals = collector.residuals.means()
    frame = _frame(statistics, leading_count(collector.top_k), loaded.tokenizer)
    vocabulary = max(int(loaded.model.config.get_text_config().vocab_size), len(loaded.tokenizer))
    head: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        **source,
        "tokens": statistics.tokens,
        "layers": collector.layers,
        "experts": collector.experts_count,
        "top_k": collector.top_k,
        "leading": leading_count(collector.top_k),
        "vocabulary": vocabulary,
        "entropy_max_nats": float(np.log(collector.experts_count)),
        "provenance": provenance(),
    }
    head["hash"] = profile_hash(frame, residuals, head)
    peers = collector.peers.calibration()
    return RoutingProfile(stats=frame, residuals=residuals, head=head, peers=peers)


def _frame(statistics: RoutingStatistics, leading: int, tokenizer: Any) -> pd.DataFrame:
    """One row per (layer, token id seen), ordered by layer and token id."""
    import pandas as pd

    ids = np.array(statistics.token_ids, dtype=np.int64)
    order = np.argsort(ids)
    strings = np.array(tokenizer.convert_ids_to_tokens(ids[order].tolist()), dtype=object)
    parts = []
    for layer in range(statistics.layers):
        pick = torch.from_numpy(order)
        count = statistics.count[layer][pick]
        spread = count.clamp(min=1)
        first = statistics.first[layer][pick]
        mass = statistics.mass[layer][pick]
        top = mass.argsort(dim=1, descending=True, stable=True)[:, :leading]
        parts.append(
            pd.DataFrame(
                {
                    "layer": np.int32(layer),
                    "token_id": ids[order],
                    "token_str": strings,
                    "frequency": count.long().numpy(),
                    "mean_entropy": statistics.entropy.mean[layer][pick].numpy(),
                    "std_entropy": (statistics.entropy.m2[layer][pick] / spread).sqrt().numpy(),
                    "min_entropy": statistics.min_entropy[layer][pick].numpy(),
                    "max_entropy": statistics.max_entropy[layer][pick].numpy(),
                    "mean_confidence": statistics.confidence.mean[layer][pick].numpy(),
                    "std_confidence": (statistics.confidence.m2[layer][pick] / spread)
                    .sqrt()
                    .numpy(),
                    "routing_consistency": (first.max(dim=1).values / spread).numpy(),
                    "top_expert": first.argmax(dim=1).numpy(),
                    "leading_experts": list(top.numpy()),
                    "leading_weights": list((mass.gather(1, top) / spread[:, None]).numpy()),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)
