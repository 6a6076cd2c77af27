"""VAR's context cache in a replay: who shares an entry, and whose decision its slots hold.

A stay is a key's time in the cache from an insertion to its eviction or expiry: all tokens that
meet the same entry. What is in an LRU cache of any size follows from stack distances (Mattson
et al. 1970): a key is in it when fewer than ``size`` different other keys were met since its own
last meeting. Distances depend on the keys alone, so they are counted once per context window,
and stays follow for each size and time to live with few operations.

The semantics are those of `routing.context_cache` with a `Clock`, where every token
inserts: an expired entry keeps its place in the order until it is met again, and is then a new
one; hits do not renew the age.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Stays:
    """Stays of several tokens, one after the other; tokens that are alone in theirs left out.

    Such a token hits nothing and serves no other.
    """

    token: Ints  # (M,) positions in the stream, by stay, in time order within it
    first: Ints  # (S,) where each stay starts in `token`

    @property
    def sizes(self) -> Ints:
        """Tokens of each stay, at least 2. (S,)"""
        return np.diff(self.first, append=len(self.token))


@dataclass(frozen=True)
class SlotHits:
    """The tokens that hit a filled slot of one layer."""

    token: Ints  # (H,) positions in the stream
    source: Ints  # (H,) position of the token whose decision the slot holds
    licensed: Bools  # (H,) the slot's first expert is among the token's own leading ones


def layer_hits(stays: Stays, confident: Bools, index: NDArray[np.int16], lead: int) -> SlotHits:
    """One layer's hits: the first confident token of a stay fills, those after it hit.

    Decisions of ``confident`` tokens (N,) are stored; of experts by rank (N, K), ``lead`` lead.
    """
    size = len(stays.token)
    if not size:
        none = stays.token
        return SlotHits(token=none, source=none, licensed=np.zeros(0, dtype=bool))
    place = np.arange(size)
    filling = np.where(confident[stays.token], place, size)
    filler = np.repeat(np.minimum.reduceat(filling, stays.first), stays.sizes)
    hit = filler < place
    token, source = stays.token[hit], stays.token[filler[hit]]
    licensed = (index[token, :lead] == index[source, 0][:, None]).any(axis=1)
    return SlotHits(token=token, source=source, licensed=licensed)


@dataclass(frozen=True)
class Recency:
    """The tokens of a stream by key, then time; and how far back each key's last meeting is."""

    order: Ints  # (N,) positions in the stream
    repeated: Bools  # (N,) the token before in `order` has the same key
    distance: Ints  # (N,) different other keys met since then; 0 where not repeated

    @classmethod
    def of(cls, keys: Ints, document: Ints | None = None) -> Recency:
        """From the keys in stream order (N,), with one cache for all, or one per document: then
        ``document`` (N,) has each token's number, not falling."""
        if document is None:
            order = np.argsort(keys, kind="stable")
        else:
            order = np.lexsort((keys, document))
        repeated = np.zeros(len(keys), dtype=bool)
        ordered = keys[order]
        repeated[1:] = ordered[1:] == ordered[:-1]
        if document is not None:
            repeated[1:] &= document[order][1:] == document[order][:-1]
        # The position of each token's last meeting, in stream order; -1 where there is none.
        before = np.full(len(keys), -1, dtype=np.int64)
        again = np.flatnonzero(repeated)
        before[order[again]] = order[again - 1]
        return cls(order=order, repeated=repeated, distance=_distances(before)[order])

    def stays(self, *, size: int, ttl: float) -> Stays:
        """Stays in a cache of ``size`` keys whose entries live ``ttl`` ticks (tokens)."""
        starts = self.starts(size=size, ttl=ttl)
        first = np.flatnonzero(starts)
        sizes = np.diff(first, append=len(starts))
        shared = np.repeat(sizes > 1, sizes)
        sizes = sizes[sizes > 1] if size else sizes[:0]
        token = self.order[shared] if size else self.order[:0]
        return Stays(token=token, first=np.cumsum(sizes) - sizes)

    def starts(self, *, size: int, ttl: float) -> Bools:
        """Which tokens of ``order`` start a stay. (N,)"""
        starts: Bools = ~(self.repeated & (self.distance < size))
        # Times are whole, so an age of ``ttl`` or more is one of its ceiling or more.
        step = math.ceil(ttl)
        if step < len(starts):
            _expire(starts, self.order, step)
        return starts


def _expire(starts: Bools, time: Ints, step: int) -> None:
    """Split runs of one key where a token is ``step`` ticks or more after its stay's start.

    In place, from the ``time`` (N,) of each token, rising within a run. All runs go on by one
    stay in each round, so rounds are bounded by N / step.
    """
    run = np.cumsum(starts) - 1
    beyond = len(time)  # later than all times
    rising = run * (beyond + 1) + time
    heads = np.flatnonzero(starts)
    ends = np.append(heads[1:], len(starts))
    heads = heads[time[ends - 1] - time[heads] >= step]
    while len(heads):
        due = np.minimum(time[heads] + step, beyond)
        next_heads = np.searchsorted(rising, run[heads] * (beyond + 1) + due)
        inside = next_heads < len(starts)
        inside[inside] = run[next_heads[inside]] == run[heads[inside]]
        heads = next_heads[inside]
        starts[heads] = True


def _distances(before: Ints) -> Ints:
    """Different other keys met since each key's last meeting, in stream order. (N,)

    Between the meetings p and i of one key, a key counts once, at its first token j there; that
    one's own last meeting lies before p. All tokens up to p have their last meeting before p as
    well, so the count is that of all j < i with before[j] < p, less p + 1.
    """
    again = before >= 0
    # First meetings (-1) are before any p; the rest are different numbers.
    firsts = np.cumsum(~again)[again]
    met = before[again]
    met_at = np.zeros(len(before), dtype=np.int64)
    met_at[met] = 1
    rank = (np.cumsum(met_at) - 1)[met]  # 0..M-1, in the order of `met`
    distance = np.zeros(len(before), dtype=np.int64)
    distance[again] = firsts + smaller_before(rank) - (met + 1)
    return distance


def smaller_before(values: Ints) -> Ints:
    """For each of the numbers 0..M-1 in some order, how many before it are smaller. (M,)

    Bit by bit from the highest: among numbers that agree in all higher bits, each with a 1
    counts those with a 0 before it. Numbers that agree are kept together, in their order.
    """
    size = len(values)
    count = np.zeros(size, dtype=np.int64)
    held, at = values.astype(np.int32), np.arange(size, dtype=np.int32)
    for bit in reversed(range(max(size - 1, 0).bit_length())):
        low = (held >> bit) & 1 == 0
        zeros = np.cumsum(low, dtype=np.int32)  # up to and with each place
        higher = held >> (bit + 1)
        starts = np.flatnonzero(higher[1:] != higher[:-1]) + 1
        # Zeros before the place's own group: those counted at its start.
        base = np.zeros(size, dtype=np.int32)
        base[starts] = zeros[starts - 1]
        np.maximum.accumulate(base, out=base)
        ones = ~low
        count[at[ones]] += (zeros - base)[ones]
        held = np.concatenate((held[low], held[ones]))
        at = np.concatenate((at[low], at[ones]))
    return count
