"""The context cache: decisions keyed by a token's last N ids, LRU, with a time to live.

What is in the cache depends on token ids and time alone, never on a decision, so one pass
over the ids per forward (`ContextCache.begin`) serves all layers: it says for each token
which entry it meets. An entry has one slot per layer; a layer's slot is filled by the first
admitted decision of a token that meets the entry. That part is tensor maths
(`ContextCache.layer`), with no loop over tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from var_moe.routing.clock import Clock


@dataclass(slots=True)
class _Entry:
    """One stay of a key in the cache, from insertion to eviction or expiry."""

    born: int  # ticks
    row: int = -1  # row in the persistent storage, -1: none yet
    forward: int = -1  # the last forward that met it
    local: int = -1  # its number within that forward
    gone: bool = False


@dataclass(frozen=True)
class _Meeting:
    """Which entry each token of the running forward meets."""

    local: Tensor  # (T,) number of the entry met, `entries` where there is none
    inserts: Tensor  # (T,) bool: the token may fill slots
    before: Tensor  # (entries + 1,) persistent row at the forward's start, -1: new
    after: Tensor  # (entries,) persistent row at its end, -1: gone
    position: Tensor  # (T,) 0..T-1
    entries: int

    def to(self, device: torch.device) -> _Meeting:
        """The same on another device."""
        return _Meeting(
            local=self.local.to(device),
            inserts=self.inserts.to(device),
            before=self.before.to(device),
            after=self.after.to(device),
            position=self.position.to(device),
            entries=self.entries,
        )


@dataclass(frozen=True)
class Hits:
    """What the cache answers for one layer."""

    hit: Tensor  # (T,) bool: the slot was filled by an earlier token
    index: Tensor  # (T, leading) experts of the slot, -1 where none
    weight: Tensor  # (T, leading)


class ContextCache:
    """LRU over ``size`` keys, entries live ``ttl_seconds`` from their first insertion.

    Neither hits nor refused hits renew an entry's age. An expired entry keeps its place in
    the LRU order until it is met again (and is then a new one) or evicted.
    """

    def __init__(self, *, size: int, ttl_seconds: float, clock: Clock) -> None:
        self.size = size
        self.clock = clock
        self._ttl = ttl_seconds * clock.ticks_per_second
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._free: list[int] = []
        self._rows = 0
        self._forward = 0
        self._store: dict[int, tuple[Tensor, Tensor]] = {}
        self._meetings: dict[torch.device, _Meeting] = {}  # the running forward's, per device

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Empty the cache and reset its clock."""
        self._drop_all()
        self._store.clear()
        self._free.clear()
        self._rows = 0
        self._meetings.clear()
        self.clock.reset()

    def _drop(self, entry: _Entry) -> None:
        """Take an entry out of use; its row is given to another at the forward's end."""
        entry.gone = True
        if entry.row >= 0:
            self._free.append(entry.row)

    def _drop_all(self) -> None:
        for entry in self._entries.values():
            self._drop(entry)
        self._entries.clear()

    def begin(self, keys: Tensor, valid: Tensor, counted: Tensor, fresh_rows: set[int]) -> None:
        """Walk the forward's tokens in row-major order, once for all layers.

        Args:
            keys: (B, S) context keys.
            valid: (B, S) tokens that look up.
            counted: (B, S) tokens that also insert; the clock ticks for these.
            fresh_rows: rows before which the cache is emptied (``cache_scope="document"``).
        """
        counted_flat = counted.reshape(-1)
        walk = _Walk(self, start=self.clock.advance(int(counted_flat.sum())))
        # A single transfer each; with ids on the CPU no device waits for it.
        key_rows, valid_rows, counted_rows = keys.tolist(), valid.tolist(), counted.tolist()
        for row in range(len(key_rows)):
            if row in fresh_rows:
                self._drop_all()
            walk.row(key_rows[row], valid_rows[row], counted_rows[row])
        self._meetings = {keys.device: walk.meeting(counted_flat, keys.device)}
        self._forward += 1

    def layer(self, layer: int, index: Tensor, weight: Tensor, admit: Tensor) -> Hits:
        """Look up and fill one layer's slots.

        Args:
            layer: MoE layer number.
            index: (T, leading) this layer's leading experts by the router.
            weight: (T, leading) their weights.
            admit: (T,) bool, whether the decision is confident enough to be stored.
        """
        if not self._meetings:
            raise RuntimeError("ContextCache.layer before begin")
        if index.device not in self._meetings:
            self._meetings[index.device] = next(iter(self._meetings.values())).to(index.device)
        met = self._meetings[index.device]
        store_index, store_weight = self._storage(layer, index, weight)
        known = met.before >= 0  # (entries + 1,)
        held_index = store_index[met.before]
        held_index.masked_fill_(~known[:, None], -1)
        held_weight = store_weight[met.before]
        empty = held_index[:, 0] < 0
        # The first admitted token of each entry fills an empty slot; later ones hit it.
        never = met.position.shape[0]
        position = torch.where(admit & met.inserts, met.position, never)
        filler = torch.full((met.entries + 1,), never, dtype=torch.int64, device=index.device)
        filler.scatter_reduce_(0, met.local, position, "amin")
        fills = empty & (filler < never)
        source = filler.clamp(max=never - 1)
        new_index = torch.where(fills[:, None], index[source], held_index)
        new_weight = torch.where(fills[:, None], weight[source], held_weight)
        filled_earlier = ~empty[met.local] | (filler[met.local] < met.position)
        hit = filled_earlier & (new_index[met.local, 0] >= 0)
        alive = met.after.clamp(min=0)  # gone entries write to the spare last row
        alive = torch.where(met.after >= 0, alive, store_index.shape[0] - 1)
        store_index[alive] = new_index[:-1]
        store_weight[alive] = new_weight[:-1]
        return Hits(hit=hit, index=new_index[met.local], weight=new_weight[met.local])

    def _storage(self, layer: int, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's persistent slots, one row per entry and a spare last row."""
        stored = self._store.get(layer)
        have = 0 if stored is None else stored[0].shape[0] - 1
        if stored is None or have < self._rows:
            # Grow by doubling, so that a large cache costs memory only when it is used.
            rows = max(self._rows, min(2 * have, self.size), 64)
            new_index = index.new_full((rows + 1, index.shape[1]), -1)
            new_weight = weight.new_zeros((rows + 1, weight.shape[1]))
            if stored is not None:
                new_index[:have], new_weight[:have] = stored[0][:have], stored[1][:have]
            stored = self._store[layer] = (new_index, new_weight)
        return stored

    def _new_row(self) -> int:
        if self._free:
            return self._free.pop()
        self._rows += 1
        return self._rows - 1


class _Walk:
    """The pass over one forward's ids; plain dictionary work, well below 1% of a forward."""

    def __init__(self, cache: ContextCache, *, start: int) -> None:
        self.cache = cache
        self.now = start
        self.met: list[_Entry] = []
        self.before: list[int] = []
        self.local: list[int] = []

    def row(self, keys: list[int], valid: list[bool], counted: list[bool]) -> None:
        """One row of the batch, token by token."""
        cache, met, before, local = self.cache, self.met, self.before, self.local
        entries, size, ttl, step = cache._entries, cache.size, cache._ttl, cache.clock.step
        forward, now = cache._forward, self.now
        if size == 0:
            local.extend([-1] * len(keys))
            return
        for key, looks, inserts in zip(keys, valid, counted, strict=True):
            if not looks:
                local.append(-1)
                continue
            entry = entries.get(key)
            expired = entry is not None and now - entry.born >= ttl
            if inserts:
                if entry is None or expired:
                    if entry is not None:
                        cache._drop(entry)
                    entry = entries[key] = _Entry(born=now)
                    if len(entries) > size:
                        cache._drop(entries.popitem(last=False)[1])
                entries.move_to_end(key)
                now += step
            elif entry is None or expired:
                local.append(-1)
                continue
            if entry.forward != forward:
                entry.forward = forward
                entry.local = len(met)
                met.append(entry)
                before.append(entry.row)
            local.append(entry.local)
        self.now = now

    def meeting(self, counted: Tensor, device: torch.device) -> _Meeting:
        """Give rows to the entries that outlive the forward and pack everything as tensors."""
        after = []
        for entry in self.met:
            if entry.row < 0 and not entry.gone:
                entry.row = self.cache._new_row()
            after.append(-1 if entry.gone else entry.row)
        local = torch.tensor(self.local, dtype=torch.int64)
        local[local < 0] = len(self.met)
        return _Meeting(
            local=local.to(device),
            # With size 0 no token meets an entry, and none may pass for a shared one.
            inserts=counted & (local < len(self.met)).to(counted.device),
            before=torch.tensor([*self.before, -1], dtype=torch.int64, device=device),
            after=torch.tensor(after, dtype=torch.int64, device=device),
            position=torch.arange(local.shape[0], device=device),
            entries=len(self.met),
        )
