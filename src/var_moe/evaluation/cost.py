"""The cost model: seconds of a forward, from what is executed in it.

One forward of T tokens takes ``fixed + rest T + pair P + expert A + calls + policy T + residual C``
seconds: the model's calls, what is done for every token (attention, norms, head), P executed
pairs and A expert calls over all layers (an expert that any token runs must be read), VAR's own
calls and its work per token, and the residual means of C cut decisions. The seven coefficients are
not negative and are fitted to a few timed forwards of three sizes, interleaved, by relative error.
One fit for a machine, model and dtype predicts any configuration from its counts alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from var_moe.errors import UsageError
from var_moe.evaluation.batching import full_batches
from var_moe.evaluation.evaluator import Evaluator, SpeedSetting
from var_moe.evaluation.throughput import ArmGroup, Timings, backend_arm, policy_arm, time_groups
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.counts import RoutingReport
from var_moe.routing.keeping import leading_count
from var_moe.routing.simple import FixedKPolicy, NativePolicy, RandomSkipPolicy

Floats = NDArray[np.float64]

TERMS = ("fixed", "rest", "pair", "expert", "calls", "policy", "residual")
SHAPES = (
    SpeedSetting(),
    SpeedSetting(batch_size=4, sequence=128),
    SpeedSetting(batch_size=1, sequence=32),
)
BLOCKS = 6
OWN_WEIGHT = 3.0
"""Weight of errors in the setting that speedups are predicted for; others weigh 1. No straight
line goes through all sizes (large forwards pay for fresh memory, small ones for calls)."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is executed in one forward; the terms of the cost model."""

    tokens: float  # T
    pairs: float  # executed pairs over all layers
    experts: float  # expert calls over all layers, at most L * E
    decided: float = 0.0  # tokens that VAR decides: T, or 0 without it
    cut: float = 0.0  # (layer, token) decisions to which a residual mean is added

    def terms(self) -> list[float]:
        """In the order of `TERMS`."""
        calls = float(self.decided > 0)
        return [1.0, self.tokens, self.pairs, self.experts, calls, self.decided, self.cut]


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Seconds of a forward, fitted on one machine, model and dtype.

    Args:
        seconds: coefficient of each of `TERMS`.
        baseline: seconds of the unmodified model's forward on its fastest backend, in `setting`.
        setting: batch that speedups are predicted for.
        layers, experts, top_k: L, E, K of the model.
        error: median relative error of timings predicted by a model that was fitted to all
            others.
        timings: what it was fitted to: name, work, seconds, predicted seconds.
    """

    seconds: Mapping[str, float]
    baseline: float
    setting: SpeedSetting
    layers: int
    experts: int
    top_k: int
    error: float
    timings: tuple[Mapping[str, Any], ...] = ()

    def breakdown(self, work: Work) -> dict[str, float]:
        """Seconds of each term."""
        terms = zip(TERMS, work.terms(), strict=True)
        return {name: self.seconds[name] * term for name, term in terms}

    def predict(self, work: Work) -> float:
        """Seconds of one forward."""
        return float(np.dot([self.seconds[name] for name in TERMS], work.terms()))

    def work(
        self,
        report: RoutingReport,
        *,
        setting: SpeedSetting | None = None,
        decided: bool = True,
        residual: bool = False,
    ) -> Work:
        """What a forward executes with a report's routing, measured or replayed.

        Args:
            report: tiers and executed pairs.
            setting: batch of the forward; by default the model's own.
            decided: whether VAR makes the decisions.
            residual: whether residual means are added.
        """
        setting = setting or self.setting
        tokens = setting.batch_size * setting.sequence
        executed = np.array(report.executed_pairs, dtype=np.float64)
        pairs, experts, cut = self._scaled(executed, report.tokens, tokens)
        return Work(
            tokens=tokens,
            pairs=float(pairs),
            experts=float(experts),
            decided=tokens if decided else 0,
            cut=float(cut) if residual else 0,
        )

    def _scaled(
        self, executed: NDArray[Any], of_tokens: int, tokens: int
    ) -> tuple[Floats, Floats, Floats]:
        """Pairs, expert calls and cuts of ``tokens``, where ``of_tokens`` executed (..., L)."""
        each_layer = executed * (tokens / max(of_tokens, 1))
        pairs = each_layer.sum(axis=-1)
        dropped = tokens * self.top_k * self.layers - pairs
        cuts = dropped / max(self.top_k - leading_count(self.top_k), 1)
        return pairs, expected_experts(self.experts, each_layer).sum(axis=-1), cuts

    def speedup(
        self, report: RoutingReport, *, decided: bool = True, residual: bool = False
    ) -> float:
        """Predicted speedup over the unmodified model, in the model's own setting."""
        return self.baseline / self.predict(self.work(report, decided=decided, residual=residual))

    def speedups(
        self, executed: NDArray[Any], *, tokens: int, decided: bool = True, residual: bool = False
    ) -> Floats:
        """`speedup` of many configurations at once.

        Args:
            executed: (..., L) executed pairs of each layer.
            tokens: that they were executed for.
            decided, residual: as in `work`.

        Returns:
            (...) predicted speedups.
        """
        forward = self.setting.batch_size * self.setting.sequence
        pairs, experts, cuts = self._scaled(executed, tokens, forward)
        own = [float(decided), forward * decided, cuts * residual]
        terms: list[Any] = [1.0, forward, pairs, experts, *own]
        took = sum(self.seconds[name] * term for name, term in zip(TERMS, terms, strict=True))
        return self.baseline / np.asarray(took)

    def to_dict(self) -> dict[str, Any]:
        """For ``cost_model.json``."""
        values = asdict(self)
        values["seconds"] = {f"{name}_s": self.seconds[name] for name in TERMS}
        values["baseline_s"] = values.pop("baseline")
        values["error_relative"] = values.pop("error")
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "cost model") -> CostModel:
        """Read what `to_dict` gave.

        Raises:
            UsageError: it is something else; names the source.
        """
        try:
            return cls(
                seconds={name: float(values["seconds"][f"{name}_s"]) for name in TERMS},
                baseline=float(values["baseline_s"]),
                setting=SpeedSetting(**values["setting"]),
                layers=int(values["layers"]),
                experts=int(values["experts"]),
                top_k=int(values["top_k"]),
                error=float(values["error_relative"]),
                timings=tuple(values["timings"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{source}: not a cost model ({error}); fit it again") from None


def expected_experts(experts: int, pairs: Floats) -> Floats:
    """How many of E experts run at all when ``pairs`` pairs (...) fall on them evenly."""
    if experts <= 1:
        return np.minimum(pairs, 1.0)
    return np.asarray(experts * -np.expm1(pairs * np.log1p(-1 / experts)))


def fit(
    timings: Sequence[tuple[Work, float]], weights: Sequence[float] | None = None
) -> tuple[dict[str, float], float]:
    """Coefficients by relative least squares, and the median error of timings left out.

    Args:
        timings: work and seconds of each; sizes must differ, or terms can't be told apart.
        weights: of each relative error; by default all alike.

    Returns:
        Seconds per unit of each of `TERMS`, and the median over all timings of the relative
        error of a fit to the others.
    """
    seconds = np.array([value for _, value in timings])
    each = np.ones(len(seconds)) if weights is None else np.asarray(weights, dtype=np.float64)
    scaled = np.array([one.terms() for one, _ in timings]) / seconds[:, None]
    coefficients = _nnls(scaled * each[:, None], each)
    errors = []
    for left_out in range(len(seconds)):
        others = np.arange(len(seconds)) != left_out
        fitted = _nnls(scaled[others] * each[others, None], each[others])
        errors.append(abs(float(scaled[left_out] @ fitted) - 1))
    return dict(zip(TERMS, coefficients.tolist(), strict=True)), float(np.median(errors))


def _nnls(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    # Columns differ by many orders of magnitude; the solver needs them in one size.
    size = np.linalg.norm(matrix, axis=0)
    size[size == 0] = 1.0
    return np.asarray(nnls(matrix / size, target)[0] / size)


def fit_cost_model(
    evaluator: Evaluator,
    *,
    var_all: RoutingPolicy | None = None,
    var_leading: RoutingPolicy | None = None,
    blocks: int = BLOCKS,
) -> CostModel:
    """Time a few forwards and fit the model; arguments as in `FitTiming`, blocks per arm."""
    timing = FitTiming(evaluator, var_all=var_all, var_leading=var_leading)
    return timing.fitted(time_groups(evaluator.model, timing.groups, blocks=blocks))


class FitTiming:
    """The forwards that a cost model is fitted to.

    Args:
        evaluator: model, text and batch; the baseline's backend is measured with it.
        var_all: VAR that cuts nothing: its decisions' cost.
        var_leading: VAR that cuts every decision: the cost of its residual means.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        *,
        var_all: RoutingPolicy | None = None,
        var_leading: RoutingPolicy | None = None,
    ) -> None:
        top_k, lead = evaluator.top_k, leading_count(evaluator.top_k)
        # Pairs per token, whether VAR decides, whether residual means are added.
        self._policies: dict[str, tuple[RoutingPolicy, float, bool, bool]] = {
            "all pairs": (NativePolicy(), top_k, False, False),
            "leading pairs": (FixedKPolicy(lead), lead, False, False),
            "half of the cuts": (RandomSkipPolicy(0.5), (top_k + lead) / 2, False, False),
        }
        if var_all is not None:
            self._policies["VAR, all pairs"] = (var_all, top_k, True, False)
        if var_leading is not None:
            self._policies["VAR, leading pairs"] = (var_leading, lead, True, True)
        self._evaluator = evaluator
        self.groups = [self._group(setting) for setting in (evaluator.setting, *SHAPES[1:])]

    def _group(self, setting: SpeedSetting) -> ArmGroup:
        """The baseline and all policies, on forwards of one size."""
        evaluator = self._evaluator
        sequence = min(setting.sequence, evaluator.loaded.window)
        size, count = setting.batch_size, setting.forwards
        batches = full_batches(evaluator.documents, batch_size=size, sequence=sequence, count=count)
        model, own = evaluator.model, evaluator.running_backend
        arms = {"baseline": backend_arm(model, evaluator.baseline_backend)}
        for name, (policy, *_) in self._policies.items():
            arms[name] = policy_arm(model, policy, backend=own)
        # Small forwards take a moment: more of them for the same noise.
        return ArmGroup(arms, batches * max(1, min(8, 1024 // (size * sequence))))

    def fitted(self, timed: Sequence[Timings]) -> CostModel:
        """The model, fitted to the timings of `groups`."""
        # Every time is set against the baseline's in the setting that speedups are predicted for,
        # block by block: a machine that changes speed hits both.
        reference = timed[0].seconds["baseline"] / len(self.groups[0].batches)
        baseline = float(np.median(reference))
        names, works, seconds, weights = list[str](), list[Work](), list[float](), list[float]()
        for number, (group, timings) in enumerate(zip(self.groups, timed, strict=True)):
            for name in self._policies:
                each = timings.seconds[name] / len(group.batches)
                names.append(name)
                works.append(self._work(name, group.batches[0].numel()))
                seconds.append(baseline * float(np.median(each / reference)))
                weights.append(OWN_WEIGHT if number == 0 else 1.0)
        coefficients, error = fit(list(zip(works, seconds, strict=True)), weights)
        shape = self._evaluator.geometry()
        fitted = CostModel(
            seconds=coefficients,
            baseline=baseline,
            setting=self._evaluator.setting,
            layers=shape["layers"],
            experts=shape["experts"],
            top_k=shape["top_k"],
            error=error,
        )
        rows = tuple(
            {"name": name, **asdict(work), "seconds": took, "predicted_s": fitted.predict(work)}
            for name, work, took in zip(names, works, seconds, strict=True)
        )
        return replace(fitted, timings=rows)

    def _work(self, name: str, tokens: int) -> Work:
        """What a policy executes in a forward of so many tokens, pairs falling evenly."""
        shape = self._evaluator.geometry()
        layers, top_k = shape["layers"], shape["top_k"]
        _, per_token, decided, residual = self._policies[name]
        pairs = per_token * tokens
        cut = tokens * layers * (top_k - per_token) / max(top_k - leading_count(top_k), 1)
        return Work(
            tokens=tokens,
            pairs=pairs * layers,
            experts=layers * float(expected_experts(shape["experts"], np.asarray(pairs))),
            decided=tokens if decided else 0,
            cut=cut if residual else 0,
        )
