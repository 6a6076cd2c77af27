"""Replaying VAR on a trace: what any configuration decides, without the model.

The live router's decisions change the inputs of later layers, and with them later decisions; a
replay takes the unmodified model's. Given the same router decisions, it decides as `VARPolicy`
does, fed document by document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from var_moe.config import VARConfig
from var_moe.errors import UsageError
from var_moe.routing.clock import TokenClock
from var_moe.routing.counts import RoutingReport
from var_moe.routing.decision import Tier
from var_moe.routing.fast_path import RoutingTable
from var_moe.routing.keys import stream_keys
from var_moe.routing.ranking import leading_count
from var_moe.tracing.decisions import (
    DamageSums,
    LayerDecisions,
    predicted_degradation,
    stored_counts,
)
from var_moe.tracing.slots import Hits, layer_hits
from var_moe.tracing.stays import Bools, Recency, Stays

if TYPE_CHECKING:
    from var_moe.tracing.trace import ProfileView, RoutingTrace


@dataclass(frozen=True, kw_only=True)
class Replay:
    """One configuration replayed.

    ``damage`` sums the trace's damages over the decisions; None where the trace has none.
    """

    config: VARConfig
    report: RoutingReport
    damage: DamageSums | None = None
    scored: int = 0  # tokens that have a loss

    @property
    def degradation(self) -> float:
        """Predicted PPL(VAR) / PPL(baseline) - 1 on the trace's text.

        The change of the summed loss to second order, decisions taken as independent: the sum of
        g . d plus half the sum of its square (see `DamageSums`), without any fitted factor.

        Raises:
            UsageError: the trace was recorded without damages.
        """
        if self.damage is None:
            raise UsageError(
                "the trace has no damages, so no degradation can be predicted; record it with "
                "damages (`var-moe trace`)"
            )
        first = sum(sum(row) for row in self.damage.first.values())
        squares = sum(sum(row) for row in self.damage.squares.values())
        return float(predicted_degradation(first, squares, self.scored))

    def to_dict(self) -> dict[str, Any]:
        """For result files."""
        predicted = None if self.damage is None else self.degradation
        return {**self.report.to_dict(), "predicted_degradation": predicted}


@dataclass
class _Kept:
    """What the configuration before left, for one that shares it: one item of each kind."""

    stays: tuple[Any, Stays] | None = None
    hits: tuple[Any, list[Hits]] | None = None
    recency: dict[Any, Recency] = field(default_factory=dict)


class TraceReplay:
    """Replays configurations on one trace with one profile's table.

    Args:
        trace: the router's decisions.
        profile: of the same model.

    Raises:
        UsageError: the profile does not fit the trace; names both.

    Memory is linear in the trace's tokens.

    Example:
        >>> from var_moe import RoutingProfile, RoutingTrace, TraceReplay, VARConfig
        >>> trace = RoutingTrace.load("results/trace")
        >>> profile = RoutingProfile.load("results/trace/profile")
        >>> found = TraceReplay(trace, profile).evaluate(VARConfig.preset("balanced"))
        >>> found.report.experts_per_token, found.report.learned_pct, found.degradation
    """

    profile_hash: str | None = None

    def __init__(self, trace: RoutingTrace, profile: ProfileView) -> None:
        trace.check_profile(profile)
        self._prepare(trace, profile.table())
        self.profile_hash = profile.hash

    @classmethod
    def of_table(cls, trace: RoutingTrace, table: RoutingTable) -> TraceReplay:
        """The same with a static table of which nothing else is known."""
        made = cls.__new__(cls)
        made._prepare(trace, table)
        return made

    def _prepare(self, trace: RoutingTrace, table: RoutingTable) -> None:
        self.trace = trace
        self.lead = leading_count(trace.top_k)
        self.index = trace.index.numpy()  # (L, N, K)
        known, self.id_number = np.unique(trace.ids.numpy(), return_inverse=True)  # (U,), (N,)
        # The table for the ids that occur, (L, U, ...).
        self.table = RoutingTable(
            count=table.count[:, known],
            entropy=table.entropy[:, known],
            index=table.index[:, known, : self.lead],
            weight=table.weight[:, known, : self.lead],
        )
        self._first = self.table.index[:, :, 0].numpy().astype(np.int16)  # (L, U)
        # The table's first expert is among the token's own leading ones. (L, N)
        self.match = np.stack(
            [
                (self.index[layer, :, : self.lead] == first[self.id_number][:, None]).any(axis=1)
                for layer, first in enumerate(self._first)
            ]
        )
        self._places = trace.places()
        self._document = np.repeat(
            np.arange(len(trace.starts) - 1), trace.starts.diff().numpy()
        )  # (N,)
        self._mass = _leading_mass(trace, self.lead)
        self._kept = _Kept()

    # -- what configurations share -----------------------------------------------------------

    def recency(self, window: int, scope: str) -> Recency:
        """Stack distances of the contexts of ``window`` ids, for a cache scope; kept."""
        key = (window, scope)
        if key not in self._kept.recency:
            keys = stream_keys(self.trace.ids, self._places, window).numpy()
            document = self._document if scope == "document" else None
            self._kept.recency[key] = Recency.of(keys, document)
        return self._kept.recency[key]

    def forget(self, *, distances: bool = False) -> None:
        """Drop what the configurations so far left to share; also the stack distances if asked."""
        self._kept = _Kept(recency={} if distances else self._kept.recency)

    def stays(self, config: VARConfig) -> Stays:
        """The stays in a configuration's cache that several tokens share."""
        key = _stays_key(config)
        if self._kept.stays is None or self._kept.stays[0] != key:
            recency = self.recency(config.context_window_size, config.cache_scope)
            ttl = config.cache_ttl_seconds * TokenClock.ticks_per_second
            self._kept.stays = (key, recency.stays(size=config.cache_size, ttl=ttl))
        return self._kept.stays[1]

    def confident(self, config: VARConfig, layer: int) -> Bools:
        """Whose leading experts have enough of the routing mass. (N,)"""
        found: Bools = self._mass[layer] >= config.confidence_threshold
        return found

    def table_experts(self, layer: int) -> NDArray[np.int16]:
        """The table's leading experts of each id that occurs. (U, lead)"""
        return self.table.index[layer].numpy().astype(np.int16)

    def hits(self, config: VARConfig) -> list[Hits]:
        """Per layer, which tokens hit a filled slot."""
        key = (*_stays_key(config), config.confidence_threshold)
        if self._kept.hits is None or self._kept.hits[0] != key:
            stays = self.stays(config)
            hits = [
                layer_hits(stays, self.confident(config, layer), index, self.lead)
                for layer, index in enumerate(self.index)
            ]
            self._kept.hits = (key, hits)
        return self._kept.hits[1]

    # -- one configuration -------------------------------------------------------------------

    def decisions(self, config: VARConfig, *, kinds: bool = True) -> Iterator[LayerDecisions]:
        """What the configuration decides, layer by layer.

        Args:
            config: the thresholds.
            kinds: in plain mode, compare stored experts with the token's own; without, ``cut``
                and ``stored`` do not tell them apart and all stored ones stand in ``stored``.
        """
        eligible = self.table.eligible(config.frequency_threshold, config.entropy_threshold)
        for layer, (row, hits) in enumerate(zip(eligible.numpy(), self.hits(config), strict=True)):
            fast = row[self.id_number] if row.any() else np.zeros(self.trace.tokens, dtype=bool)
            if config.mode == "plain":
                yield self._plain(layer, fast, hits, kinds)
            else:
                yield self._verified(layer, fast, hits, self.confident(config, layer))

    def _verified(self, layer: int, fast: Bools, hits: Hits, confident: Bools) -> LayerDecisions:
        """The table, else the slot, licenses the cut if it agrees with the router."""
        tier = np.full(len(fast), Tier.LEARNED, dtype=np.uint8)
        tier[hits.token[hits.licensed]] = Tier.CACHED
        if fast.any():
            tier[fast] = np.where(self.match[layer][fast], Tier.FAST, Tier.LEARNED)
        cut = confident | (tier != Tier.LEARNED)
        none = np.zeros(len(fast), dtype=np.uint8)
        return LayerDecisions(
            layer=layer,
            tier=tier,
            cut=cut if self.lead < self.trace.top_k else np.zeros_like(cut),
            stored=np.zeros_like(cut),
            next_count=none,
            foreign_count=none,
        )

    def _plain(self, layer: int, fast: Bools, hits: Hits, kinds: bool) -> LayerDecisions:
        """The table's experts, else the slot's, run unseen."""
        tier = np.full(len(fast), Tier.LEARNED, dtype=np.uint8)
        tier[hits.token] = Tier.CACHED
        tier[fast] = Tier.FAST
        stored = tier != Tier.LEARNED
        cut = np.zeros_like(stored)
        next_count = np.zeros(len(fast), dtype=np.uint8)
        foreign_count = np.zeros(len(fast), dtype=np.uint8)
        if kinds:
            cached = ~fast[hits.token]
            by_table = np.flatnonzero(fast)
            token = np.concatenate((by_table, hits.token[cached]))
            table = self.table_experts(layer)[self.id_number[by_table]]
            slots = self.index[layer][hits.source[cached], : self.lead]
            run = np.concatenate((table, slots))  # (R, lead) experts that run
            following, foreign = stored_counts(run, self.index[layer][token])
            next_count[token], foreign_count[token] = following, foreign
            cut[token] = following + foreign == 0
            stored &= ~cut
            if self.lead == self.trace.top_k:
                cut[:] = False
        return LayerDecisions(
            layer=layer,
            tier=tier,
            cut=cut,
            stored=stored,
            next_count=next_count,
            foreign_count=foreign_count,
        )

    def evaluate(self, config: VARConfig) -> Replay:
        """Tiers and executed pairs of one configuration, and its damage where that is recorded."""
        trace, plain = self.trace, config.mode == "plain"
        sums = DamageSums.of(trace, config) if trace.damage else None
        tiers, pairs = [], []
        for decided in self.decisions(config, kinds=sums is not None):
            count = np.bincount(decided.tier, minlength=len(Tier))
            tiers.append((int(count[0]), int(count[1]), int(count[2])))
            half = trace.tokens - count[Tier.LEARNED] if plain else np.count_nonzero(decided.cut)
            pairs.append(int(trace.tokens * trace.top_k - half * (trace.top_k - self.lead)))
            if sums is not None:
                sums.add(trace, decided)
        report = RoutingReport(
            tokens=trace.tokens,
            top_k=trace.top_k,
            tier_counts=tuple(tiers),
            executed_pairs=tuple(pairs),
        )
        return Replay(config=config, report=report, damage=sums, scored=trace.scored)

    def evaluate_many(self, configs: Sequence[VARConfig]) -> list[Replay]:
        """The same for many, in the order given; what they share is computed once."""

        def shared(number: int) -> tuple[Any, ...]:
            config = configs[number]
            return (*_stays_key(config), config.confidence_threshold)

        found = {i: self.evaluate(configs[i]) for i in sorted(range(len(configs)), key=shared)}
        return [found[i] for i in range(len(configs))]


def _stays_key(config: VARConfig) -> tuple[Any, ...]:
    scope, window = config.cache_scope, config.context_window_size
    return (window, scope, config.cache_size, config.cache_ttl_seconds)


def _leading_mass(trace: RoutingTrace, lead: int) -> NDArray[np.float32]:
    """Routing mass of the leading experts as `VARPolicy` sees it, nan without weight. (L, N)"""
    if lead == trace.top_k:
        return np.ones(trace.index.shape[:2], dtype=np.float32)
    mass = np.empty(trace.index.shape[:2], dtype=np.float32)
    for layer, weight in enumerate(trace.weight):
        wide = weight.float()
        mass[layer] = (wide[:, :lead].sum(dim=1) / wide.sum(dim=1)).numpy()
    return mass
