"""The objective of a policy's settings: perplexity first, then throughput within the bound."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from var_moe.calibration.profile import RoutingProfile
from var_moe.config import MAX_DEGRADATION, check_bound, check_count, check_number, check_seed
from var_moe.errors import UsageError
from var_moe.evaluation.evaluator import Evaluator, Speed
from var_moe.evaluation.speed_setting import SpeedSetting
from var_moe.models.checks import check_droppable
from var_moe.optimization.candidate import VAR, Candidate
from var_moe.optimization.results import Evaluation, OptimizationResult, documented_score
from var_moe.optimization.search_space import COMPENSATION, SearchSpace, defaults
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.registry import policy_spec

log = logging.getLogger(__name__)

SEARCH_BLOCKS = 4
"""Timed blocks per arm during a search; the final measurement takes more."""

DOUBTFUL = 0.1
"""Relative distance from the predicted speedup at which a measurement is taken again."""

CONFIRM_BLOCKS, CONFIRM_AT_MOST = 10, 5


class PolicyObjective:
    """Score of a policy's settings: the documented formula, with everything behind it.

    Calling it with a dict of parameters returns the score; `evaluate` returns all figures.

    Args:
        evaluator: the model and the text it is measured on; see `Candidate.cost_policies` for its
            own.
        profile: of the same model; holds what policies ask for.
        policy: name in the registry.
        fixed: settings that no point changes, such as VAR's mode.
        compensations: names of what stands in for dropped experts, from the plainest to the best;
            a point that names none has the last. None leaves it to the policy.
        max_degradation: bound on the relative perplexity change.
        blocks: timed blocks per arm for each feasible configuration.
        confirmation: measures the best again at a search's end; by default `evaluator`.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        profile: RoutingProfile,
        policy: str,
        *,
        fixed: Mapping[str, Any] | None = None,
        compensations: tuple[str | None, ...] = (None,),
        max_degradation: float = MAX_DEGRADATION,
        blocks: int = SEARCH_BLOCKS,
        confirmation: Evaluator | None = None,
    ) -> None:
        self.evaluator, self.profile, self._policy = evaluator, profile, policy
        self.fixed, self.compensations = dict(fixed or {}), compensations
        self.max_degradation = check_bound(max_degradation)
        self.blocks = blocks
        self.confirmation = confirmation or evaluator
        self.default = self.candidate(defaults(self.space))
        self._calibrations: dict[str | None, dict[str, Any]] = {}

    @property
    def space(self) -> SearchSpace:
        """The policy's own search space, with its compensations where there is a choice."""
        space = policy_spec(self._policy).search_space(self.evaluator.top_k)
        if len(self.compensations) > 1:
            names = [str(name) for name in self.compensations]
            space[COMPENSATION] = {"type": "choice", "choices": names, "default": names[-1]}
        return space

    @property
    def mode(self) -> str | None:
        """VAR's mode, where the policy has one."""
        return self.fixed.get("mode")

    def candidate(self, params: Mapping[str, Any]) -> Candidate:
        """The configuration that ``params`` (or a part of them) stands for."""
        settings = {name: value for name, value in params.items() if name != COMPENSATION}
        return Candidate(
            policy=self._policy,
            settings={**self.fixed, **settings},
            compensation=params.get(COMPENSATION, self.compensations[-1]),
        )

    def presets(self) -> dict[str, Candidate]:
        """The policy's named settings."""
        named = policy_spec(self._policy).load().presets()
        return {name: self.candidate(settings) for name, settings in named.items()}

    def calibration(self, compensation: str | None) -> dict[str, Any]:
        """What the policy may ask for with a compensation; made once."""
        if compensation not in self._calibrations:
            self._calibrations[compensation] = self.profile.calibration(compensation)
        return self._calibrations[compensation]

    def policy(self, candidate: Candidate) -> RoutingPolicy:
        """A fresh policy for a configuration."""
        return candidate.spec.make(candidate.settings, self.calibration(candidate.compensation))

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
        policy = self.policy(self.candidate(params))
        quality = self.evaluator.quality(policy)
        change, report = quality.judged, quality.report
        predicted = self.evaluator.predicted_speedup(report.experts_per_token)
        feasible = change.value <= self.max_degradation
        speed = self._speed(policy, predicted) if feasible else None
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
        )

    def confirm(self, result: OptimizationResult) -> OptimizationResult:
        """Measure the best again: longer, and by the upper bound of the degradation.

        `best_params` becomes the fastest that keeps the bound then; where none does, the
        default configuration, with ``nearest_miss`` in the result's `extra`.
        """
        from var_moe.optimization.measure_again import LastMeasurement

        last = LastMeasurement(self.confirmation, self, blocks=CONFIRM_BLOCKS)
        last.measure_search(result.evaluations, at_most=CONFIRM_AT_MOST)
        if not last.measured:
            return result
        extra = {**result.extra, "remeasured": [one.to_dict() for one in last.measured]}
        best, chosen = last.best or last.nearest, self.default
        if best.passed:
            chosen = best.config
            extra.pop("nearest_miss", None)
        else:
            extra["nearest_miss"] = best.to_dict()
            log.warning(
                "All configurations violate the constraint: the smallest degradation is %+.2f%%, "
                "95%% upper bound %+.2f%%; try a larger max_quality_degradation or wider bounds",
                100 * best.quality.judged.value,
                100 * best.quality.judged.upper,
            )
        params = chosen.as_best_params()
        return replace(result, best_params=params, best_score=best.score, extra=extra)


def searched_compensations(
    profile: RoutingProfile, policy: str, asked: str | None, top_k: int
) -> tuple[str | None, ...]:
    """The compensations that a search of a policy chooses among, the best last.

    The one that is asked for; else all of the profile that the policy can be made with. A policy
    with a replay of its own, which knows no compensation, has none.
    """
    spec = policy_spec(policy)
    if asked is not None or spec.replay is not None:
        return (asked,)
    settings = defaults(spec.search_space(top_k))

    def works(name: str) -> bool:
        try:
            spec.make(settings, profile.calibration(name))
        except UsageError:
            return False
        return True

    return tuple(name for name in profile.compensations() if works(name)) or (None,)


def create_objective_function(
    *,
    model: Any,
    tokenizer: Any,
    validation_data: Any,
    baseline_perplexity: float | None = None,
    baseline_throughput: float | None = None,
    max_quality_degradation: float = MAX_DEGRADATION,
    profile: RoutingProfile | None = None,
    max_samples: int | None = None,
    mode: str = "verified",
    seed: int = 0,
    setting: SpeedSetting | None = None,
) -> PolicyObjective:
    """The documented objective for a model and a text.

    Args:
        model: a transformers MoE causal language model.
        tokenizer: its tokenizer.
        validation_data: a list of texts, a datasets.Dataset with a text column, or token
            tensors; each text is a document.
        baseline_perplexity: checked on the same tokens; where it is off by more than 1%, a
            warning names both figures and the measured one counts.
        baseline_throughput: tokens per second, checked likewise.
        max_quality_degradation: bound on the relative perplexity change.
        profile: routing statistics of other text. Without one, half of the documents
            calibrate and the other half is scored, and this is logged.
        max_samples: at most so many documents are scored in each evaluation (a sample); the
            best are measured again on all of them.
        mode: ``"verified"`` or ``"plain"``.
        seed: draws the halves and the sample.
        setting: batch, sequence and forwards of a timed block.

    Returns:
        A callable from a dict of parameters to the score, with `evaluate` for all figures.

    Raises:
        UsageError: too few documents, a bad bound, a model that is no MoE.
    """
    import numpy as np

    from var_moe.calibration.collect import collect_profile
    from var_moe.data.documents import require_documents
    from var_moe.data.encoding import as_documents, check_documents
    from var_moe.models.loading import LoadedModel

    bound = check_bound(max_quality_degradation)
    check_count("max_samples", max_samples, 2)
    baseline = {"perplexity": baseline_perplexity, "throughput": baseline_throughput}
    given = {name: value for name, value in baseline.items() if value is not None}
    for name, value in given.items():
        check_number(f"baseline_{name}", value, low=0, open_low=True)
    if profile is not None and not hasattr(profile, "check_loaded"):
        raise UsageError(
            f"profile: expected a RoutingProfile (RoutingProfile.load(folder)), got "
            f"{type(profile).__name__}"
        )
    loaded = LoadedModel.of(model, tokenizer)
    check_droppable(loaded.name, loaded.top_k)
    documents = as_documents(validation_data, tokenizer)
    check_documents(documents, loaded.model, tokenizer, "validation_data")
    order = np.random.default_rng(check_seed(seed)).permutation(len(documents))
    if profile is None:
        require_documents(documents, 4, "calibrating on one half and scoring the other")
        half = len(documents) // 2
        calibration = [documents[i] for i in sorted(order[:half])]
        order = order[half:]
        log.warning(
            "no profile given: %d of the %d documents calibrate, the other %d are scored",
            half,
            len(documents),
            len(order),
        )
        profile = collect_profile(
            loaded, calibration, dataset="validation_data", data_hash="given", max_tokens=None
        )
    else:
        require_documents(documents, 2, "comparing perplexities")
        profile.check_loaded(loaded)
    scored = [documents[i] for i in sorted(order[:max_samples])]
    default = Candidate(policy=VAR, settings={"mode": mode})
    evaluator = Evaluator(
        loaded,
        scored,
        setting=setting or SpeedSetting(),
        cost_policies=default.cost_policies(profile, loaded.top_k),
    )
    for name, value in given.items():
        measured = (
            evaluator.baseline_losses.perplexity
            if name == "perplexity"
            else evaluator.backend_throughputs[evaluator.baseline_backend]
        )
        if abs(value / measured - 1) > 0.01:
            log.warning(
                "baseline_%s given as %.4g, measured as %.4g on the same tokens: the measured one "
                "counts",
                *(name, value, measured),
            )
    confirmation = None
    if len(scored) < len(order):
        confirmation = evaluator.with_documents([documents[i] for i in sorted(order)])
    return PolicyObjective(
        evaluator,
        profile,
        VAR,
        fixed={"mode": mode},
        max_degradation=bound,
        confirmation=confirmation,
    )
