"""RoutingTrace: the unmodified model's router decisions on a text, and its folder.

The tokens stand in the order in which `evaluation.perplexity.document_losses` scores them, so
that a cache fed with them meets what it would meet there. The overlap of two windows is left
out: it takes no part in tiers or cache.

The folder holds shards of so many tokens each, and a head that is written last. A shard is a
safetensors file whose tensors have the tokens along one dimension. Its note says how many
forwards are done with it, so that a killed recording goes on after the last whole shard. The
head knows every shard's size and hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from var_moe.errors import UsageError
from var_moe.models.identity import difference
from var_moe.routing.compensation import ResidualMeans
from var_moe.routing.var import RoutingTable
from var_moe.storage import (
    SCHEMA_VERSION,
    atomic_write,
    atomic_write_json,
    entries_of,
    read_json,
)

if TYPE_CHECKING:
    from var_moe.models.loading import LoadedModel

HEAD_FILE = "trace.json"
_AGAIN = "make it again with `var-moe trace`"

DAMAGE = ("cut", "cut_residual", "cut_compensated", "next", "foreign")
"""Names of the changes whose first-order damage a trace can hold; see `tracing.first_order`."""


class ProfileView(Protocol):
    """What traces need of a `RoutingProfile`, whose room lies above this one."""

    @property
    def head(self) -> dict[str, Any]: ...

    @property
    def hash(self) -> str: ...

    @property
    def residuals(self) -> ResidualMeans: ...

    def table(self) -> RoutingTable: ...

    def check_loaded(self, loaded: LoadedModel) -> None: ...


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

    def check_profile(self, profile: ProfileView) -> None:
        """Raise UsageError for a profile of another model, or not the one behind the damages."""
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

    def columns(self) -> dict[str, Tensor]:
        """All tensors that have one entry per token, by their names in a shard."""
        names = ("ids", "index", "weight", "entropy", "nll", "hint", "hidden")
        columns = {name: getattr(self, name) for name in names}
        damage = {f"damage.{name}": value for name, value in self.damage.items()}
        return {name: value for name, value in columns.items() if value is not None} | damage

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
        """Read a folder that `record_trace` wrote.

        Raises:
            UsageError: no such folder, not a whole trace, or a shard is missing, truncated or
                damaged; names the file and what to do.
        """
        folder = Path(folder)
        head = _read_head(folder)
        with entries_of(folder / HEAD_FILE):
            shards = head.pop("shards")
            columns = joined(_shards(folder, shards), sum(shard["tokens"] for shard in shards))
            trace = cls.of(columns, head)
            if not int(trace.starts[-1]) == trace.tokens == head["tokens"]:
                raise UsageError(f"{folder / HEAD_FILE}: not of the shards beside it; {_AGAIN}")
        return trace


def joined(parts: Iterable[dict[str, Tensor]], tokens: int) -> dict[str, Tensor]:
    """The columns of several parts as one, in order; ``tokens`` in all.

    Filled part by part, so that a large trace is not held twice.
    """
    columns: dict[str, Tensor] = {}
    at = 0
    for part in parts:
        for name, value in part.items():
            dim = 0 if name in ("ids", "nll") else 1
            if name not in columns:
                shape = (*value.shape[:dim], tokens, *value.shape[dim + 1 :])
                columns[name] = value.new_empty(shape)
            columns[name].narrow(dim, at, value.shape[dim]).copy_(value)
        at += len(part["ids"])
    return columns


def _shard_file(number: int) -> str:
    return f"trace-{number:05d}.safetensors"


class Writer:
    """Writes the shards of one recording into a folder, and finally its head.

    ``key`` is what the shards are made from: those of another key are not gone on with.
    """

    def __init__(self, folder: Path, *, key: str) -> None:
        self.folder, self.key = folder, key
        self._shards: list[dict[str, Any]] = []

    def resume(self) -> int:
        """Keep the whole shards of the same key and drop all else; returns the forwards done."""
        done = 0
        while shard := self._whole(self.folder / _shard_file(len(self._shards))):
            done = shard.pop("done")
            self._shards.append(shard)
        self.clear(keep=len(self._shards))
        return int(done)

    def _whole(self, path: Path) -> dict[str, Any] | None:
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                note = file.metadata() or {}
        except (SafetensorError, OSError):
            return None
        if note.get("key") != self.key:
            return None
        return {
            "file": path.name,
            "tokens": int(note["tokens"]),
            "sha256": _hash(path),
            "done": int(note["done"]),
        }

    def clear(self, *, keep: int = 0) -> None:
        """Remove the head, the shards from number ``keep`` on, and what a kill left unfinished."""
        (self.folder / HEAD_FILE).unlink(missing_ok=True)
        kept = {_shard_file(number) for number in range(keep)}
        for path in self.folder.glob("trace-*.safetensors"):
            if path.name not in kept:
                path.unlink()
        for path in self.folder.glob(".trace*.tmp"):
            path.unlink()

    def add(self, parts: Sequence[dict[str, Tensor]], *, done: int) -> None:
        """Write the next shard; ``done`` forwards of the recording are in it and those before."""
        from safetensors.torch import save_file

        path = self.folder / _shard_file(len(self._shards))
        tokens = sum(len(part["ids"]) for part in parts)
        note = {"key": self.key, "done": str(done), "tokens": str(tokens)}
        tensors = joined(parts, tokens)
        atomic_write(path, lambda temporary: save_file(tensors, temporary, metadata=note))
        self._shards.append({"file": path.name, "tokens": tokens, "sha256": _hash(path)})

    def finish(self, head: dict[str, Any]) -> None:
        """Write the head: from now on the folder is a whole trace."""
        atomic_write_json(self.folder / HEAD_FILE, {**head, "shards": self._shards})


def _read_head(folder: Path) -> dict[str, Any]:
    """The head of a trace's folder; a UsageError says what is wrong with it."""
    path = folder / HEAD_FILE
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such trace folder; make one with `var-moe trace`")
    if not path.is_file() and any(folder.glob("trace-*.safetensors")):
        raise UsageError(
            f"{path}: missing, so the recording did not end; go on with it by the same "
            "`var-moe trace`"
        )
    head = read_json(path, what="routing trace")
    if not isinstance(head, dict) or head.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(f"{path}: not a trace of schema {SCHEMA_VERSION}; {_AGAIN}")
    if not isinstance(head.get("shards"), list) or not head["shards"]:
        raise UsageError(f"{path}: names no shards; {_AGAIN}")
    return head


def _shards(folder: Path, shards: list[dict[str, Any]]) -> Iterator[dict[str, Tensor]]:
    """The columns of each shard, which has to be the one that the head means."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for shard in shards:
        path = folder / str(shard["file"])
        if not path.is_file():
            raise UsageError(f"{path}: missing shard of a trace; {_AGAIN}")
        try:
            if _hash(path) != shard["sha256"]:
                raise UsageError(f"{path}: damaged or truncated shard of a trace; {_AGAIN}")
            yield load_file(path)
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path}: damaged shard of a trace ({error}); {_AGAIN}") from None


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
