"""Replaying every combination of frequency and entropy thresholds at once.

These two thresholds decide which token ids are on the fast path, and nothing else. So each sum
over a configuration's decisions is the sum without a fast path, less what the tokens on it had
there, plus what they have on it. Both are summed once per bin of token ids that reach equally
many of either threshold, and running sums over the bins give all combinations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from var_moe.config import VARConfig
from var_moe.routing.counts import RoutingReport
from var_moe.routing.decision import Tier
from var_moe.tracing.policies import FIGURES, Replay, predicted_degradation
from var_moe.tracing.stays import Ints, SlotHits

if TYPE_CHECKING:
    from var_moe.tracing.replay import TraceReplay

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class GridReplay:
    """One configuration replayed with F frequency times G entropy thresholds.

    ``first`` and ``squares`` are those of `Replay`; empty where the trace has no damages.
    """

    tokens: int
    scored: int  # tokens that have a loss
    tiers: Ints  # (F, G, L, 3) fast, cached, learned
    pairs: Ints  # (F, G, L) executed
    first: dict[str, Floats]  # (F, G, L) each
    squares: dict[str, Floats]  # (F, G, L) each

    def figures(self) -> dict[str, Floats]:
        """`FIGURES`, and ``degradation`` where the trace has damages. (F, G) each"""
        fast, cached, learned = np.moveaxis(100 * self.tiers.mean(axis=2) / self.tokens, -1, 0)
        _, hit, missed = np.moveaxis(self.tiers.sum(axis=2), 2, 0)
        rate = hit / np.maximum(hit + missed, 1)
        columns = (self.pairs.mean(axis=2) / self.tokens, fast, cached, learned, rate)
        figures: dict[str, Floats] = dict(zip(FIGURES, columns, strict=True))
        if self.first:
            first, squares = (
                np.sum([rows.sum(axis=2) for rows in sums.values()], axis=0)
                for sums in (self.first, self.squares)
            )
            figures["degradation"] = predicted_degradation(first, squares, self.scored)
        return figures

    def replay(self, place: tuple[int, int], top_k: int, adds_residual: bool) -> Replay:
        """One of its configurations, by the places of its two thresholds."""
        tiers = self.tiers[place].tolist()
        report = RoutingReport(
            tokens=self.tokens,
            top_k=top_k,
            tier_counts=tuple((fast, cached, learned) for fast, cached, learned in tiers),
            executed_pairs=tuple(self.pairs[place].tolist()),
        )
        first, squares = (
            {kind: rows[place].tolist() for kind, rows in sums.items()} or None
            for sums in (self.first, self.squares)
        )
        return Replay(
            report=report,
            scored=self.scored,
            first=first,
            squares=squares,
            adds_residual=adds_residual,
        )


def stored_counts(
    run: NDArray[np.int16], own: NDArray[np.int16]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many of the stored experts (R, lead) that run are the token's own but do not lead, and
    how many are not its own. (R,) each; own experts (R, K) are by rank."""
    lead = run.shape[1]
    same = run[:, :, None] == own[:, None, :]  # (R, lead, K)
    leading = same[:, :, :lead].any(axis=2).sum(axis=1)
    chosen = same.any(axis=2).sum(axis=1)
    return chosen - leading, lead - chosen


class ThresholdGrid:
    """Replays configurations, each with all combinations of F frequency and G entropy thresholds.

    Example:
        >>> grid = ThresholdGrid(TraceReplay(trace, profile), [10, 50], [0.5, 1.0, 1.5])
        >>> grid.evaluate(VARConfig(confidence_threshold=0.9)).figures()  # (2, 3) each
    """

    def __init__(
        self, replay: TraceReplay, frequencies: Sequence[float], entropies: Sequence[float]
    ) -> None:
        self.replay = replay
        lists = np.asarray(frequencies, dtype=np.float64), np.asarray(entropies, dtype=np.float64)
        # Bins count the thresholds that an id reaches, so place 0 is the one reached most easily.
        rising, falling = np.argsort(lists[0]), np.argsort(-lists[1])
        self._order = np.ix_(np.argsort(rising), np.argsort(falling))
        self._shape = (len(rising) + 1, len(falling) + 1)
        table = replay.table
        count, entropy = table.count.numpy(), table.entropy.numpy()  # (L, U)
        often = np.searchsorted(lists[0][rising], count, side="right")
        often[count <= 0] = 0  # an id that calibration never saw is on no fast path
        surely = np.searchsorted(-lists[1][falling], -entropy, side="right")
        by_id = (often * self._shape[1] + surely).astype(np.intp)
        self._bin = by_id[:, replay.id_number]  # (L, N)
        self._fixed: dict[tuple[object, ...], tuple[Floats, Floats]] = {}

    def evaluate(self, config: VARConfig) -> GridReplay:
        """All combinations; the configuration's own frequency and entropy thresholds are unused.

        In plain mode a table's or a slot's experts run unseen. Where they are the token's own
        leading ones, that is a cut. Else its damage is made of those that are chosen but do not
        lead (``next``) and those that are not chosen (``foreign``), in proportion.
        """
        replay, trace = self.replay, self.replay.trace
        kinds = self._kinds(config) if trace.damage else ()
        fast, always = self._fixed_parts(config, kinds)
        by_layer = enumerate(replay.hits(config))
        hit = np.stack([self._hit(config, kinds, layer, one) for layer, one in by_layer], axis=1)
        on_path = self._reaching(fast)  # (Q, L, F, G)
        beside = hit.sum(axis=2)[..., None, None] - self._reaching(hit)
        summed = np.moveaxis(on_path + beside + always[..., None, None], 1, -1)  # (Q, F, G, L)
        tiers = np.empty((*summed.shape[1:], len(Tier)), dtype=np.int64)
        tiers[..., Tier.FAST] = np.moveaxis(on_path[0], 0, -1)
        tiers[..., Tier.CACHED] = np.moveaxis(beside[0], 0, -1)
        tiers[..., Tier.LEARNED] = trace.tokens - tiers[..., :2].sum(axis=-1)
        cut = summed[1].astype(np.int64)
        return GridReplay(
            tokens=trace.tokens,
            scored=trace.scored,
            tiers=tiers,
            pairs=trace.tokens * trace.top_k - cut * (trace.top_k - replay.lead),
            first=dict(zip(kinds, summed[2 : 2 + len(kinds)], strict=True)),
            squares=dict(zip(kinds, summed[2 + len(kinds) :], strict=True)),
        )

    def _kinds(self, config: VARConfig) -> tuple[str, ...]:
        """The kinds of damage that a configuration's decisions do, a cut's first."""
        residual = config.uses_residuals and "cut_residual" in self.replay.trace.damage
        cut = "cut_residual" if residual else "cut"
        return (cut, "next", "foreign") if config.mode == "plain" else (cut,)

    # -- sums by bin: Q = 2 + 2 kinds of them: how many, how many cut, damages, their squares --

    def _fixed_parts(self, config: VARConfig, kinds: tuple[str, ...]) -> tuple[Floats, Floats]:
        """What does not depend on the cache: the fast path by bin, and what is always cut. Kept."""
        plain = config.mode == "plain"
        key = (config.mode, kinds, None if plain else config.confidence_threshold)
        if key not in self._fixed:
            layers = range(self.replay.trace.layers)
            fast = np.stack([self._fast(config, kinds, layer) for layer in layers], axis=1)
            always = [self._always(config, kinds, layer) for layer in layers]
            self._fixed[key] = (fast, np.stack(always, axis=1))
        return self._fixed[key]

    def _fast(self, config: VARConfig, kinds: tuple[str, ...], layer: int) -> Floats:
        """All tokens as if on the fast path. (Q, B)"""
        replay = self.replay
        if config.mode == "plain":
            run = replay.table_experts[layer][replay.id_number]
            return self._stored(kinds, layer, np.arange(len(run)), run)
        token = np.flatnonzero(replay.match[layer])
        return self._licensed(config, kinds, layer, token)

    def _hit(self, config: VARConfig, kinds: tuple[str, ...], layer: int, hits: SlotHits) -> Floats:
        """The tokens that the cache decides where they are not on the fast path. (Q, B)"""
        if config.mode == "plain":
            run = self.replay.index[layer][hits.source, : self.replay.lead] if kinds else None
            return self._stored(kinds, layer, hits.token, run)
        return self._licensed(config, kinds, layer, hits.token[hits.licensed])

    def _always(self, config: VARConfig, kinds: tuple[str, ...], layer: int) -> Floats:
        """What is cut whatever the table and the cache say: confident tokens, if verified. (Q,)"""
        if config.mode == "plain":
            return np.zeros(2 + 2 * len(kinds))
        token = np.flatnonzero(self.replay.confident(config, layer))
        effects = self._effects(kinds, layer, token)
        sums = [0.0, float(len(token)), *(e.sum() for e in effects)]
        return np.array([*sums, *(np.dot(e, e) for e in effects)])

    def _licensed(
        self, config: VARConfig, kinds: tuple[str, ...], layer: int, token: Ints
    ) -> Floats:
        """Verified tokens with a licence; those that are confident are cut in any case. (Q, B)"""
        gained = token[~self.replay.confident(config, layer)[token]]
        return self._sums(layer, token, gained, self._effects(kinds, layer, gained))

    def _stored(
        self, kinds: tuple[str, ...], layer: int, token: Ints, run: NDArray[np.int16] | None
    ) -> Floats:
        """Tokens that run stored experts unseen. (Q, B)"""
        effects: list[Floats] = []
        if kinds and run is not None:
            following, foreign = stored_counts(run, self.replay.index[layer][token])
            share = (following + foreign == 0, following / run.shape[1], foreign / run.shape[1])
            whole = self._effects(kinds, layer, token)
            effects = [e * part for e, part in zip(whole, share, strict=True)]
        return self._sums(layer, token, token, effects)

    def _effects(self, kinds: tuple[str, ...], layer: int, token: Ints) -> list[Floats]:
        """Of each kind, the change of the loss by some tokens' decisions."""
        trace, lead = self.replay.trace, self.replay.lead
        effects = []
        for kind in kinds:
            damage = trace.damage[kind][layer].numpy()
            if kind == kinds[0] and lead == trace.top_k:  # there is nothing to cut
                damage = np.zeros(trace.tokens)
            elif kind == "cut":
                damage = damage[:, lead - 1]
            effects.append(damage[token].astype(np.float64))
        return effects

    def _sums(self, layer: int, token: Ints, cut: Ints, effects: list[Floats]) -> Floats:
        """By bin: how many tokens, how many are cut, the cuts' effects, and their squares. (Q, B)

        The effects are of the tokens that are cut.
        """
        place, size = self._bin[layer], self._shape[0] * self._shape[1]
        rows = [np.bincount(place[some], minlength=size) for some in (token, cut)]
        weights = [*effects, *(effect * effect for effect in effects)]
        rows += [np.bincount(place[cut], weights=one, minlength=size) for one in weights]
        return np.stack(rows).astype(np.float64, copy=False)

    def _reaching(self, sums: Floats) -> Floats:
        """From sums by bin to sums over the ids that reach both thresholds. (Q, L, F, G)"""
        bins = sums.reshape(*sums.shape[:2], *self._shape)
        summed = bins[..., ::-1, ::-1].cumsum(axis=-2).cumsum(axis=-1)[..., ::-1, ::-1]
        rows, columns = self._order
        return np.asarray(summed[..., 1:, 1:][..., rows, columns])
