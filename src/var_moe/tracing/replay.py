"""Replaying VAR on a trace: what any of its configurations decides, without the model.

The live router's decisions change the inputs of later layers, and with them later decisions; a
replay takes the unmodified model's. Given the same router decisions, it decides as `VARPolicy`
does, fed document by document.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from var_moe.config import VARConfig
from var_moe.errors import UsageError
from var_moe.routing.counts import RoutingReport
from var_moe.routing.decision import Tier
from var_moe.routing.keeping import leading_count
from var_moe.routing.keys import stream_keys
from var_moe.routing.lru import TokenClock
from var_moe.routing.var import RoutingTable
from var_moe.tracing.policies import Replay, Settings, Times
from var_moe.tracing.stays import Bools, Recency, SlotHits, Stays, layer_hits

if TYPE_CHECKING:
    from var_moe.evaluation.evaluator import Progress
    from var_moe.routing.registry import PolicySpec
    from var_moe.tracing.trace import ProfileView, RoutingTrace


@dataclass(frozen=True)
class LayerDecisions:
    """What a configuration decides in one layer.

    In plain mode a table's or a slot's experts run unseen. Where they are the token's own leading
    ones, it is in ``cut``. Else ``next_count`` says how many of the leading_count(K) that run are
    chosen by the token but do not lead, and ``foreign_count`` how many it did not choose.
    """

    layer: int
    tier: NDArray[np.uint8]  # (N,) a Tier
    cut: Bools  # (N,) runs its own leading experts alone, and drops some
    next_count: NDArray[np.int64]  # (N,) zero where the token's own experts run
    foreign_count: NDArray[np.int64]  # (N,) likewise


def stored_counts(
    run: NDArray[np.int16], own: NDArray[np.int16]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many executed experts are chosen but do not lead, and how many are not chosen.

    Args:
        run: (R, lead) stored experts that run.
        own: (R, K) the tokens' own experts by rank.

    Returns:
        (R,) each; both zero where a token's own leading experts run.
    """
    lead = run.shape[1]
    same = run[:, :, None] == own[:, None, :]  # (R, lead, K)
    leading = same[:, :, :lead].any(axis=2).sum(axis=1)
    chosen = same.any(axis=2).sum(axis=1)
    return chosen - leading, lead - chosen


def damage_kinds(trace: RoutingTrace, config: VARConfig) -> tuple[str, ...]:
    """The kinds of damage that a configuration's decisions do, on this trace."""
    residual = config.uses_residuals and "cut_residual" in trace.damage
    cut = "cut_residual" if residual else "cut"
    return (cut, "next", "foreign") if config.mode == "plain" else (cut,)


def damage_effects(trace: RoutingTrace, kind: str, layer: int) -> NDArray[np.float32]:
    """The change of the loss by one decision of a kind, of each token. (N,)"""
    effect: NDArray[np.float32] = trace.damage[kind][layer].numpy()
    if kind != "cut":
        return effect
    lead = leading_count(trace.top_k)
    # Without a rank to cut at (K = 1) no token is cut.
    return effect[:, lead - 1] if lead < trace.top_k else effect.sum(axis=1)


@dataclass
class _Kept:
    """What the configuration before left, for one that shares it: one item of each kind."""

    stays: tuple[Any, Stays] | None = None
    hits: tuple[Any, list[SlotHits]] | None = None
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

    def hits(self, config: VARConfig) -> list[SlotHits]:
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
                and both counts stay empty.
        """
        eligible = self.table.eligible(config.frequency_threshold, config.entropy_threshold)
        for layer, (row, hits) in enumerate(zip(eligible.numpy(), self.hits(config), strict=True)):
            fast = row[self.id_number] if row.any() else np.zeros(self.trace.tokens, dtype=bool)
            if config.mode == "plain":
                yield self._plain(layer, fast, hits, kinds)
            else:
                yield self._verified(layer, fast, hits, self.confident(config, layer))

    def _verified(
        self, layer: int, fast: Bools, hits: SlotHits, confident: Bools
    ) -> LayerDecisions:
        """The table, else the slot, licenses the cut if it agrees with the router."""
        tier = np.full(len(fast), Tier.LEARNED, dtype=np.uint8)
        tier[hits.token[hits.licensed]] = Tier.CACHED
        if fast.any():
            tier[fast] = np.where(self.match[layer][fast], Tier.FAST, Tier.LEARNED)
        cut = confident | (tier != Tier.LEARNED)
        if self.lead == self.trace.top_k:
            cut = np.zeros_like(cut)
        none = np.zeros(len(fast), dtype=np.int64)
        return LayerDecisions(layer, tier, cut, next_count=none, foreign_count=none)

    def _plain(self, layer: int, fast: Bools, hits: SlotHits, kinds: bool) -> LayerDecisions:
        """The table's experts, else the slot's, run unseen."""
        tier = np.full(len(fast), Tier.LEARNED, dtype=np.uint8)
        tier[hits.token] = Tier.CACHED
        tier[fast] = Tier.FAST
        cut = np.zeros(len(fast), dtype=bool)
        next_count, foreign_count = np.zeros((2, len(fast)), dtype=np.int64)
        if kinds:
            cached = ~fast[hits.token]
            by_table = np.flatnonzero(fast)
            token = np.concatenate((by_table, hits.token[cached]))
            table = self.table_experts(layer)[self.id_number[by_table]]
            slots = self.index[layer][hits.source[cached], : self.lead]
            run = np.concatenate((table, slots))  # (R, lead) experts that run
            following, foreign = stored_counts(run, self.index[layer][token])
            next_count[token], foreign_count[token] = following, foreign
            if self.lead < self.trace.top_k:
                cut[token] = following + foreign == 0
        return LayerDecisions(layer, tier, cut, next_count, foreign_count)

    def evaluate(self, config: VARConfig) -> Replay:
        """Tiers and executed pairs of one configuration, and its damage where that is recorded."""
        trace, plain = self.trace, config.mode == "plain"
        kinds = damage_kinds(trace, config) if trace.damage else ()
        first: dict[str, list[float]] = {kind: [] for kind in kinds}
        squares: dict[str, list[float]] = {kind: [] for kind in kinds}
        tiers, pairs = [], []
        for decided in self.decisions(config, kinds=bool(kinds)):
            count = np.bincount(decided.tier, minlength=len(Tier))
            tiers.append((int(count[0]), int(count[1]), int(count[2])))
            half = trace.tokens - count[Tier.LEARNED] if plain else np.count_nonzero(decided.cut)
            pairs.append(int(trace.tokens * trace.top_k - half * (trace.top_k - self.lead)))
            for kind in kinds:
                effect = self._effects(kind, decided)
                first[kind].append(float(effect.sum()))
                squares[kind].append(float(np.dot(effect, effect)))
        report = RoutingReport(
            tokens=trace.tokens,
            top_k=trace.top_k,
            tier_counts=tuple(tiers),
            executed_pairs=tuple(pairs),
        )
        return Replay(
            report=report,
            scored=trace.scored,
            first=first or None,
            squares=squares or None,
            adds_residual=config.uses_residuals,
        )

    def _effects(self, kind: str, decided: LayerDecisions) -> NDArray[np.float64]:
        """Damages of the decisions of a kind; stored experts count in proportion."""
        share = {"next": decided.next_count, "foreign": decided.foreign_count}.get(kind)
        token = np.flatnonzero(decided.cut if share is None else share)
        effect = damage_effects(self.trace, kind, decided.layer)[token].astype(np.float64)
        return effect if share is None else effect * (share[token] / self.lead)

    def evaluate_many(self, configs: Sequence[VARConfig]) -> list[Replay]:
        """The same for many, in the order given; what they share is computed once."""

        def shared(number: int) -> tuple[Any, ...]:
            config = configs[number]
            return (*_stays_key(config), config.confidence_threshold)

        done = {i: self.evaluate(configs[i]) for i in sorted(range(len(configs)), key=shared)}
        return [done[i] for i in range(len(configs))]

    # -- as a `Replayer` of policy ``var`` ---------------------------------------------------

    @classmethod
    def of(cls, trace: RoutingTrace, spec: PolicySpec, calibration: Settings) -> TraceReplay:
        if "table" not in calibration:
            raise UsageError(f"policy {spec.name!r} needs 'table': a replay takes a profile's")
        return cls.of_table(trace, calibration["table"])

    def replay(
        self, settings: Sequence[Settings], progress: Progress | None = None
    ) -> list[Replay]:
        return self.evaluate_many([VARConfig.from_dict(one) for one in settings])

    def grid(
        self,
        values: Mapping[str, Sequence[Any]],
        fixed: Settings,
        *,
        speedups: Times | None = None,
        progress: Progress | None = None,
    ) -> dict[str, NDArray[np.float64]]:
        from var_moe.tracing.grid import threshold_grid

        base = VARConfig.from_dict(fixed)
        return threshold_grid(self, values, base, speedups=speedups, progress=progress)


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
