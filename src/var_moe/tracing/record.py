"""Recording a trace: one pass of the unmodified model over text, with one pass back for damages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from var_moe.data.documents import ids_hash
from var_moe.errors import UsageError, VarMoeError, one_line
from var_moe.evaluation.batching import Window, batches, collate, drawn
from var_moe.execution.backends import open_backend
from var_moe.models.identity import identity
from var_moe.models.moe_layers import experts_shape
from var_moe.routing.compensation import Compensation
from var_moe.routing.damage import DamageModel
from var_moe.routing.decision import ForwardContext
from var_moe.routing.keeping import shares
from var_moe.storage import SCHEMA_VERSION, provenance, sha256_of
from var_moe.tracing.all_pairs import AllPairs, LayerDecisions
from var_moe.tracing.first_order import DamageProbe, loss_and_gradient, scored_targets
from var_moe.tracing.trace import ProfileView, RoutingTrace, Writer, joined

if TYPE_CHECKING:
    from var_moe.data.documents import EncodedDocument
    from var_moe.models.loading import LoadedModel

_FORMAT = 2  # of what is recorded: a recording of another one is not gone on with
_FORWARDS_PER_SHARD = 8


class NoBackwardError(UsageError):
    """The model, or the memory, allows no backward pass."""


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
    sampled_labels: bool = False,
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
        damage: also note each token's loss and first-order damages (see `tracing.first_order`),
            which takes a backward pass: about three times the time, and the memory of training on
            one batch without its parameters' gradients.
        sampled_labels: damages are of the loss on labels sampled from the model itself, for which
            half the mean of the squares is exactly the expected rise of the loss to second order
            (Fisher); by default on the text's own next tokens. ``nll`` is of the text in both.
        stored: also take the damages of plain VAR's stored decisions (``next``, ``foreign``).
        predictor: also note what this damage model reads off each layer's input (``hint``), so that
            its policy can be replayed.
        hidden: also note the layers' inputs, 2 L D bytes a token, for fitting.
        max_tokens: use documents of so many tokens, drawn with ``seed``; the last one is cut.
        tokens_per_batch: padded tokens per forward; fewer need less memory.
        window: longest sequence of a forward; by default the model's context, at most 1,024.
        seed: draws documents, sampled labels and the experts of ``foreign``.
        progress: called with tokens done and tokens in all.
        backend: experts backend.

    Raises:
        UsageError: no text, a model whose router can't be watched, a profile or a compensation of
            another model, or a model without a backward pass.
        VarMoeError: the model gave a loss or router logits that are not finite.
    """
    part = drawn(documents, max_tokens, seed)
    chosen = list(part.values())
    total = sum(len(document.ids) for document in chosen)
    if not total:
        raise UsageError(f"dataset {dataset!r}: no text to trace; expected documents")
    if profile is not None:
        profile.check_loaded(loaded)
    if compensation is not None:
        compensation.check(**experts_shape(loaded.model))
    about = identity(loaded)
    options = {
        "dataset": dataset,
        "data_hash": data_hash,
        "tokens": total,
        "tokens_asked": max_tokens,
        "tokens_per_batch": tokens_per_batch,
        "window": window or loaded.window,
        "seed": seed,
        "backend": backend,
        "damage": damage,
        "labels": "sampled" if sampled_labels else "text",
        "stored": stored,
        "hidden": hidden,
        "predictor_hash": None if predictor is None else predictor.hash,
        "profile_hash": profile.hash if profile is not None and damage else None,
        "compensation_hash": compensation.hash if compensation is not None and damage else None,
        "dtype": loaded.dtype,
    }
    probe = None
    if damage:
        probe = DamageProbe(
            open_backend(backend),
            residuals=None if profile is None else profile.residuals,
            compensation=compensation,
            stored=stored,
            seed=seed,
        )
    recorder = Recorder(
        loaded,
        backend,
        probe=probe,
        labels_seed=seed if sampled_labels else None,
        predictor=predictor,
        hidden=hidden,
    )
    key = sha256_of([str({**about, **options, "format": _FORMAT}), ids_hash(chosen)])
    writer = Writer(Path(folder), key=key) if folder else None
    forwards = list(batches(chosen, tokens_per_batch, window=window or loaded.window))
    parts = recorder.record(forwards, writer=writer, progress=progress)
    layout = _layout(forwards, chosen, list(part))
    head = {"schema_version": SCHEMA_VERSION, **about, **options, **layout}
    head["provenance"] = provenance()
    if writer is None:
        columns = joined((parts.pop(0) for _ in range(len(parts))), total)
        return RoutingTrace.of(columns, head)
    writer.finish(head)
    return RoutingTrace.load(writer.folder)


class Recorder(AllPairs):
    """The experts session of a recording: notes what the router decided.

    Without a ``probe``, which takes the damages, there is no way back. Labels of the damages are
    drawn with ``labels_seed``; by default they are the text's own.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        backend: str,
        *,
        probe: DamageProbe | None = None,
        labels_seed: int | None = None,
        predictor: DamageModel | None = None,
        hidden: bool = False,
    ) -> None:
        super().__init__(loaded.model, loaded.moe_layers, backend)
        self._loaded, self._probe, self._labels_seed = loaded, probe, labels_seed
        self._predictor, self._hidden = predictor, hidden
        self._rows: list[dict[str, Tensor]] = []

    def record(
        self,
        forwards: Sequence[list[Window]],
        *,
        writer: Writer | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[dict[str, Tensor]]:
        """Run the forwards that ``writer`` lacks; returns the parts that it did not take."""
        parts: list[dict[str, Tensor]] = []
        done = writer.resume() if writer else 0
        sizes = [sum(len(row.ids) - row.overlap for row in rows) for rows in forwards]
        # Inference mode is off where a caller has it on: what is made in it has no way back.
        with self.watching(), torch.inference_mode(False):
            for number, rows in enumerate(forwards):
                if number < done or not sizes[number]:
                    continue
                parts.append(self._part(collate(rows), number))
                if progress:
                    progress(sum(sizes[: number + 1]), sum(sizes))
                if writer and len(parts) == _FORWARDS_PER_SHARD:
                    writer.add(parts, done=number + 1)
                    parts.clear()
        if writer and parts:
            writer.add(parts, done=len(forwards))
        return parts

    def columns(self, decided: LayerDecisions) -> dict[str, Tensor]:
        """What is noted of a layer's decisions. (n, ...) each"""
        noted = {
            "index": decided.index.to(torch.int16),
            "weight": shares(decided.weight.float()).to(torch.float16),
            "entropy": decided.entropy.to(torch.float16),
        }
        if self._hidden:
            noted["hidden"] = decided.hidden[decided.at].to(torch.float16)
        if self._predictor is not None:
            part = self._predictor.layer(decided.layer, decided.hidden.device)
            hint = part.hint(decided.hidden[decided.at])
            noted["hint"] = torch.zeros_like(noted["entropy"]) if hint is None else hint
        return noted

    def see(self, decided: LayerDecisions) -> None:
        top_k = decided.index.shape[1]
        if top_k != self._loaded.top_k:
            raise UsageError(
                f"MoE layer {decided.layer} runs {top_k} experts per token and the model's "
                f"configuration says {self._loaded.top_k}; a trace needs the same K in all layers"
            )
        self._rows.append({name: value.cpu() for name, value in self.columns(decided).items()})

    def watched(self, decided: LayerDecisions, out: Tensor) -> Tensor:
        return out if self._probe is None else self._probe.watch(decided, out)

    def _part(self, batch: ForwardContext, number: int) -> dict[str, Tensor]:
        """One forward, and the way back where damages are wanted: one part of the trace."""
        self._rows, more = [], {}
        if self._probe is None:
            with torch.inference_mode():
                self.forward(batch, logits_to_keep=1)
        else:
            more = self._damages(self._probe, batch, number)
        decisions = {name: torch.stack([row[name] for row in self._rows]) for name in self._rows[0]}
        part = {"ids": batch.ids[batch.counted], **decisions, **more}
        for name in ("entropy", "nll"):
            if name in part and not torch.isfinite(part[name]).all():
                raise VarMoeError(
                    f"model {self._loaded.name!r}: the {name} is not finite in forward {number}; "
                    "try --dtype float32"
                )
        return part

    def _damages(self, probe: DamageProbe, batch: ForwardContext, number: int) -> dict[str, Tensor]:
        """``nll`` and the damages of one forward."""
        probe.begin(number)
        target, rng = scored_targets(batch.counted), None
        if self._labels_seed is not None:  # each forward's own: a resumed recording draws the same
            rng = torch.Generator().manual_seed(self._labels_seed * 1_000_003 + number)
        try:
            with torch.enable_grad():
                logits = self.forward(batch)
                losses, gradient = loss_and_gradient(logits.detach(), batch.ids, target, sample=rng)
                probe.backward(logits, gradient)
                damages = probe.take(self._loaded.moe_layers)
        except (RuntimeError, NotImplementedError) as error:
            raise NoBackwardError(
                f"model {self._loaded.name!r}: no backward pass ({one_line(error)}); record the "
                "trace with damage=False, or fewer tokens_per_batch if memory ran out"
            ) from error
        nll = torch.zeros(batch.size, dtype=torch.float32)
        nll[target] = losses.cpu()
        named = {f"damage.{name}": value for name, value in damages.items()}
        return {"nll": nll[batch.counted.reshape(-1)], **named}


def _layout(
    forwards: Sequence[list[Window]], chosen: Sequence[EncodedDocument], positions: list[int]
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
