"""What a replayed configuration decides in a layer, and the damages that come with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from var_moe.routing.ranking import leading_count
from var_moe.tracing.stays import Bools

if TYPE_CHECKING:
    from var_moe.config import VARConfig
    from var_moe.tracing.trace import RoutingTrace


@dataclass(frozen=True)
class LayerDecisions:
    """What a configuration decides in one layer.

    ``stored`` tells the tokens that run a table's or a slot's experts unseen (plain mode) by
    what those are to the token: its own leading ones (then it stands in ``cut``), some that it
    chose but does not lead with, or some that it did not choose. ``next_count`` and
    ``foreign_count`` say how many of the leading_count(K) executed experts are of the last two
    kinds.
    """

    layer: int
    tier: NDArray[np.uint8]  # (N,) a Tier
    cut: Bools  # (N,) runs its own leading experts alone, and drops some
    stored: Bools  # (N,) runs stored experts that are not just its own leading ones
    next_count: NDArray[np.uint8]  # (N,) zero outside `stored`
    foreign_count: NDArray[np.uint8]  # (N,)

    @property
    def next(self) -> Bools:
        """Stored experts that are all the token's own choice, but not all leading. (N,)"""
        found: Bools = self.stored & (self.foreign_count == 0)
        return found

    @property
    def foreign(self) -> Bools:
        """Stored experts of which some are not the token's own choice. (N,)"""
        found: Bools = self.foreign_count > 0
        return found


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


def predicted_degradation(
    first: float | NDArray[np.float64], squares: float | NDArray[np.float64], scored: int
) -> NDArray[np.float64]:
    """Predicted PPL(VAR) / PPL(baseline) - 1, of one configuration or of many.

    Args:
        first, squares: summed damages and their squares, see `DamageSums`; half of the latter is
            the second-order change.
        scored: tokens that have a loss.
    """
    found: NDArray[np.float64] = np.expm1((first + squares / 2) / max(scored, 1))
    return found


@dataclass(frozen=True, kw_only=True)
class DamageSums:
    """Damages of a configuration's decisions, by kind and layer, summed over tokens.

    Kinds are "cut" or, where residual means are used and recorded, "cut_residual"; in plain mode
    also "next" and "foreign", where stored experts count in proportion. With a = g . d of one
    decision:

    ``first`` is the sum of a: the change of the summed NLL in nats to first order. On a
    well-trained model it is small, and misleading: what a cut costs is of second order.
    ``squares`` is the sum of a squared. Half of it is the second-order change, with the squared
    gradient of the true labels' loss in place of the curvature (the empirical Fisher matrix) and
    decisions taken as independent.
    """

    first: dict[str, list[float]]
    squares: dict[str, list[float]]

    @classmethod
    def of(cls, trace: RoutingTrace, config: VARConfig) -> DamageSums:
        """Empty sums of the kinds that the configuration has."""
        kinds = damage_kinds(trace, config)
        return cls(first={kind: [] for kind in kinds}, squares={kind: [] for kind in kinds})

    def add(self, trace: RoutingTrace, decided: LayerDecisions) -> None:
        """Add one layer's decisions."""
        lead = leading_count(trace.top_k)
        for kind in self.first:
            if kind in ("next", "foreign"):
                count = decided.next_count if kind == "next" else decided.foreign_count
                token = np.flatnonzero(count)
                share = count[token] / lead
            else:
                token, share = np.flatnonzero(decided.cut), np.ones(1)
            effect = damage_effects(trace, kind, decided.layer)[token] * share
            self.first[kind].append(float(effect.sum()))
            self.squares[kind].append(float(np.dot(effect, effect)))
