"""RoutingTrace: the unmodified model's router decisions on a text, and its folder.

The tokens stand in the order in which `evaluation.perplexity.document_losses` scores them, so
that a cache fed with them meets what it would meet there. The overlap of two windows is left
out: it takes no part in tiers or cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from var_moe.errors import UsageError
from var_moe.models.identity import check_fits, difference
from var_moe.routing.fast_path import ResidualMeans, RoutingTable
from var_moe.tracing.shards import HEAD_FILE, Writer, read_head, read_shards

if TYPE_CHECKING:
    from var_moe.models.loading import LoadedModel

DAMAGE = ("cut", "cut_residual", "cut_compensated", "next", "foreign")
"""Names of the changes whose first-order damage a trace can hold; see `tracing.damage`."""


class ProfileView(Protocol):
    """What traces need of a `RoutingProfile`, whose room lies above this one."""

    @property
    def head(self) -> dict[str, Any]:
        """Model, text and sizes."""

    @property
    def hash(self) -> str:
        """Identity of its content."""

    @property
    def residuals(self) -> ResidualMeans:
        """Mean outputs of dropped experts."""

    def table(self) -> RoutingTable:
        """Counts and entropies per (layer, token id)."""

    def check_loaded(self, loaded: LoadedModel) -> None:
        """Refuse another model."""


@dataclass(frozen=True, kw_only=True)
class RoutingTrace:
    """Router decisions on N counted tokens of D documents, in L layers.

    ``head`` says where it comes from: schema_version, model, revision, tokenizer_hash, routers
    (fingerprint), layers, experts, top_k, dataset, data_hash, tokens, document_ids,
    profile_hash (of the residual means behind ``cut_residual``, else None), compensation_hash (of
    the one behind ``cut_compensated``, else None), labels, predictor_hash
    (of the damage model behind ``hint``, else None), provenance.
    """

    ids: Tensor  # (N,) int64 token ids
    starts: Tensor  # (D + 1,) int64, where documents start; the last is N
    documents: Tensor  # (D,) int64 positions in the list of documents that was given
    index: Tensor  # (L, N, K) int16 experts by rank, the first one first
    weight: Tensor  # (L, N, K) float16 shares of the token's weights; zeros where these are
    entropy: Tensor  # (L, N) float16 router entropy in nats
    head: dict[str, Any]
    hint: Tensor | None = None  # (L, N) what a damage model reads off the layers' inputs
    hidden: Tensor | None = None  # (L, N, D) float16 the layers' inputs
    nll: Tensor | None = None  # (N,) float32 loss as a target in nats, 0 for a document's first
    # Change of the summed NLL in nats, to first order, by one changed (layer, token):
    # (L, N) float32, "cut" and "cut_compensated": (L, N, K - 1)
    damage: dict[str, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """N, the counted tokens."""
        return int(self.ids.shape[0])

    @property
    def scored(self) -> int:
        """Tokens that have a loss: a document's first one has none."""
        return self.tokens - len(self.documents)

    @property
    def layers(self) -> int:
        """L, the number of MoE layers."""
        return int(self.index.shape[0])

    @property
    def top_k(self) -> int:
        """K of the unmodified model."""
        return int(self.index.shape[2])

    def places(self) -> Tensor:
        """Each token's place in its document, from 0. (N,) int64"""
        sizes = self.starts.diff()
        return torch.arange(self.tokens) - self.starts[:-1].repeat_interleave(sizes)

    def check_loaded(self, loaded: LoadedModel) -> None:
        """Refuse a trace of another model.

        Raises:
            UsageError: names the trace's model and the one at hand.
        """
        check_fits("trace", self.head, loaded)

    def check_profile(self, profile: ProfileView) -> None:
        """Refuse a profile of another model, or another than damages were recorded with.

        Raises:
            UsageError: names both models, or both profiles.
        """
        mine, theirs = self.head, profile.head
        fault = difference(mine, theirs)
        if fault:
            raise UsageError(
                f"profile of model {theirs['model']!r} does not fit the trace of model "
                f"{mine['model']!r}: {fault}; make both from one model"
            )
        recorded = mine.get("profile_hash")
        if recorded is not None and recorded != profile.hash:
            raise UsageError(
                f"profile {profile.hash[:12]!r} does not fit the trace, whose damages were "
                f"recorded with the residual means of profile {recorded[:12]!r}; make the trace "
                "again with `var-moe trace`"
            )

    def save(self, folder: str | Path) -> None:
        """Write the folder, as one shard; the head comes last."""
        writer = Writer(Path(folder), key="saved")
        writer.clear()
        writer.add(self.columns(), done=1)
        writer.finish({**self.head, **self._layout()})

    def columns(self) -> dict[str, Tensor]:
        """All tensors that have one entry per token, by their names in a shard."""
        found = {"ids": self.ids, "index": self.index, "weight": self.weight}
        found["entropy"] = self.entropy
        for name in ("nll", "hint", "hidden"):
            if getattr(self, name) is not None:
                found[name] = getattr(self, name)
        return found | {f"damage.{name}": value for name, value in self.damage.items()}

    def _layout(self) -> dict[str, Any]:
        return {"starts": self.starts.tolist(), "documents": self.documents.tolist()}

    @classmethod
    def of(cls, columns: dict[str, Tensor], head: dict[str, Any]) -> RoutingTrace:
        """Put a trace together from its columns and a head that also holds the layout."""
        head = dict(head)
        starts, documents = head.pop("starts"), head.pop("documents")
        return cls(
            starts=torch.tensor(starts, dtype=torch.int64),
            documents=torch.tensor(documents, dtype=torch.int64),
            head=head,
            damage={
                name: columns[f"damage.{name}"] for name in DAMAGE if f"damage.{name}" in columns
            },
            **{name: value for name, value in columns.items() if not name.startswith("damage.")},
        )

    @classmethod
    def load(cls, folder: str | Path) -> RoutingTrace:
        """Read a folder that `save` or `record_trace` wrote.

        Raises:
            UsageError: no such folder, not a whole trace, or a shard is missing, truncated or
                damaged; names the file and what to do.
        """
        folder = Path(folder)
        head = read_head(folder)
        columns = read_shards(folder, head.pop("shards"))
        try:
            trace = cls.of(columns, head)
            fits = int(trace.starts[-1]) == trace.tokens == head["tokens"]
        except (KeyError, TypeError, IndexError):
            fits = False
        if not fits:
            raise UsageError(
                f"{folder / HEAD_FILE}: does not belong to the shards beside it; make it again "
                "with `var-moe trace`"
            )
        return trace


def bytes_per_token(
    *, layers: int, top_k: int, damage: bool = True, residuals: bool = False
) -> int:
    """Size of a trace in bytes per counted token, in memory and on disk.

    Args:
        layers: L.
        top_k: K.
        damage: whether losses and first-order damages are recorded.
        residuals: whether those with residual means are, too.
    """
    decision = 4 * top_k + 2
    effects = 4 * (top_k - 1 + 2 + int(residuals)) if damage else 0
    return 8 + layers * (decision + effects) + (4 if damage else 0)
