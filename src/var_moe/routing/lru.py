"""Which entry of the context cache each token meets: dictionary work on the ids, and clocks.

The loop in `Walk` runs once per token of a forward on the host, so it is written for speed: no
call and no attribute where a local name will do.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field

NEW, GONE = -1, -2  # instead of a row of storage: none yet, none any more


class Clock:
    """Virtual time: a thousand counted tokens are a second, whatever the machine."""

    ticks_per_second = 1000
    step = 1  # ticks from one counted token to the next within a forward

    def __init__(self) -> None:
        self._tokens = 0

    def advance(self, tokens: int) -> int:
        """Ticks at the first of the next ``tokens`` counted tokens; moves on past them."""
        start = self._tokens
        self._tokens += tokens
        return start

    def reset(self) -> None:
        """Start again, where the clock can."""
        self._tokens = 0


class WallClock(Clock):
    """Wall time for serving, read once per row of a forward."""

    ticks_per_second = 1_000_000_000
    step = 0

    def advance(self, tokens: int) -> int:
        return time.monotonic_ns()


class Entry:
    """One stay of a key in the cache, from insertion to eviction or expiry."""

    __slots__ = ("born", "number", "row")

    def __init__(self, born: int) -> None:
        self.born = born  # ticks
        self.number = -1  # in the order of being met; each forward numbers anew
        self.row = NEW  # of the storage


@dataclass
class Stream:
    """The keys of one cache, least recently met first, and its time."""

    clock: Clock
    entries: OrderedDict[int, Entry] = field(default_factory=OrderedDict)


@dataclass
class Walk:
    """What one forward's tokens met, filled row by row.

    Args:
        size: keys that a stream holds.
        ttl: ticks that an entry lives.
        free: rows of storage that dropped entries give back.
        base: number of the first entry that this forward meets; higher than all before.
    """

    size: int
    ttl: float
    free: list[int]
    base: int
    met: list[Entry] = field(default_factory=list)
    before: list[int] = field(default_factory=list)  # per entry met: its row until then
    local: list[int] = field(default_factory=list)  # per token: entry's number, `NEW` for none

    def drop(self, entry: Entry) -> None:
        """Take an entry out of use; its row is given to another at the forward's end."""
        if entry.row >= 0:
            self.free.append(entry.row)
        entry.row = GONE

    def row(self, stream: Stream, keys: list[int], looks: list[bool], stays: list[bool]) -> None:
        """One row of the batch: tokens that look up, and those that also insert or refresh."""
        now = stream.clock.advance(sum(stays))
        if self.size == 0:
            self.local.extend([NEW] * len(keys))
            return
        entries, met, base, size, ttl = stream.entries, self.met, self.base, self.size, self.ttl
        step, find, note, held = stream.clock.step, entries.get, self.local.append, self.before
        for key, look, stay in zip(keys, looks, stays, strict=True):
            entry = find(key) if look else None
            if entry is not None and now - entry.born >= ttl:
                if stay:
                    self.drop(entry)
                    del entries[key]
                entry = None
            if stay:
                if entry is not None:
                    entries.move_to_end(key)
                else:
                    entry = entries[key] = Entry(now)
                    if len(entries) > size:
                        self.drop(entries.popitem(last=False)[1])
                now += step
            if entry is None:
                note(NEW)
                continue
            if entry.number < base:
                entry.number = base + len(met)
                met.append(entry)
                held.append(entry.row)
            note(entry.number)
