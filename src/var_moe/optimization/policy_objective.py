"""What a search measures of any policy: perplexity first, then throughput within the bound."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from var_moe.calibration.profile import RoutingProfile
from var_moe.errors import UsageError
from var_moe.evaluation.cost import CostModel
from var_moe.evaluation.evaluator import Evaluator, Speed
from var_moe.optimization.candidate import Candidate, PolicySettings
from var_moe.optimization.forecast import TraceForecaster
from var_moe.optimization.objective_protocol import check_bound, documented_score
from var_moe.optimization.policy_forecast import PolicyForecaster
from var_moe.optimization.results import Evaluation
from var_moe.optimization.search_space import COMPENSATION
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.compensation import Compensation
from var_moe.routing.damage import DamageModel
from var_moe.routing.overhead import Overhead
from var_moe.routing.ranking import leading_count
from var_moe.routing.registry import policy_spec
from var_moe.tracing.trace import RoutingTrace

log = logging.getLogger(__name__)

SEARCH_BLOCKS = 4
"""Timed blocks per arm during a search; the final measurement takes more."""

DOUBTFUL = 0.1
"""Relative distance from the predicted speedup at which a measurement is taken again."""


@dataclass(frozen=True, kw_only=True)
class StandIn:
    """What a trace must note for one compensation: its damages, and its damage model's look at
    the layers' inputs."""

    compensation: Compensation | None = None
    predictor: DamageModel | None = None


class PolicyObjective(ABC):
    """Score of a policy's settings: the documented formula, with everything behind it.

    Calling it with a dict of parameters returns the score; `evaluate` returns all figures. A
    subclass keeps the routing statistics of calibration text in `profile`.

    Args:
        evaluator: the model and the text it is measured on.
        max_degradation: bound on the relative perplexity change.
        blocks: timed blocks per arm for each feasible configuration.

    With `stop_early` set, scoring ends where a configuration is clearly over the bound.
    """

    stop_early = False
    profile: RoutingProfile

    def __init__(
        self, evaluator: Evaluator, *, max_degradation: float = 0.01, blocks: int = SEARCH_BLOCKS
    ) -> None:
        self.evaluator = evaluator
        self.max_degradation = check_bound(max_degradation)
        self.blocks = blocks

    @abstractmethod
    def config(self, params: Mapping[str, Any]) -> Candidate:
        """The configuration that ``params`` (or a part of them) stands for."""

    @abstractmethod
    def policy(self, config: Any) -> RoutingPolicy:
        """A fresh policy for a configuration."""

    @property
    def compensations(self) -> Mapping[str, StandIn]:
        """What stands in for dropped experts, by name, from the plainest to the best: what is to
        be searched. Each needs a trace of its own."""
        return {"none": StandIn()}

    @abstractmethod
    def forecaster(self, traces: Mapping[str, RoutingTrace], cost: CostModel) -> TraceForecaster:
        """Forecasts of its points from traces of its evaluator's text, one per compensation."""

    def __call__(self, params: Mapping[str, Any]) -> float:
        score = self.evaluate(dict(params)).score
        assert score is not None
        return score

    def _speed(self, policy: RoutingPolicy, predicted: float) -> Speed:
        """Throughput; taken again, longer, where it is far from what the pairs predict.

        A few short blocks can fall into a disturbance of the machine, and a search keeps the
        luckiest figure it sees.
        """
        speed = self.evaluator.speed(policy, blocks=self.blocks, factors=False)
        if abs(speed.speedup.median / predicted - 1) > DOUBTFUL:
            log.info("speedup %.3f, predicted %.3f: again", speed.speedup.median, predicted)
            speed = self.evaluator.speed(policy, blocks=3 * self.blocks, factors=False)
        return speed

    def evaluate(self, params: Mapping[str, Any]) -> Evaluation:
        """Measure one configuration on the search's text."""
        policy = self.policy(self.config(params))
        over = self.max_degradation if self.stop_early else None
        quality = self.evaluator.quality(policy, futile_over=over)
        change, report = quality.judged, quality.report
        predicted = self.evaluator.predicted_speedup(report.experts_per_token)
        feasible = quality.complete and change.value <= self.max_degradation
        speed = None
        if feasible:
            speed = self._speed(policy, predicted)
        score = documented_score(
            degradation=change.value,
            max_degradation=self.max_degradation,
            speedup=speed.speedup.median if speed else None,
            learned_pct=report.learned_pct,
        )
        return Evaluation(
            params=dict(params),
            score=score,
            degradation=change.value,
            degradation_se=change.standard_error,
            speedup=speed.speedup.median if speed else None,
            predicted_speedup=predicted,
            perplexity=quality.change.perplexity,
            throughput_tps=speed.tps if speed else None,
            fast_pct=report.fast_pct,
            cached_pct=report.cached_pct,
            learned_pct=report.learned_pct,
            cache_hit_rate=report.cache_hit_rate,
            experts_per_token=report.experts_per_token,
            feasible=feasible,
            complete=quality.complete,
        )


class PeerObjective(PolicyObjective):
    """Score of another policy's settings.

    Args:
        evaluator, max_degradation, blocks: see `PolicyObjective`.
        profile: of the same model; holds what policies ask for.
        name: of the policy, in the registry.
        compensation: name of what stands in for dropped experts, where a point names none; by
            default the best there is for the damage policy, and none for others.
        search: without a `compensation`, points name one of all that the profile has.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        profile: RoutingProfile,
        name: str,
        *,
        compensation: str | None = None,
        search: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(evaluator, **options)
        self._spec, self.profile = policy_spec(name), profile
        self._calibrations: dict[str | None, dict[str, Any]] = {}
        space = self._spec.search_space(evaluator.top_k)
        self._defaults = {name: entry["default"] for name, entry in space.items()}
        known: list[str | None] = []
        if search and compensation is None:
            known = [one for one in profile.compensations() if self._works(one)]
        if known:
            compensation = known[-1]
        elif compensation is None and "damage" in self._spec.needs:
            compensation = profile.best_compensation()
        self._compensation, self._known = compensation, known or [compensation]
        self._costly = compensation is not None
        if self._costly and evaluator.cost_policies is None:
            evaluator.cost_policies = self._cost_policies()

    def config(self, params: Mapping[str, Any]) -> PolicySettings:
        settings = {name: value for name, value in params.items() if name != COMPENSATION}
        return PolicySettings(
            policy=self._spec.name,
            settings=settings,
            compensation=params.get(COMPENSATION, self._compensation),
        )

    def policy(self, config: PolicySettings) -> RoutingPolicy:
        return self._spec.make(config.settings, self._calibration(config.compensation))

    def _calibration(self, compensation: str | None) -> dict[str, Any]:
        known = self._calibrations.get(compensation)
        if known is None:
            known = self._calibrations[compensation] = self.profile.calibration(compensation)
        return known

    def _works(self, compensation: str) -> bool:
        """Whether the policy can be made with it."""
        try:
            self._spec.make(self._defaults, self._calibration(compensation))
        except UsageError:
            return False
        return True

    @property
    def compensations(self) -> Mapping[str, StandIn]:
        looks = "damage" in self._spec.needs
        return {
            name or "none": StandIn(
                compensation=self._calibration(name).get("compensation"),
                predictor=self._calibration(name)["damage"] if looks else None,
            )
            for name in self._known
        }

    def forecaster(self, traces: Mapping[str, RoutingTrace], cost: CostModel) -> PolicyForecaster:
        return PolicyForecaster(
            traces,
            cost,
            policy=self._spec.name,
            calibrations={name or "none": self._calibration(name) for name in self._known},
            costly=self._costly,
        )

    def _cost_policies(self) -> tuple[RoutingPolicy, RoutingPolicy]:
        """What deciding and compensating cost, at all pairs and at the leading ones."""
        top_k, calibration = self.evaluator.top_k, self._calibration(self._compensation)

        def running(count: int) -> RoutingPolicy:
            return Overhead(self._spec.make(self._defaults, calibration), count)

        return running(top_k), running(leading_count(top_k))
