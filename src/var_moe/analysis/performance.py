"""`PerformanceModel`: latency and speedup of shares of fast, cached and learned decisions.

Behind it is the cost model that replay uses (`evaluation.cost`): time follows the executed pairs,
not the path by which a decision came about. A tier counts by the experts per token that it runs:
FAST and CACHED the leading ceil(K/2), LEARNED all K, unless a distribution says otherwise
(verified VAR and the damage policy cut LEARNED decisions too).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from scipy.optimize import brentq

from var_moe.config import check_number
from var_moe.errors import UsageError
from var_moe.evaluation.cost import TERMS, CostModel
from var_moe.evaluation.speed_setting import SpeedSetting
from var_moe.routing.keeping import leading_count

_SUM_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class TierDistribution:
    """Shares of (layer, token) decisions by tier; FAST and CACHED run the leading ceil(K/2).

    Args:
        fast, cached, learned: shares in [0, 1] that sum to 1.
        experts_learned: experts per token of a LEARNED decision; None is K.

    Raises:
        UsageError: a share is out of its range, or they do not sum to 1.
    """

    fast: float = 0.0
    cached: float = 0.0
    learned: float = 1.0
    experts_learned: float | None = None

    def __post_init__(self) -> None:
        for name in ("fast", "cached", "learned"):
            check_number(f"TierDistribution.{name}", getattr(self, name), low=0, high=1)
        total = self.fast + self.cached + self.learned
        if abs(total - 1) > _SUM_TOLERANCE:
            raise UsageError(
                f"TierDistribution: fast + cached + learned = {total:.6g}: "
                "expected shares that sum to 1"
            )
        if self.experts_learned is not None:
            check_number("TierDistribution.experts_learned", self.experts_learned, low=0)

    def experts_per_token(self, top_k: int) -> float:
        """Executed pairs per layer and token, for a model with K = ``top_k``."""
        learned = top_k if self.experts_learned is None else self.experts_learned
        total = (self.fast + self.cached) * leading_count(top_k) + self.learned * learned
        if total > top_k + _SUM_TOLERANCE:
            raise UsageError(
                f"TierDistribution: {total:.4g} experts per token, but the model runs {top_k}"
            )
        return total


class PerformanceModel:
    """Predicts a forward's latency, and the speedup over the unmodified model.

    Args:
        cost: a fitted cost model (`evaluation.cost.fit_cost_model`, or a ``cost_model.json``);
            without one, `set_costs` gives the figures.
    """

    def __init__(self, cost: CostModel | None = None) -> None:
        self._cost = cost

    @property
    def cost(self) -> CostModel:
        """The cost model.

        Raises:
            UsageError: there is none yet.
        """
        if self._cost is None:
            raise UsageError(
                "PerformanceModel has no costs: give it a fitted cost model, or call set_costs(...)"
            )
        return self._cost

    def set_costs(
        self,
        *,
        seconds: Mapping[str, float],
        baseline_s: float,
        layers: int,
        experts: int,
        top_k: int,
        batch_size: int = SpeedSetting.batch_size,
        sequence: int = SpeedSetting.sequence,
    ) -> PerformanceModel:
        """Give the costs by hand.

        Args:
            seconds: by the names of `evaluation.cost.TERMS`; what is left out costs nothing.
            baseline_s: seconds of the unmodified model's forward in that batch.
            layers, experts, top_k: L, E, K.
            batch_size, sequence: of the forward that is predicted.

        Returns:
            Itself.

        Raises:
            UsageError: an unknown term, or a figure out of its range; names it.
        """
        for name, value in seconds.items():
            if name not in TERMS:
                known = ", ".join(TERMS)
                raise UsageError(f"set_costs: unknown term {name!r}; expected some of {known}")
            check_number(f"set_costs: seconds[{name!r}]", value, low=0)
        check_number("set_costs: baseline_s", baseline_s, low=0, open_low=True)
        counts = {"layers": layers, "experts": experts, "top_k": top_k}
        counts |= {"batch_size": batch_size, "sequence": sequence}
        for name, count in counts.items():
            check_number(f"set_costs: {name}", count, integer=True, low=1)
        self._cost = CostModel(
            seconds={name: float(seconds.get(name, 0.0)) for name in TERMS},
            baseline=baseline_s,
            setting=SpeedSetting(batch_size=batch_size, sequence=sequence),
            layers=layers,
            experts=experts,
            top_k=top_k,
            error=0.0,
        )
        return self

    def predict_latency(self, spread: TierDistribution) -> float:
        """Milliseconds of a forward in the cost model's setting."""
        cost = self.cost
        executed = [spread.experts_per_token(cost.top_k)] * cost.layers
        return 1000 * cost.predict(cost.work(executed, tokens=1))

    def predict_speedup(self, spread: TierDistribution) -> float:
        """Predicted speedup over the unmodified model on its fastest backend."""
        return 1000 * self.cost.baseline / self.predict_latency(spread)

    def find_breakeven_distribution(
        self, target_speedup: float = 1.0, max_learned: float = 1.0
    ) -> TierDistribution:
        """The distribution with the most learned decisions that still reaches a speedup.

        FAST and CACHED run equally many experts, so only their sum counts; it is returned as
        ``fast``.

        Args:
            target_speedup: to reach.
            max_learned: largest share of learned decisions, in [0, 1].

        Raises:
            UsageError: no distribution reaches it; says what is the most.
        """
        check_number("target_speedup", target_speedup, low=0, open_low=True)
        check_number("max_learned", max_learned, low=0, high=1)

        def at(learned: float) -> TierDistribution:
            return TierDistribution(fast=1 - learned, learned=learned)

        def missing(learned: float) -> float:
            return target_speedup - self.predict_speedup(at(learned))

        if missing(max_learned) <= 0:
            return at(max_learned)
        if missing(0.0) > 0:
            raise UsageError(
                f"target_speedup = {target_speedup:g}: beyond the "
                f"{self.predict_speedup(at(0.0)):.3f}x that {leading_count(self.cost.top_k)} of "
                f"{self.cost.top_k} experts everywhere reaches; ask for less, or make the experts "
                "a larger share of the time"
            )
        # Time is concave in the share (expert calls are, the rest is linear): one crossing.
        return at(max(float(brentq(missing, 0.0, max_learned, xtol=1e-9)) - 1e-9, 0.0))
