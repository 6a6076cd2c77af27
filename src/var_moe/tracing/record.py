"""Recording a trace: one pass of the unmodified model over text, with one pass back for damages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from var_moe.data.documents import ids_hash
from var_moe.errors import UsageError, VarMoeError
from var_moe.evaluation.batching import Window, batches, collate, drawn
from var_moe.execution.backends import open_backend
from var_moe.execution.backends.base import weighted_sum
from var_moe.execution.dispatch import dispatched
from var_moe.models.identity import identity
from var_moe.models.moe_layers import RouterLogits, experts_shape
from var_moe.routing.compensation import Compensation
from var_moe.routing.damage import DamageModel
from var_moe.routing.decision import ForwardContext
from var_moe.routing.keeping import rank_slots, shares
from var_moe.storage import SCHEMA_VERSION, provenance
from var_moe.tracing.first_order import DamageProbe, loss_and_gradient, scored_targets
from var_moe.tracing.trace import ProfileView, RoutingTrace, Writer, joined, key_of

if TYPE_CHECKING:
    from var_moe.data.documents import EncodedDocument
    from var_moe.models.loading import LoadedModel

LABELS = ("text", "sampled")
_FORMAT = 2  # of what is recorded: a recording of another one is not gone on with
_FORWARDS_PER_SHARD = 8


class NoBackwardError(UsageError):
    """The model, or the memory, allows no backward pass."""


class _Recorder:
    """The experts session of a recording: runs all pairs and notes what the router decided."""

    def __init__(self, model: Any, layers: int, top_k: int, backend: str) -> None:
        self.layers, self.top_k = layers, top_k
        self.logits = RouterLogits(model, layers)
        self.probe: DamageProbe | None = None
        self.sampled: int | None = None  # the seed of sampled labels
        self.predictor: DamageModel | None = None
        self.keep_hidden = False
        self._backend = open_backend(backend)
        self._at = torch.empty(0, dtype=torch.int64)
        self._rows: list[dict[str, Tensor]] = []

    def begin(self, context: ForwardContext) -> None:
        """The tokens of the forward that starts."""
        self._at = context.counted.reshape(-1).nonzero().squeeze(1)
        self._rows = []

    def experts(
        self, layer: int, module: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor
    ) -> Tensor:
        """One layer: run every pair, note the decision by rank."""
        if index.shape[1] != self.top_k:
            raise UsageError(
                f"MoE layer {layer} runs {index.shape[1]} experts per token and the model's "
                f"configuration says {self.top_k}; a trace needs the same K in all layers"
            )
        outputs = self._backend.pairs(module, hidden, index)
        out = weighted_sum(outputs, weight, hidden.dtype)
        with torch.no_grad():
            at = self._at.to(index.device)
            rank = rank_slots(index[at], weight[at])
            ranked, heavy = index[at].gather(1, rank), weight[at].gather(1, rank)
            row = {
                "index": ranked.to(torch.int16),
                "weight": shares(heavy.float()).to(torch.float16),
                "entropy": self.logits.entropy(layer, index, weight)[at].to(torch.float16),
            }
            if self.keep_hidden:
                row["hidden"] = hidden[at].to(torch.float16)
            if self.predictor is not None:
                hint = self.predictor.layer(layer, hidden.device).hint(hidden[at])
                row["hint"] = torch.zeros_like(row["entropy"]) if hint is None else hint
            self._rows.append({name: value.cpu() for name, value in row.items()})
        if self.probe is None:
            return out
        return self.probe.watch(
            layer,
            module,
            hidden=hidden,
            outputs=outputs,
            at=at,
            rank=rank,
            index=ranked,
            weight=heavy,
            out=out,
        )

    def decisions(self) -> dict[str, Tensor]:
        """The forward's decisions: (L, n, ...)."""
        return {name: torch.stack([row[name] for row in self._rows]) for name in self._rows[0]}


def record_trace(
    loaded: LoadedModel,
    documents: Sequence[EncodedDocument],
    *,
    dataset: str,
    data_hash: str,
    folder: str | Path | None = None,
    profile: ProfileView | None = None,
    compensation: Compensation | None = None,
    damage: bool = True,
    labels: str = "text",
    stored: bool = True,
    predictor: DamageModel | None = None,
    hidden: bool = False,
    max_tokens: int | None = None,
    tokens_per_batch: int = 4096,
    window: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    backend: str = "sorted",
) -> RoutingTrace:
    """Run the unmodified model over text and note every decision of its routers.

    Args:
        loaded: the model and its tokenizer.
        documents: the text, in the list that other measurements on it use.
        dataset: name of the text, for the head.
        data_hash: hash of the text, for the head.
        folder: where the trace is written as it grows, so that a killed recording goes on after
            its last whole shard; without, it is kept in memory alone.
        profile: of the same model; its residual means give the damages ``cut_residual``.
        compensation: of the same model; gives the damages ``cut_compensated``.
        damage: also note each token's loss and first-order damages (see `tracing.damage`), which
            takes a backward pass: about three times the time, and the memory of training on one
            batch without its parameters' gradients.
        labels: whose loss the damages are of: the ``"text"``'s own next tokens, or ``"sampled"``
            from the model itself, for which half the mean of the squares is exactly the expected
            rise of the loss to second order (Fisher); ``nll`` is of the text's own in both.
        stored: also take the damages of plain VAR's stored decisions (``next``, ``foreign``).
        predictor: also note what this damage model reads off each layer's input (``hint``), so that
            its policy can be replayed.
        hidden: also note the layers' inputs, 2 L D bytes a token, for fitting.
        max_tokens: use documents of so many tokens, drawn with ``seed``; the last one is cut.
        tokens_per_batch: padded tokens per forward; fewer need less memory.
        window: longest sequence of a forward; by default the model's context, at most 1,024.
        seed: draws documents and the experts of ``foreign``.
        progress: called with tokens done and tokens in all.
        backend: experts backend.

    Raises:
        UsageError: unknown labels, no text, a model whose router can't be watched, a profile or a
            compensation of another model, or a model without a backward pass.
        VarMoeError: the model gave a loss or router logits that are not finite.
    """
    if labels not in LABELS:
        raise UsageError(f"labels = {labels!r}: expected one of {', '.join(LABELS)}")
    part = drawn(documents, max_tokens, seed)
    positions, chosen = list(part), list(part.values())
    total = sum(len(document.ids) for document in chosen)
    if not total:
        raise UsageError(f"dataset {dataset!r}: no text to trace; expected documents")
    if profile is not None:
        profile.check_loaded(loaded)
    if compensation is not None:
        compensation.check(**experts_shape(loaded.model))
    size = window or loaded.window
    options = {
        "format": _FORMAT,
        "dataset": dataset,
        "data_hash": data_hash,
        "tokens": total,
        "tokens_asked": max_tokens,
        "tokens_per_batch": tokens_per_batch,
        "window": size,
        "seed": seed,
        "backend": backend,
        "damage": damage,
        "labels": labels,
        "stored": stored,
        "hidden": hidden,
        "predictor_hash": None if predictor is None else predictor.hash,
        "profile_hash": profile.hash if profile is not None and damage else None,
        "compensation_hash": compensation.hash if compensation is not None and damage else None,
        "dtype": loaded.dtype,
    }
    about = identity(loaded)
    text = ids_hash(chosen)
    writer = Writer(Path(folder), key=key_of({**about, **options, "ids": text})) if folder else None
    forwards = list(batches(chosen, tokens_per_batch, window=size))
    recorder = _Recorder(loaded.model, about["layers"], about["top_k"], backend)
    recorder.predictor, recorder.keep_hidden = predictor, hidden
    if damage:
        means = profile.residuals if profile is not None else None
        recorder.probe = DamageProbe(
            open_backend(backend),
            residuals=means,
            compensation=compensation,
            stored=stored,
            seed=seed,
        )
        recorder.sampled = seed if labels == "sampled" else None
    parts = _record(loaded, recorder, forwards, writer, progress)
    head = {
        "schema_version": SCHEMA_VERSION,
        **about,
        **{name: value for name, value in options.items() if name != "format"},
        **_layout(forwards, chosen, positions),
        "provenance": provenance(),
    }
    if writer is None or folder is None:
        return RoutingTrace.of(joined(parts), head)
    writer.finish(head)
    return RoutingTrace.load(folder)


def _record(
    loaded: LoadedModel,
    recorder: _Recorder,
    forwards: list[list[Window]],
    writer: Writer | None,
    progress: Callable[[int, int], None] | None,
) -> list[dict[str, Tensor]]:
    """Run the forwards that are not done; returns what no writer took."""
    parts: list[dict[str, Tensor]] = []
    done = writer.resume() if writer else 0
    sizes = [sum(len(row.ids) - row.overlap for row in rows) for rows in forwards]
    # Inference mode is off where a caller has it on: what is made in it has no way back.
    with dispatched(loaded.model, recorder), recorder.logits, torch.inference_mode(False):
        for number, rows in enumerate(forwards):
            if number < done or not sizes[number]:
                continue
            parts.append(_forward(loaded, recorder, rows, number))
            if progress:
                progress(sum(sizes[: number + 1]), sum(sizes))
            if writer and len(parts) == _FORWARDS_PER_SHARD:
                writer.add(joined(parts), done=number + 1)
                parts.clear()
    if writer and parts:
        writer.add(joined(parts), done=len(forwards))
    return parts


def _forward(
    loaded: LoadedModel, recorder: _Recorder, rows: list[Window], number: int
) -> dict[str, Tensor]:
    """One forward, and the way back where damages are wanted: one part of the trace."""
    batch = collate(rows)
    recorder.begin(batch)
    part = {"ids": batch.ids[batch.counted]}
    if recorder.probe is None:
        with torch.inference_mode():
            _run(loaded, batch, logits_to_keep=1)
        part |= recorder.decisions()
    else:
        part |= _with_damage(loaded, recorder, recorder.probe, batch, number)
    for name in ("entropy", "nll"):
        if name in part and not torch.isfinite(part[name]).all():
            raise VarMoeError(
                f"model {loaded.name!r}: the {name} is not finite in forward {number}; "
                "try --dtype float32"
            )
    return part


def _with_damage(
    loaded: LoadedModel, recorder: _Recorder, probe: DamageProbe, batch: ForwardContext, number: int
) -> dict[str, Tensor]:
    probe.begin(number)
    target = scored_targets(batch.counted)
    try:
        with torch.enable_grad():
            logits = _run(loaded, batch)
            losses, gradient = loss_and_gradient(
                logits.detach(), batch.ids, target, sample=_rng(recorder.sampled, number)
            )
            probe.backward(logits, gradient)
            damages = probe.take(recorder.layers)
    except (RuntimeError, NotImplementedError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NoBackwardError(
            f"model {loaded.name!r}: no backward pass ({first}); record the trace with "
            "damage=False, or fewer tokens_per_batch if memory ran out"
        ) from error
    nll = torch.zeros(batch.size, dtype=torch.float32)
    nll[target] = losses.cpu()
    nll = nll[batch.counted.reshape(-1)]
    named = {f"damage.{name}": value for name, value in damages.items()}
    return {**recorder.decisions(), "nll": nll, **named}


def _rng(seed: int | None, number: int) -> torch.Generator | None:
    """A generator of one forward's own, so that a resumed recording draws the same."""
    return None if seed is None else torch.Generator().manual_seed(seed * 1_000_003 + number)


def _run(loaded: LoadedModel, batch: ForwardContext, **options: Any) -> Tensor:
    logits: Tensor = loaded.model(
        input_ids=batch.ids.to(loaded.device),
        attention_mask=batch.valid.long().to(loaded.device),
        use_cache=False,
        **options,
    ).logits
    return logits


def _layout(
    forwards: list[list[Window]], chosen: Sequence[EncodedDocument], positions: list[int]
) -> dict[str, Any]:
    """Which documents stand where: starts, positions in the list given, and their ids."""
    order: list[int] = []
    starts = [0]
    for row in (row for rows in forwards for row in rows):
        if not order or order[-1] != row.document:
            order.append(row.document)
            starts.append(starts[-1])
        starts[-1] += len(row.ids) - row.overlap
    return {
        "starts": starts,
        "documents": [positions[i] for i in order],
        "document_ids": [chosen[i].id for i in order],
    }
