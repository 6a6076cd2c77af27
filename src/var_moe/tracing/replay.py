"""Replaying VAR on a trace: what any of its configurations decides, without the model.

The live router's decisions change the inputs of later layers, and with them later decisions; a
replay takes the unmodified model's. Given the same router decisions, it decides as `VARPolicy`
does, fed document by document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from var_moe.config import VARConfig
from var_moe.errors import UsageError
from var_moe.routing.keeping import leading_count
from var_moe.routing.keys import stream_keys
from var_moe.routing.lru import TokenClock
from var_moe.routing.var import RoutingTable
from var_moe.tracing.policies import Replay, Replayer, Settings, Times
from var_moe.tracing.stays import Bools, Recency, SlotHits, Stays, layer_hits

if TYPE_CHECKING:
    from var_moe.evaluation.evaluator import Progress
    from var_moe.routing.registry import PolicySpec
    from var_moe.tracing.trace import ProfileView, RoutingTrace


_GRID_AT_MOST = 16  # configurations that `evaluate_many` replays as one grid


@dataclass
class _Kept:
    """What the configuration before left, for one that shares it: one item of each kind."""

    stays: tuple[Any, Stays] | None = None
    hits: tuple[Any, list[SlotHits]] | None = None
    recency: dict[Any, Recency] = field(default_factory=dict)


class TraceReplay(Replayer):
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
        >>> replay = TraceReplay(trace, profile).evaluate(VARConfig.preset("balanced"))
        >>> replay.report.experts_per_token, replay.report.learned_pct, replay.degradation
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
        return np.asarray(self._mass[layer] >= config.confidence_threshold)

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

    # -- replays -----------------------------------------------------------------------------

    def evaluate(self, config: VARConfig) -> Replay:
        """Tiers and executed pairs of one configuration, and its damage where that is recorded."""
        return self.evaluate_many([config])[0]

    def evaluate_many(self, configs: Sequence[VARConfig]) -> list[Replay]:
        """The same for many, in the order given; what they share is computed once."""
        from var_moe.tracing.grid import ThresholdGrid

        # Those that differ in the two thresholds of the fast path alone are one grid's.
        alike: dict[VARConfig, list[int]] = {}
        for number, config in enumerate(configs):
            base = config.replace(frequency_threshold=0, entropy_threshold=0.0)
            alike.setdefault(base, []).append(number)
        replays: dict[int, Replay] = {}
        for base in sorted(alike, key=lambda one: (*_stays_key(one), one.confidence_threshold)):
            for start in range(0, len(alike[base]), _GRID_AT_MOST):
                numbers = alike[base][start : start + _GRID_AT_MOST]
                frequencies = sorted({configs[i].frequency_threshold for i in numbers})
                entropies = sorted({configs[i].entropy_threshold for i in numbers})
                grid = ThresholdGrid(self, frequencies, entropies).evaluate(base)
                for i in numbers:
                    place = (
                        frequencies.index(configs[i].frequency_threshold),
                        entropies.index(configs[i].entropy_threshold),
                    )
                    replays[i] = grid.replay(place, self.trace.top_k, base.uses_residuals)
        return [replays[i] for i in range(len(configs))]

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
