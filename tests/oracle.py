"""VAR's decisions, one token at a time in plain Python: the oracle that tests compare with.

It shares no code with the vectorised router: contexts are tuples of ids, the cache and the
table are dictionaries, and nothing is batched. Slow, and meant to be read.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from var_moe.config import VARConfig

TICKS_PER_SECOND = 1000
"""Counted tokens that make one second of the virtual clock."""

Expert = tuple[int, float]
"""An expert's id and its weight."""

RouterChoice = tuple[Sequence[int], Sequence[float]]
"""The router's K experts of one (layer, token), in any order, and their weights."""

TableEntry = tuple[int, float, Sequence[Expert]]
"""Occurrences in the profile, mean entropy in nats, the leading experts with mean weights."""

Decision = tuple[str, dict[int, float]]
"""The tier ("FAST", "CACHED", "LEARNED") and the executed experts with their weights."""


@dataclass(frozen=True, kw_only=True)
class ReferenceRow:
    """One row of a batch: a document, or the next part of one.

    Args:
        ids: token ids of the S positions.
        valid: False at padding, which has no context and takes no part in anything.
        counted: False at tokens that are only looked up (an overlap scored before); they neither
            enter the cache nor advance time.
        document: number of the document; a part has the number of the part before it.
        prefix: ids of the document before this row, which contexts reach back into.
    """

    ids: Sequence[int]
    valid: Sequence[bool]
    counted: Sequence[bool]
    document: int
    prefix: Sequence[int] = ()


@dataclass
class _Entry:
    """What is known in one context: when it was first met, and per layer a filled slot."""

    born: int
    slots: dict[int, list[Expert]] = field(default_factory=dict)


@dataclass
class _Cache:
    """All contexts that are known, and how many tokens have been met."""

    # Oldest meeting first, most recent last.
    entries: OrderedDict[tuple[int, ...], _Entry] = field(default_factory=OrderedDict)
    now: int = 0


class ReferenceVAR:
    """VAR routing in its simplest form.

    Args:
        config: the thresholds; `residuals` are no business of this class.
        table: (layer, token id) -> what the profile knows; a missing pair was never seen.

    `forward` keeps the cache and the clock from call to call, `reset` starts afresh.
    """

    def __init__(self, config: VARConfig, table: Mapping[tuple[int, int], TableEntry]) -> None:
        self.config = config
        self.table = table
        self.reset()

    def reset(self) -> None:
        """Empty the caches and set their clocks to zero."""
        self._caches: dict[int, _Cache] = {}

    def forward(
        self,
        rows: Iterable[ReferenceRow],
        router: Mapping[int, Sequence[RouterChoice]],
    ) -> dict[int, list[Decision | None]]:
        """Decide every (layer, token) of one forward.

        Args:
            rows: the rows of the batch, in order.
            router: layer -> the router's own choice at each token, row-major over the rows.

        Returns:
            layer -> one decision per token in the same order, None at padding.
        """
        decisions: dict[int, list[Decision | None]] = {layer: [] for layer in router}
        for row in rows:
            text = list(row.prefix)
            for token, valid, counted in zip(row.ids, row.valid, row.counted, strict=True):
                if not valid:
                    for layer in router:
                        decisions[layer].append(None)
                    continue
                cache = self._cache_of(row.document)
                text.append(token)
                context = tuple(text[-self.config.context_window_size :])
                entry = self._meet(cache, context) if counted else self._peek(cache, context)
                for layer, choices in router.items():
                    chosen = choices[len(decisions[layer])]
                    experts = list(zip(chosen[0], chosen[1], strict=True))
                    slot = entry.slots.get(layer) if entry else None
                    decisions[layer].append(self._decide(layer, token, experts, slot))
                    if counted and entry and slot is None and self._confident(experts):
                        entry.slots[layer] = leading(experts, len(experts))
                if counted:
                    cache.now += 1
        return decisions

    def _cache_of(self, document: int) -> _Cache:
        """The cache that serves a document: its own, or the one for all."""
        number = document if self.config.cache_scope == "document" else 0
        return self._caches.setdefault(number, _Cache())

    def _peek(self, cache: _Cache, context: tuple[int, ...]) -> _Entry | None:
        """The living entry of `context`, leaving everything as it is."""
        entry = cache.entries.get(context)
        if entry is None:
            return None
        expired = cache.now - entry.born >= self.config.cache_ttl_seconds * TICKS_PER_SECOND
        return None if expired else entry

    def _meet(self, cache: _Cache, context: tuple[int, ...]) -> _Entry | None:
        """The entry of `context`, made or renewed when needed and now the most recent one."""
        if self.config.cache_size == 0:
            return None
        entry = self._peek(cache, context)
        if entry is None:
            entry = cache.entries[context] = _Entry(born=cache.now)
        cache.entries.move_to_end(context)
        if len(cache.entries) > self.config.cache_size:
            cache.entries.popitem(last=False)
        return entry

    def _decide(
        self, layer: int, token: int, experts: list[Expert], slot: list[Expert] | None
    ) -> Decision:
        known = self._fast_path(layer, token, len(experts))
        if known is not None:
            tier, proposed = "FAST", known
        elif slot is not None:
            tier, proposed = "CACHED", slot
        else:
            tier, proposed = "LEARNED", experts
        own = leading(experts, len(experts))
        if self.config.mode == "plain":
            return tier, rescaled(proposed, experts)
        if tier != "LEARNED" and proposed[0][0] not in [expert for expert, _ in own]:
            tier = "LEARNED"  # the licence is refused; the cache is not asked instead
        cut = tier != "LEARNED" or self._confident(experts)
        return tier, rescaled(own if cut else experts, experts)

    def _fast_path(self, layer: int, token: int, k: int) -> list[Expert] | None:
        count, entropy, experts = self.table.get((layer, token), (0, 0.0, ()))
        if count == 0 or count < self.config.frequency_threshold:
            return None
        return leading(experts, k) if entropy <= self.config.entropy_threshold else None

    def _confident(self, experts: list[Expert]) -> bool:
        own = leading(experts, len(experts))
        return mass(own) / mass(experts) >= self.config.confidence_threshold


def leading(experts: Iterable[Expert], k: int) -> list[Expert]:
    """The first ceil(k / 2) experts, heaviest first, ties to the lower id."""
    return sorted(experts, key=lambda pair: (-pair[1], pair[0]))[: math.ceil(k / 2)]


def mass(experts: Iterable[Expert]) -> float:
    """The sum of the weights."""
    return sum(weight for _, weight in experts)


def rescaled(experts: list[Expert], full: list[Expert]) -> dict[int, float]:
    """Weights of `experts`, scaled to sum to those of `full`; exactly `full` when it is that."""
    if experts == full:
        return dict(full)
    scale = mass(full) / mass(experts)
    return {expert: weight * scale for expert, weight in experts}
