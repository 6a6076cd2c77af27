"""Replaying a routing policy on a trace: its own code, fed with the recorded decisions.

A policy of the registry may have a faster `Replayer` of its own, as VAR has in `tracing.replay`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from var_moe.errors import UsageError
from var_moe.evaluation.batching import Window, collate
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.counts import RoutingReport, TierCounts
from var_moe.routing.damage import DamagePolicy
from var_moe.routing.decision import ForwardContext, Routing
from var_moe.routing.keeping import rescaled
from var_moe.routing.registry import PolicySpec, load_target, policy_spec

if TYPE_CHECKING:
    from var_moe.evaluation.evaluator import Progress
    from var_moe.tracing.trace import ProfileView, RoutingTrace

_TOKENS_PER_CHUNK = 16_384  # padded
_TOLERANCE = 1e-5  # of weights that sum to one, in float32

Settings = Mapping[str, Any]
Times = Callable[[NDArray[np.int64], bool], NDArray[np.float64]]
"""From executed pairs (..., L), and whether something is added for dropped ones, to speedups."""


def predicted_degradation(
    first: float | NDArray[np.float64], squares: float | NDArray[np.float64], scored: int
) -> NDArray[np.float64]:
    """Predicted PPL(policy) / PPL(baseline) - 1, of one configuration or of many.

    With a = g . d the first-order change of the loss by one decision, ``first`` is the sum of a
    over all decisions and ``squares`` that of its square. Half of ``squares`` is the second-order
    change: the squared gradient stands for the curvature (the empirical Fisher matrix), and
    decisions count as independent. No factor is fitted. On a well-trained model ``first`` is
    small, and what a cut costs is of second order.

    Args:
        first, squares: of each configuration.
        scored: tokens that have a loss.
    """
    change: NDArray[np.float64] = np.expm1((first + squares / 2) / max(scored, 1))
    return change


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a configuration decides on a trace, and the damage of that where it can be told.

    ``first`` and ``squares`` sum the recorded damages of the decisions, and their squares (see
    `predicted_degradation`), over the tokens of each layer; by kind of decision. None where the
    trace has no damages, or none of such decisions.
    """

    report: RoutingReport
    scored: int  # tokens that have a loss
    first: Mapping[str, Sequence[float]] | None = None
    squares: Mapping[str, Sequence[float]] | None = None
    adds_residual: bool = False  # whether something is added for dropped pairs

    @property
    def degradation(self) -> float | None:
        """Predicted PPL(policy) / PPL(baseline) - 1; None where the trace does not tell."""
        if self.first is None or self.squares is None:
            return None
        first, squares = (sum(map(sum, r.values())) for r in (self.first, self.squares))
        return float(predicted_degradation(first, squares, self.scored))

    def to_dict(self) -> dict[str, Any]:
        """For result files."""
        return {**self.report.to_dict(), "predicted_degradation": self.degradation}


class Replayer(ABC):
    """Replays settings of one policy on one trace."""

    @classmethod
    @abstractmethod
    def of(cls, trace: RoutingTrace, spec: PolicySpec, calibration: Settings) -> Replayer:
        """For a policy of the registry, with its inputs as `RoutingProfile.calibration` gives
        them."""

    @abstractmethod
    def replay(
        self, settings: Sequence[Settings], progress: Progress | None = None
    ) -> list[Replay]:
        """In the order of ``settings``; ``progress`` is called with a stage, replays done and in
        all."""

    def grid(
        self,
        values: Mapping[str, Sequence[Any]],
        fixed: Settings,
        *,
        speedups: Times | None = None,
        progress: Progress | None = None,
    ) -> dict[str, NDArray[np.float64]]:
        """Figures of all combinations of ``values``, each with one axis per setting.

        Args:
            values: of some settings.
            fixed: values of others.
            speedups: predicts them; without, there are none.
            progress: called with a stage, points done and in all.

        Returns:
            `FIGURES`; ``degradation`` where the trace tells it, ``speedup`` where predicted.
        """
        shape = tuple(len(own) for own in values.values())
        points = [
            {**fixed, **dict(zip(values, point, strict=True))}
            for point in product(*values.values())
        ]
        replays = self.replay(points, progress)
        columns = {name: [getattr(one.report, name) for one in replays] for name in FIGURES}
        degradations = [one.degradation for one in replays]
        if None not in degradations:
            columns["degradation"] = degradations
        if speedups is not None:
            columns["speedup"] = [
                float(speedups(np.array(one.report.executed_pairs), one.adds_residual))
                for one in replays
            ]
        return {name: np.array(column).reshape(shape) for name, column in columns.items()}


FIGURES = ("experts_per_token", "fast_pct", "cached_pct", "learned_pct", "cache_hit_rate")


def replayer_of(trace: RoutingTrace, policy: str, calibration: Settings) -> Replayer:
    """The replayer of a policy: its own, or its code where a compensation stands in."""
    spec = policy_spec(policy)
    own = spec.replay is not None and calibration.get("compensation") is None
    kind: type[Replayer] = load_target(spec.replay) if own and spec.replay else PolicyReplayer
    return kind.of(trace, spec, calibration)


class PolicyReplayer(Replayer):
    """Replays any policy with its own code.

    Args:
        trace: the router's decisions.
        spec, calibration: make the policy from its settings.
    """

    STAGE = "replaying the policy"

    def __init__(self, trace: RoutingTrace, spec: PolicySpec, calibration: Settings) -> None:
        self._trace, self._spec, self._calibration = trace, spec, calibration

    @classmethod
    def of(cls, trace: RoutingTrace, spec: PolicySpec, calibration: Settings) -> PolicyReplayer:
        return cls(trace, spec, calibration)

    def replay(
        self, settings: Sequence[Settings], progress: Progress | None = None
    ) -> list[Replay]:
        replays = []
        for one in settings:
            policy = self._spec.make(one, self._calibration)
            replays.append(evaluate_policy(self._trace, policy))
            if progress:
                progress(self.STAGE, len(replays), len(settings))
        return replays


def evaluate_policy(
    trace: RoutingTrace, policy: RoutingPolicy, profile: ProfileView | None = None
) -> Replay:
    """What ``policy`` decides, from empty caches, if that does not change later layers' inputs.

    The degradation is predicted for a policy of which every decision runs at least one of the
    token's experts, none with less weight than one that it drops: rescaled to the full sum, or
    with the compensation that the trace was recorded with.

    Args:
        trace: the router's decisions.
        policy: any policy; VAR without a compensation is replayed much faster by `TraceReplay`.
        profile: the one that the policy was made from, to check that it fits the trace.

    The router's weights are the recorded shares, which sum to one.

    Raises:
        UsageError: the profile does not fit the trace; names both.
    """
    if profile is not None:
        trace.check_profile(profile)
    counts = TierCounts(trace.layers, drops_only=policy.drops_only)
    cuts = _CutSums(trace, policy)
    with torch.inference_mode():
        for one in decisions(trace, policy):
            if one.layer == 0:
                counts.begin(one.context)
            counts.see(one.layer, one.context, one.routing, one.index, one.weight)
            if one.layer == trace.layers - 1:
                counts.end()
            cuts.add(one)
    known = cuts.known
    return Replay(
        report=RoutingReport(**counts.report()),
        scored=trace.scored,
        first={"cut": cuts.first} if known else None,
        squares={"cut": cuts.squares} if known else None,
        adds_residual=policy.adds_residual,
    )


@dataclass(frozen=True)
class Decided:
    """What a policy decides of T tokens, some of them padding, in one layer."""

    context: ForwardContext
    layer: int
    index: Tensor  # (T, K) the router's experts by rank
    weight: Tensor  # (T, K) float32 shares
    routing: Routing
    position: Tensor  # (T,) of the tokens in the trace


def decisions(trace: RoutingTrace, policy: RoutingPolicy) -> Iterator[Decided]:
    """What ``policy`` decides, from empty caches: documents in order, and of each part all layers.

    Raises:
        UsageError: the policy's compensation or damage model is not the trace's.
    """
    _check_fits(trace, policy)
    # Of this policy's damage model, as has been checked; another one's would mislead it.
    hint = trace.hint if _looks(policy) else None
    policy.reset()
    for context, position in _chunks(trace, policy.ids_before):
        policy.begin(context)
        for layer in range(trace.layers):
            index = trace.index[layer][position].long()
            weight = trace.weight[layer][position].float()
            if hint is not None and isinstance(policy, DamagePolicy):
                policy.see_hint(hint[layer][position])
            routing = policy.route(context, layer, index, weight)
            yield Decided(context, layer, index, weight, routing, position)
    policy.reset()


def _check_fits(trace: RoutingTrace, policy: RoutingPolicy) -> None:
    """Refuse a policy whose compensation or damage model the trace does not know."""
    compensation, recorded = policy.compensation, trace.head.get("compensation_hash")
    if compensation is not None and compensation.hash != recorded:
        raise UsageError(
            "the policy's compensation is not the one that the trace was recorded with; take the "
            "trace of its own search (RESULTS/trace), or record it again with record_trace(..., "
            "compensation=policy.compensation)"
        )
    if (
        isinstance(policy, DamagePolicy)
        and _looks(policy)
        and policy.damage.hash != trace.head.get("predictor_hash")
    ):
        raise UsageError(
            "the damage policy looks at the layers' inputs, and the trace was not recorded "
            "with its damage model; take the trace of its own search (RESULTS/trace), or record it "
            "again with record_trace(..., predictor=...)"
        )


def _looks(policy: RoutingPolicy) -> bool:
    """Whether it is a damage policy that looks at the layers' inputs."""
    return isinstance(policy, DamagePolicy) and policy.damage.out.shape[1] > 0


class _CutSums:
    """Adds up the damages of decisions that run the first experts alone, rescaled.

    Args:
        trace: with or without damages.
        policy: with or without a compensation.
    """

    def __init__(self, trace: RoutingTrace, policy: RoutingPolicy) -> None:
        self._compensated = policy.compensation is not None
        self._kind = "cut_compensated" if self._compensated else "cut"
        self.known = self._kind in trace.damage
        self.first, self.squares = [0.0] * trace.layers, [0.0] * trace.layers
        self._trace = trace

    def add(self, one: Decided) -> None:
        """One layer of a chunk."""
        index, weight, routing = one.index, one.weight, one.routing
        counted = one.context.counted_on(index.device)
        runs = routing.index >= 0  # (T, K)
        self.known = self.known and _runs_first_experts(
            index, weight, routing, runs, counted, rescaled_weights=not self._compensated
        )
        if not self.known:
            return
        kept = runs.sum(dim=1)
        cut = counted & (kept < index.shape[1])
        damage = self._trace.damage[self._kind][one.layer]  # (N, K - 1)
        damage = damage[one.position[cut]].double()
        effect = damage.gather(1, kept[cut, None] - 1)
        self.first[one.layer] += float(effect.sum())
        self.squares[one.layer] += float(effect.square().sum())


def _runs_first_experts(
    index: Tensor,
    weight: Tensor,
    routing: Routing,
    runs: Tensor,
    counted: Tensor,
    *,
    rescaled_weights: bool,
) -> bool:
    """Whether every counted token runs its own first experts, with the weights of a cut.

    With a compensation, weights are not the policy's matter.

    Which of several experts of one weight run does not matter: shares are recorded in float16,
    so that experts of slightly different weights may tie here.
    """
    if routing.index.shape != index.shape or (rescaled_weights and routing.residual is not None):
        return False
    kept, total = runs.sum(dim=1), weight.sum(dim=1)
    own = ((routing.index == index) | ~runs).all(dim=1) & (kept > 0)
    mass = weight.masked_fill(~runs, 0).sum(dim=1)
    leading = weight.cumsum(dim=1).gather(1, (kept - 1).clamp(min=0)[:, None])[:, 0]
    fits = own & _near(mass, leading)
    if rescaled_weights:
        scaled = rescaled(weight, mass, total).masked_fill(~runs, 0)
        given = routing.weight.float().masked_fill(~runs, 0)
        fits &= _near(given, scaled).all(dim=1)
    return bool((fits | ~counted).all())


def _near(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).abs() <= _TOLERANCE


def _chunks(trace: RoutingTrace, prefix: int) -> Iterator[tuple[ForwardContext, Tensor]]:
    """The documents as padded rows, and the token at each place of the flattened rows. (B * S,)

    A document is one row, or several that follow each other where it is very long; at padding
    stands the chunk's first token.
    """
    rows: list[Window] = []
    first: list[int] = []
    for row, start in _rows(trace, prefix):
        width = max(len(row.ids), *(len(other.ids) for other in rows)) if rows else len(row.ids)
        if rows and width * (len(rows) + 1) > _TOKENS_PER_CHUNK:
            yield _chunk(rows, first)
            rows, first = [], []
        rows.append(row)
        first.append(start)
    if rows:
        yield _chunk(rows, first)


def _rows(trace: RoutingTrace, prefix: int) -> Iterator[tuple[Window, int]]:
    """Documents, or parts of one, with the position of their first token."""
    ids, starts = trace.ids.numpy(), trace.starts.tolist()
    for number, (start, end) in enumerate(pairwise(starts)):
        for at in range(start, end, _TOKENS_PER_CHUNK):
            part = ids[at : min(at + _TOKENS_PER_CHUNK, end)]
            before = ids[max(start, at - prefix) : at]
            yield Window(document=number, ids=part, prefix=before, overlap=0), at


def _chunk(rows: list[Window], first: list[int]) -> tuple[ForwardContext, Tensor]:
    batch = collate(rows)
    place = torch.arange(batch.ids.shape[1]) + torch.tensor(first)[:, None]
    return batch, torch.where(batch.valid, place, first[0]).reshape(-1)
