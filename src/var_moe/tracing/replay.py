"""Replaying VAR on a trace: what any of its configurations decides, without the model.

The live router's decisions change the inputs of later layers, and with them later decisions; a
replay takes the unmodified model's. Given the same router decisions, it decides as `VARPolicy`
does, fed document by document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from var_moe.config import DOCUMENTED_FIELDS, VARConfig
from var_moe.routing.keeping import leading_count
from var_moe.routing.keys import stream_keys
from var_moe.routing.lru import Clock
from var_moe.routing.var import RoutingTable
from var_moe.tracing.grid import ThresholdGrid
from var_moe.tracing.policies import Replay, Replayer, Settings, Times
from var_moe.tracing.stays import Bools, Recency, SlotHits, Stays, layer_hits

if TYPE_CHECKING:
    from var_moe.evaluation.evaluator import Progress
    from var_moe.tracing.trace import ProfileView, RoutingTrace


_GRID_AT_MOST = 16  # configurations that `evaluate_many` replays as one grid


class TraceReplay(Replayer):
    """Replays configurations on one trace with one profile's table.

    Args:
        trace: the router's decisions.
        profile: of the same model; or its table alone, which is not checked.

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

    def __init__(self, trace: RoutingTrace, profile: ProfileView | RoutingTable) -> None:
        if isinstance(profile, RoutingTable):
            table = profile
        else:
            trace.check_profile(profile)
            table = profile.table()
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
        # The table's leading experts of each id that occurs. (L, U, lead)
        self.table_experts = self.table.index.numpy().astype(np.int16)
        # The table's first expert is among the token's own leading ones. (L, N)
        first = self.table_experts[:, self.id_number, :1]
        self.match = (self.index[:, :, : self.lead] == first).any(axis=2)
        self._places = trace.places()
        sizes = trace.starts.diff().numpy()
        self._document = np.repeat(np.arange(len(sizes)), sizes)  # (N,)
        self._mass = _leading_mass(trace, self.lead)
        # What a configuration leaves for the next one, where they share it.
        self._recency = cache(self._new_recency)
        self._stays = lru_cache(1)(self._new_stays)
        self._hits = lru_cache(1)(self._new_hits)

    # -- what configurations share -----------------------------------------------------------

    def _new_recency(self, window: int, scope: str) -> Recency:
        """Stack distances of the contexts of ``window`` ids, for a cache scope."""
        keys = stream_keys(self.trace.ids, self._places, window).numpy()
        return Recency.of(keys, self._document if scope == "document" else None)

    def _new_stays(self, window: int, scope: str, size: int, ttl_seconds: float) -> Stays:
        """The stays in a cache that several tokens share."""
        ttl = ttl_seconds * Clock.ticks_per_second
        return self._recency(window, scope).stays(size=size, ttl=ttl)

    def _new_hits(self, key: tuple[Any, ...], confidence: float) -> list[SlotHits]:
        stays = self._stays(*key)
        return [
            layer_hits(stays, mass >= confidence, index, self.lead)
            for mass, index in zip(self._mass, self.index, strict=True)
        ]

    def hits(self, config: VARConfig) -> list[SlotHits]:
        """Per layer, which tokens hit a filled slot of a configuration's cache."""
        return self._hits(_stays_key(config), config.confidence_threshold)

    def confident(self, config: VARConfig, layer: int) -> Bools:
        """Whose leading experts have enough of the routing mass. (N,)"""
        return np.asarray(self._mass[layer] >= config.confidence_threshold)

    # -- replays -----------------------------------------------------------------------------

    def evaluate(self, config: VARConfig) -> Replay:
        """Tiers and executed pairs of one configuration, and its damage where that is recorded."""
        return self.evaluate_many([config])[0]

    def evaluate_many(self, configs: Sequence[VARConfig]) -> list[Replay]:
        """The same for many, in the order given; what they share is computed once."""
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
        base = VARConfig.from_dict(fixed)
        names = DOCUMENTED_FIELDS
        lists = {name: tuple(values.get(name, (getattr(base, name),))) for name in names}
        shape = tuple(len(own) for own in lists.values())
        columns: dict[str, NDArray[np.float64]] = {}
        grid = ThresholdGrid(self, lists["frequency_threshold"], lists["entropy_threshold"])
        total, done = int(np.prod(shape)), 0
        confidence, size, ttl, window = (range(count) for count in shape[2:])
        # The window makes the stack distances, then size and time to live the stays: those that
        # share work follow each other.
        for w, s, t, c in product(window, size, ttl, confidence):
            places = (c, s, t, w)
            chosen = {name: lists[name][at] for name, at in zip(names[2:], places, strict=True)}
            config = base.replace(**chosen)
            one = grid.evaluate(config)
            figures = one.figures()
            if speedups:
                figures["speedup"] = speedups(one.pairs, config.uses_residuals)
            for name, figure in figures.items():
                columns.setdefault(name, np.empty(shape))[(..., *places)] = figure
            done += shape[0] * shape[1]
            if progress:
                progress("replaying the grid", done, total)
        axes = [names.index(name) for name in (*values, *(n for n in names if n not in values))]
        asked = [len(own) for own in values.values()]
        return {name: column.transpose(axes).reshape(asked) for name, column in columns.items()}


def _stays_key(config: VARConfig) -> tuple[Any, ...]:
    """What stays depend on: window, scope, size and time to live of the cache."""
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
