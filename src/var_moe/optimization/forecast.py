"""What a search can know of a configuration without running the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from var_moe.optimization.objective_protocol import LEARNED_TARGET_PCT
from var_moe.optimization.search_space import Params, SearchSpace

if TYPE_CHECKING:
    from var_moe.evaluation.cost import CostModel
    from var_moe.evaluation.evaluator import Progress
    from var_moe.optimization.forecast_grid import ForecastGrid
    from var_moe.tracing.trace import RoutingTrace


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A configuration's figures on the search's text, as forecast."""

    degradation: float  # PPL(VAR) / PPL(baseline) - 1
    speedup: float  # over the baseline
    experts_per_token: float
    fast_pct: float
    cached_pct: float
    learned_pct: float

    @property
    def score(self) -> float:
        """The documented score if the bound is kept."""
        return self.speedup + max(0.0, (LEARNED_TARGET_PCT - self.learned_pct) / 100)

    def to_dict(self) -> dict[str, Any]:
        """For result files."""
        return {
            "forecast_degradation": self.degradation,
            "forecast_speedup": self.speedup,
            "experts_per_token": self.experts_per_token,
            "fast_pct": self.fast_pct,
            "cached_pct": self.cached_pct,
            "learned_pct": self.learned_pct,
        }


class Forecaster(Protocol):
    """Forecasts points of a search space; the same point gets the same forecast."""

    def forecast(self, points: Sequence[Params]) -> list[Forecast]:
        """In the order of ``points``."""
        ...


class TraceForecaster(Forecaster, Protocol):
    """Forecasts by replaying a trace."""

    cost: CostModel

    @property
    def trace(self) -> RoutingTrace:
        """What is replayed."""
        ...

    def grid(
        self, space: SearchSpace, n_points: int, progress: Progress | None = None
    ) -> ForecastGrid:
        """All combinations of evenly spaced values."""
        ...
