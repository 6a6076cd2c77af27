"""The objective: perplexity first, then throughput for what keeps the bound."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from var_moe.calibration.profile import RoutingProfile
from var_moe.config import DOCUMENTED_FIELDS, VARConfig, check_count, check_number, check_seed
from var_moe.errors import UsageError
from var_moe.evaluation.cost import CostModel
from var_moe.evaluation.evaluator import Evaluator, SpeedSetting
from var_moe.models.checks import check_droppable
from var_moe.optimization.objective_protocol import check_bound
from var_moe.optimization.policy_objective import SEARCH_BLOCKS, PeerObjective, PolicyObjective
from var_moe.optimization.replay_forecast import ReplayForecaster
from var_moe.optimization.results import OptimizationResult
from var_moe.routing.var import VARPolicy
from var_moe.tracing.replay import TraceReplay
from var_moe.tracing.trace import RoutingTrace

log = logging.getLogger(__name__)

CONFIRM_BLOCKS, CONFIRM_AT_MOST = 10, 5


class VARObjective(PolicyObjective):
    """Score of a VAR configuration.

    Args:
        evaluator, max_degradation, blocks: see `PolicyObjective`.
        profile: routing statistics of calibration text.
        mode: VAR's mode for configurations that do not name one.
        confirmation: measures the best again at a search's end; by default `evaluator`.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        profile: RoutingProfile,
        *,
        max_degradation: float = 0.01,
        mode: str = "verified",
        blocks: int = SEARCH_BLOCKS,
        confirmation: Evaluator | None = None,
    ) -> None:
        super().__init__(evaluator, max_degradation=max_degradation, blocks=blocks)
        self.profile, self.mode = profile, mode
        self.confirmation = confirmation or evaluator
        self._table = profile.table()
        if evaluator.cost_policies is None:
            # VAR's own routing work belongs to what a configuration is predicted to cost.
            evaluator.cost_policies = (
                self.policy(_cutting(mode, confidence=1.0)),
                self.policy(_cutting(mode, confidence=1e-9)),
            )

    def config(self, params: Mapping[str, Any]) -> VARConfig:
        return VARConfig.from_dict({"mode": self.mode, **params})

    def policy(self, config: VARConfig) -> VARPolicy:
        return VARPolicy(config, self._table, residuals=self.profile.residuals)

    def forecaster(self, traces: Mapping[str, RoutingTrace], cost: CostModel) -> ReplayForecaster:
        (trace,) = traces.values()
        return ReplayForecaster(TraceReplay(trace, self.profile), cost, mode=self.mode)

    def confirm(self, result: OptimizationResult) -> OptimizationResult:
        """Measure the best again: longer, and by the upper bound of the degradation.

        `best_params` becomes the fastest that keeps the bound then; where none does, the
        default configuration, with ``nearest_miss`` in the result's `extra`.
        """
        from var_moe.optimization.remeasure import best_measured, nearest, remeasure

        measured = remeasure(
            self.confirmation,
            self,
            result.evaluations,
            blocks=CONFIRM_BLOCKS,
            at_most=CONFIRM_AT_MOST,
        )
        if not measured:
            return result
        extra = {**result.extra, "remeasured": [one.to_dict() for one in measured]}
        best = best_measured(measured)
        if best is not None:
            extra.pop("nearest_miss", None)
            return result.replace(best_params=best.config, best_score=best.score, extra=extra)
        near = nearest(measured)
        log.warning(
            "All configurations violate the constraint: the smallest degradation is %+.2f%%, "
            "95%% upper bound %+.2f%%; try a larger max_quality_degradation or wider bounds",
            100 * near.quality.judged.value,
            100 * near.quality.judged.upper,
        )
        extra["nearest_miss"] = near.to_dict()
        default = VARConfig(mode=self.mode)
        return result.replace(best_params=default, best_score=near.score, extra=extra)


def make_objective(
    evaluator: Evaluator,
    profile: RoutingProfile,
    *,
    max_degradation: float,
    policy: str | None = None,
    compensation: str | None = None,
    mode: str = "verified",
    search: bool = False,
) -> PolicyObjective:
    """The objective of the policy of that name, or of VAR in ``mode`` where it is None."""
    if policy is not None:
        return PeerObjective(
            evaluator,
            profile,
            policy,
            compensation=compensation,
            search=search,
            max_degradation=max_degradation,
        )
    return VARObjective(evaluator, profile, max_degradation=max_degradation, mode=mode)


def _cutting(mode: str, *, confidence: float) -> VARConfig:
    """Verified VAR that cuts all decisions or none, with the residual means of ``mode``."""
    return VARConfig(
        frequency_threshold=2**62,
        confidence_threshold=confidence,
        residuals=VARConfig(mode=mode).uses_residuals,
    )


def create_objective_function(
    *,
    model: Any,
    tokenizer: Any,
    validation_data: Any,
    baseline_perplexity: float | None = None,
    baseline_throughput: float | None = None,
    max_quality_degradation: float = 0.01,
    profile: RoutingProfile | None = None,
    max_samples: int | None = None,
    mode: str = "verified",
    seed: int = 0,
    setting: SpeedSetting | None = None,
) -> VARObjective:
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
    for name, given in (
        ("baseline_perplexity", baseline_perplexity),
        ("baseline_throughput", baseline_throughput),
    ):
        if given is not None:
            check_number(name, given, low=0, open_low=True)
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
    evaluator = Evaluator(loaded, scored, setting=setting or SpeedSetting())
    if baseline_perplexity is not None:
        _check_given("perplexity", baseline_perplexity, evaluator.baseline_losses.perplexity)
    if baseline_throughput is not None:
        measured = evaluator.backend_throughputs[evaluator.baseline_backend]
        _check_given("throughput", baseline_throughput, measured)
    confirmation = None
    if len(scored) < len(order):
        confirmation = evaluator.with_documents([documents[i] for i in sorted(order)])
    return VARObjective(
        evaluator, profile, max_degradation=bound, mode=mode, confirmation=confirmation
    )


def _check_given(what: str, given: float, measured: float) -> None:
    if abs(given / measured - 1) > 0.01:
        log.warning(
            "baseline_%s given as %.4g, measured as %.4g on the same tokens: the measured one "
            "counts",
            what,
            given,
            measured,
        )


__all__ = [
    "DOCUMENTED_FIELDS",
    "VARObjective",
    "create_objective_function",
    "make_objective",
]
