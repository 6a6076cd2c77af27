"""The cost model: seconds of a forward, from what is executed in it.

One forward of T tokens takes ``fixed + rest T + pair P + expert A + calls + policy T + residual C``
seconds: the model's calls, what is done for every token (attention, norms, head), P executed
pairs and A expert calls over all layers (an expert that any token runs must be read), VAR's own
calls and its work per token, and the residual means of C cut decisions. The seven coefficients are
not negative and are fitted to a few timed forwards of three sizes, interleaved, by relative error.
One fit for a machine, model and dtype predicts any configuration from its counts alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from var_moe.errors import UsageError
from var_moe.evaluation.evaluator import Evaluator
from var_moe.evaluation.speed_setting import SpeedSetting
from var_moe.evaluation.throughput import Timings, backend_arm, policy_arm, time_groups
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
    """What is executed in one forward, or in each of several (...); the cost model's terms."""

    tokens: float  # T
    pairs: Any  # executed pairs over all layers
    experts: Any  # expert calls over all layers, at most L * E
    decided: float = 0.0  # tokens that VAR decides: T, or 0 without it
    cut: Any = 0.0  # (layer, token) decisions to which a residual mean is added

    def terms(self) -> list[Any]:
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

    def breakdown(self, work: Work) -> dict[str, Any]:
        """Seconds of each term."""
        terms = zip(TERMS, work.terms(), strict=True)
        return {name: self.seconds[name] * term for name, term in terms}

    def predict(self, work: Work) -> float:
        """Seconds of one forward."""
        return float(sum(self.breakdown(work).values()))

    def work(
        self,
        executed: NDArray[Any] | Sequence[float],
        *,
        tokens: int,
        setting: SpeedSetting | None = None,
        decided: bool = True,
        residual: bool = False,
    ) -> Work:
        """What a forward executes, where pairs are spread over experts and tokens evenly.

        Args:
            executed: (..., L) executed pairs of each layer for ``tokens`` tokens.
            tokens: as many as were measured or replayed.
            setting: batch of the forward; by default the model's own.
            decided: whether VAR makes the decisions.
            residual: whether residual means are added.
        """
        setting = setting or self.setting
        forward = setting.forward_tokens
        pairs = np.asarray(executed) * (forward / max(tokens, 1))
        total = pairs.sum(axis=-1)
        dropped = forward * self.top_k * self.layers - total
        return Work(
            tokens=forward,
            pairs=total,
            experts=expected_experts(self.experts, pairs).sum(axis=-1),
            decided=forward * decided,
            cut=residual * dropped / max(self.top_k - leading_count(self.top_k), 1),
        )

    def speedup(
        self, report: RoutingReport, *, decided: bool = True, residual: bool = False
    ) -> float:
        """Predicted speedup over the unmodified model, in the model's own setting."""
        pairs = np.array(report.executed_pairs)
        return float(self.speedups(pairs, tokens=report.tokens, decided=decided, residual=residual))

    def speedups(
        self, executed: NDArray[Any], *, tokens: int, decided: bool = True, residual: bool = False
    ) -> Floats:
        """`speedup` of many configurations at once, (...); arguments as in `work`."""
        work = self.work(executed, tokens=tokens, decided=decided, residual=residual)
        return np.asarray(self.baseline / sum(self.breakdown(work).values()))

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
                setting=SpeedSetting.from_dict(values["setting"]),
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
    for left_out, row in enumerate(scaled):
        others = np.arange(len(seconds)) != left_out
        fitted = _nnls(scaled[others] * each[others, None], each[others])
        errors.append(abs(float(row @ fitted) - 1))
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
    """Time a few forwards and fit the model; arguments as in `FitTiming`."""
    timing = FitTiming(evaluator, var_all=var_all, var_leading=var_leading, blocks=blocks)
    return timing.fitted(time_groups(evaluator.model, timing.groups, blocks=blocks))


def _forwards(setting: SpeedSetting) -> int:
    return setting.forwards * max(1, min(8, 1024 // setting.forward_tokens))


class FitTiming:
    """The forwards that a cost model is fitted to.

    Args:
        evaluator: model, text and batch; the baseline's backend is measured with it.
        var_all: VAR that cuts nothing: its decisions' cost.
        var_leading: VAR that cuts every decision: the cost of its residual means.
        blocks: timed blocks per arm, each on text of its own.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        *,
        var_all: RoutingPolicy | None = None,
        var_leading: RoutingPolicy | None = None,
        blocks: int = BLOCKS,
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
        self._evaluator, window = evaluator, evaluator.loaded.window
        own = evaluator.timed_setting
        small = [replace(one, sequence=min(one.sequence, window)) for one in SHAPES[1:]]
        # Small forwards take a moment: more of them for the same noise.
        self._settings = [own, *(replace(one, forwards=_forwards(one)) for one in small)]
        model, backend = evaluator.model, evaluator.running_backend
        arms = {"baseline": backend_arm(model, evaluator.baseline_backend)}
        for name, (policy, *_) in self._policies.items():
            arms[name] = policy_arm(model, policy, backend=backend)
        self.groups = [
            setting.group(evaluator.documents, arms, blocks=blocks) for setting in self._settings
        ]

    def fitted(self, timed: Sequence[Timings]) -> CostModel:
        """The model, fitted to the timings of `groups`."""
        # Every time is set against the baseline's in the setting that speedups are predicted for,
        # block by block: a machine that changes speed hits both.
        reference = timed[0].seconds["baseline"] / self._settings[0].block_forwards
        shape = self._evaluator.geometry()
        unfitted = CostModel(
            seconds={},
            baseline=float(np.median(reference)),
            setting=self._settings[0],
            layers=shape["layers"],
            experts=shape["experts"],
            top_k=shape["top_k"],
            error=math.nan,
        )
        names, timings = list[str](), list[tuple[Work, float]]()
        for setting, measured in zip(self._settings, timed, strict=True):
            for name, (_, per_token, decided, residual) in self._policies.items():
                work = unfitted.work(
                    [per_token] * shape["layers"],
                    tokens=1,
                    setting=setting,
                    decided=decided,
                    residual=residual,
                )
                each = measured.seconds[name] / setting.block_forwards / reference
                names.append(name)
                timings.append((work, unfitted.baseline * float(np.median(each))))
        own = len(self._policies)  # the timings in the setting that speedups are predicted for
        coefficients, error = fit(timings, [OWN_WEIGHT] * own + [1.0] * (len(timings) - own))
        fitted = replace(unfitted, seconds=coefficients, error=error)
        rows = tuple(
            {"name": name, **asdict(work), "seconds": took, "predicted_s": fitted.predict(work)}
            for name, (work, took) in zip(names, timings, strict=True)
        )
        return replace(fitted, timings=rows)
