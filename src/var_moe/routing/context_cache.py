"""The context cache: decisions keyed by a token's last N ids, LRU, with a time to live.

Which keys are in the cache depends on token ids and time alone, never on a decision. So one pass
over the ids per forward (`ContextCache.begin`, `lru.Walk`) finds the entry that each token meets,
for all layers. An entry has one slot per layer, filled by the first admitted decision of a token
that meets it; that is tensor maths without a loop over tokens (`ContextCache.layer`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from var_moe.routing.arrays import NUMPY, TORCH, Array, Operations
from var_moe.routing.lru import GONE, NEW, Clock, Stream, Walk

_SHARED = 0  # number of the one stream of a cache that all documents share
_DOCUMENTS_KEPT = 32  # streams kept for documents that later forwards may continue
# Rows of a layer's storage that belong to no entry: one is never written, one never read.
_EMPTY, _WASTE, _FIRST = 0, 1, 2


@dataclass(frozen=True)
class _Meeting:
    """Which entry each token of the running forward meets."""

    entry: Array  # (T,) number of the entry met, `entries` where there is none
    position: Array  # (T,) 0..T-1, T for tokens that may not fill slots
    own: Array  # (T,) 0..T-1
    before: Array  # (entries + 1,) row of storage at the forward's start
    after: Array  # (entries,) row at its end
    alone: bool  # each token inserts or refreshes an entry that no other token meets

    def on(self, device: torch.device) -> _Meeting:
        """The same as tensors on a device."""
        arrays = {name: value for name, value in vars(self).items() if name != "alone"}
        moved = {name: torch.from_numpy(value).to(device) for name, value in arrays.items()}
        return _Meeting(**moved, alone=self.alone)


@dataclass(frozen=True)
class Hits:
    """What the cache answers for one layer."""

    hit: Array  # (T,) bool: the slot was filled by an earlier token
    index: Array  # (T, leading) experts of the slot, -1 where none
    weight: Array | None  # (T, leading), if weights are stored

    def first(self, ops: Operations) -> Array:
        """The slot's first expert, -1 where the token does not hit. (T,)"""
        return ops.where(self.hit, self.index[:, 0], -1)


class ContextCache:
    """LRU over ``size`` keys, entries live ``ttl_seconds`` from their first insertion.

    Neither hits nor refused hits renew an entry's age. An expired entry keeps its place in
    the LRU order until it is met again (and is then a new one) or evicted.
    """

    def __init__(self, *, size: int, ttl_seconds: float, clock: Clock) -> None:
        self.size = size
        self.clock = clock
        self._ttl = ttl_seconds * clock.ticks_per_second
        self._streams: OrderedDict[int, Stream] = OrderedDict()
        self._free: list[int] = []
        self._rows = _FIRST
        self._numbered = 0  # entries numbered by earlier forwards
        self._store: dict[tuple[str, int], Tensor] = {}
        # Of the running forward: as numpy arrays under None, as tensors under their device.
        self._meetings: dict[torch.device | None, _Meeting] = {}

    def __len__(self) -> int:
        return sum(len(stream.entries) for stream in self._streams.values())

    def clear(self) -> None:
        """Empty the cache and reset its clock."""
        self._streams.clear()
        self._store.clear()
        self._free.clear()
        self._rows = _FIRST
        self._meetings.clear()
        self.clock.reset()

    def begin(
        self, keys: Tensor, looks: Tensor, stays: Tensor, documents: Sequence[int] | None = None
    ) -> None:
        """Walk the forward's tokens in row-major order, once for all layers.

        Args:
            keys: (B, S) context keys.
            looks: (B, S) bool, tokens that look up.
            stays: (B, S) bool, tokens that also insert; the clock ticks for these.
            documents: (B,) the document of each row, for a cache per document
                (``cache_scope="document"``); negative: no later forward continues it.
        """
        walk = Walk(size=self.size, ttl=self._ttl, free=self._free, base=self._numbered)
        key_rows, look_rows = keys.tolist(), looks.tolist()
        stay_rows = look_rows if stays is looks else stays.tolist()
        for row, (row_keys, look, stay) in enumerate(
            zip(key_rows, look_rows, stay_rows, strict=True)
        ):
            stream = self._stream(None if documents is None else documents[row])
            walk.row(stream, row_keys, look, stay)
        if documents is not None:
            self._forget(walk, keep=max(len(key_rows), _DOCUMENTS_KEPT))
        self._meetings = {None: self._meeting(walk, np.array(stay_rows, dtype=bool).reshape(-1))}
        self._numbered += len(walk.met)

    def _stream(self, document: int | None) -> Stream:
        number = _SHARED if document is None else document
        if number not in self._streams:
            # Only its own tokens move a document's time on.
            self._streams[number] = Stream(self.clock if document is None else type(self.clock)())
        self._streams.move_to_end(number)
        return self._streams[number]

    def _forget(self, walk: Walk, keep: int) -> None:
        """Drop the streams of documents that end with this forward, and the oldest others."""
        ended = [number for number in self._streams if number < 0]
        going = [number for number in self._streams if number >= 0]
        for number in [*ended, *going[: max(len(going) - keep, 0)]]:
            for entry in self._streams.pop(number).entries.values():
                walk.drop(entry)

    def _meeting(self, walk: Walk, stays: np.ndarray) -> _Meeting:
        """Give storage rows to entries that outlive the forward; pack everything as arrays."""
        met = walk.met
        before = [_EMPTY if row == NEW else row for row in walk.before]
        for entry in met:
            if entry.row == NEW and self._free:
                entry.row = self._free.pop()
            elif entry.row == NEW:
                entry.row = self._rows
                self._rows += 1
        after = [_WASTE if entry.row == GONE else entry.row for entry in met]
        number = np.array(walk.local, dtype=np.int64) - walk.base
        number[number < 0] = len(met)  # no entry
        own = np.arange(len(number))
        # Tokens without an entry, as with size 0, fill none.
        fills = stays & (number < len(met))
        return _Meeting(
            entry=number,
            position=np.where(fills, own, len(number)),
            own=own,
            before=np.array([*before, _EMPTY], dtype=np.int64),
            after=np.array(after, dtype=np.int64),
            alone=len(met) == len(number) and bool(stays.all()),
        )

    def _met(self, like: Array) -> _Meeting:
        """The running forward's meetings, in the kind and place of ``like``."""
        if not self._meetings:
            raise RuntimeError("ContextCache.layer before begin")
        if not isinstance(like, Tensor):
            return self._meetings[None]
        if like.device not in self._meetings:
            self._meetings[like.device] = self._meetings[None].on(like.device)
        return self._meetings[like.device]

    def layer(self, layer: int, index: Array, weight: Array | None, admit: Array) -> Hits:
        """Look up and fill one layer's slots; all arrays are of numpy, or all are tensors.

        Args:
            layer: MoE layer number.
            index: (T, leading) this layer's leading experts by the router.
            weight: (T, leading) their weights, None where only experts are to be stored.
            admit: (T,) bool, whether the decision is confident enough to be stored.
        """
        met = self._met(index)
        if met.alone:
            return self._alone(met, layer, index, weight, admit)
        ops = TORCH if isinstance(index, Tensor) else NUMPY
        slots = self._storage("index", layer, index, -1)
        held_index = slots[met.before]
        empty = held_index[:, 0] < 0  # (entries + 1,)
        # The first admitted token of each entry fills an empty slot; later ones hit it.
        never = len(met.own)
        position = ops.where(admit, met.position, never)
        filler = ops.least(len(met.before), met.entry, position, never)
        fills = (empty & (filler < never))[:, None]
        source = filler.clip(max=never - 1)
        new_index = ops.where(fills, index[source], held_index)
        slots[met.after] = new_index[:-1]
        hit_weight = None
        if weight is not None:
            weights = self._storage("weight", layer, weight, 0)
            new_weight = ops.where(fills, weight[source], weights[met.before])
            weights[met.after] = new_weight[:-1]
            hit_weight = new_weight[met.entry]
        # Held from before, or filled by a token that stands earlier in this forward.
        since = ops.where(empty, filler, -1)
        return Hits(since[met.entry] < met.own, new_index[met.entry], hit_weight)

    def _alone(
        self, met: _Meeting, layer: int, index: Array, weight: Array | None, admit: Array
    ) -> Hits:
        """`layer` where no two tokens meet one entry, as in a step of generation."""
        ops = TORCH if isinstance(index, Tensor) else NUMPY
        before = met.before[:-1]
        slots = self._storage("index", layer, index, -1)
        held = slots[before]
        hit = held[:, 0] >= 0
        fills = (admit & ~hit)[:, None]
        slots[met.after] = ops.where(fills, index, held)
        held_weight = None
        if weight is not None:
            weights = self._storage("weight", layer, weight, 0)
            held_weight = weights[before]
            weights[met.after] = ops.where(fills, weight, held_weight)
        return Hits(hit=hit, index=held, weight=held_weight)

    def _storage(self, kind: str, layer: int, like: Array, empty: int) -> Array:
        """The layer's slots, one row per entry, after the two rows that belong to none."""
        stored = self._store.get((kind, layer))
        have = 0 if stored is None else len(stored)
        if stored is None or have < self._rows:
            # Grow by doubling, so that a large cache costs memory only when it is used. Ordinary
            # tensors, so that text may be scored in inference mode and continued outside of it.
            shape = (max(self._rows, 2 * have, 64), like.shape[1])
            sample = like if isinstance(like, Tensor) else torch.from_numpy(like)
            with torch.inference_mode(False):
                grown = torch.full(shape, empty, dtype=sample.dtype, device=sample.device)
                if stored is not None:
                    grown[:have] = stored
            stored = self._store[kind, layer] = grown
        return stored if isinstance(like, Tensor) else stored.numpy()
