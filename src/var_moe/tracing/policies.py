"""Replaying a routing policy on a trace: its own code, fed with the recorded decisions.

A policy of the registry may have a faster `Replayer` of its own, as VAR has in `tracing.replay`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pkgutil import resolve_name
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
from var_moe.routing.registry import PolicySpec, policy_spec

if TYPE_CHECKING:
    from var_moe.evaluation.evaluator import Progress
    from var_moe.tracing.trace import RoutingTrace

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
    decisions count as independent. No factor is fitted. ``scored`` tokens have a loss.
    """
    change: NDArray[np.float64] = np.expm1((first + squares / 2) / max(scored, 1))
    return change


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a configuration decides on a trace, and the damage of that where it is known.

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
        """Predicted PPL(policy) / PPL(baseline) - 1; None where the damages are not known."""
        if self.first is None or self.squares is None:
            return None
        first, squares = (sum(map(sum, r.values())) for r in (self.first, self.squares))
        return float(predicted_degradation(first, squares, self.scored))

    def to_dict(self) -> dict[str, Any]:
        """For result files."""
        return {**self.report.to_dict(), "predicted_degradation": self.degradation}


FIGURES = ("experts_per_token", "fast_pct", "cached_pct", "learned_pct", "cache_hit_rate")


class Replayer(ABC):
    """Replays settings of one policy on one trace."""

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
            `FIGURES`; ``degradation`` where it can be predicted, ``speedup`` where asked for.
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


def replayer_of(trace: RoutingTrace, policy: str, calibration: Settings) -> Replayer:
    """The replayer of a policy: its own, or its code where a compensation stands in.

    ``calibration`` is what `RoutingProfile.calibration` gives.
    """
    spec = policy_spec(policy)
    if spec.replay is None or calibration.get("compensation") is not None:
        return PolicyReplayer(trace, spec, calibration)
    own: Replayer = resolve_name(spec.replay)(trace, calibration["table"])
    return own


@dataclass(frozen=True)
class PolicyReplayer(Replayer):
    """Replays any policy with its own code, made from each of the settings."""

    trace: RoutingTrace
    spec: PolicySpec
    calibration: Settings

    STAGE = "replaying the policy"

    def replay(
        self, settings: Sequence[Settings], progress: Progress | None = None
    ) -> list[Replay]:
        replays = []
        for one in settings:
            replays.append(evaluate_policy(self.trace, self.spec.make(one, self.calibration)))
            if progress:
                progress(self.STAGE, len(replays), len(settings))
        return replays


def evaluate_policy(trace: RoutingTrace, policy: RoutingPolicy) -> Replay:
    """What ``policy`` decides, from empty caches, if that does not change later layers' inputs.

    The degradation is predicted for a policy of which every decision runs the token's first
    experts, at least one: rescaled to the full sum, or with the compensation that the trace was
    recorded with.

    Args:
        trace: the router's decisions; its shares stand for the router's weights.
        policy: any policy; VAR without a compensation is replayed much faster by `TraceReplay`.

    Raises:
        UsageError: the policy's compensation or damage model is not the trace's.
    """
    _check_fits(trace, policy)
    # Of this policy's damage model, as has been checked; another one's would mislead it.
    hint = trace.hint if _looks(policy) else None
    counts = TierCounts(trace.layers, drops_only=policy.drops_only)
    kind = "cut" if policy.compensation is None else "cut_compensated"
    known = kind in trace.damage
    first, squares = [0.0] * trace.layers, [0.0] * trace.layers
    policy.reset()
    with torch.inference_mode():
        for context, position in _chunks(trace):
            policy.begin(context)
            counts.begin(context)
            counted = context.counted.reshape(-1)
            for layer in range(trace.layers):
                index = trace.index[layer][position].long()
                weight = trace.weight[layer][position].float()
                if hint is not None and isinstance(policy, DamagePolicy):
                    policy.see_hint(hint[layer][position])
                routing = policy.route(context, layer, index, weight)
                counts.see(layer, context, routing, index, weight)
                rescales = policy.compensation is None
                known = known and _runs_first_experts(index, weight, routing, counted, rescales)
                if known:
                    kept = (routing.index >= 0).sum(dim=1)
                    cut = counted & (kept < trace.top_k)
                    damage = trace.damage[kind][layer][position[cut]].double()  # (n, K - 1)
                    effect = damage.gather(1, kept[cut, None] - 1)
                    first[layer] += float(effect.sum())
                    squares[layer] += float(effect.square().sum())
            counts.end()
    policy.reset()
    return Replay(
        report=RoutingReport(**counts.report()),
        scored=trace.scored,
        first={"cut": first} if known else None,
        squares={"cut": squares} if known else None,
        adds_residual=policy.adds_residual,
    )


def _check_fits(trace: RoutingTrace, policy: RoutingPolicy) -> None:
    """Refuse a policy whose compensation or damage model the trace was not recorded with."""
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


def _runs_first_experts(
    index: Tensor, weight: Tensor, routing: Routing, counted: Tensor, rescales: bool
) -> bool:
    """Whether every counted token runs its own first experts, with the weights of a cut.

    Where the policy ``rescales``, its weights have to be those of the kept experts, scaled; else
    a compensation stands in and weights are the router's. Of several experts of one weight any
    may run: shares are recorded in float16, so that experts of slightly different weights may tie.
    """
    if routing.index.shape != index.shape or (rescales and routing.residual is not None):
        return False
    runs = routing.index >= 0  # (T, K)
    kept, total = runs.sum(dim=1), weight.sum(dim=1)
    own = ((routing.index == index) | ~runs).all(dim=1) & (kept > 0)
    mass = weight.masked_fill(~runs, 0).sum(dim=1)
    leading = weight.cumsum(dim=1).gather(1, (kept - 1).clamp(min=0)[:, None])[:, 0]
    fits = own & _near(mass, leading)
    if rescales:
        scaled = rescaled(weight, mass, total).masked_fill(~runs, 0)
        given = routing.weight.float().masked_fill(~runs, 0)
        fits &= _near(given, scaled).all(dim=1)
    return bool((fits | ~counted).all())


def _near(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).abs() <= _TOLERANCE


def _chunks(trace: RoutingTrace) -> Iterator[tuple[ForwardContext, Tensor]]:
    """The documents as padded rows, and the token at each place of the flattened rows. (B * S,)

    At padding stands the chunk's first token.
    """
    rows: list[tuple[int, int]] = []
    width = 0
    for start, end in pairwise(trace.starts.tolist()):
        width = max(width, end - start)
        if rows and width * (len(rows) + 1) > _TOKENS_PER_CHUNK:
            yield _chunk(trace, rows)
            rows, width = [], end - start
        rows.append((start, end))
    if rows:
        yield _chunk(trace, rows)


def _chunk(trace: RoutingTrace, rows: list[tuple[int, int]]) -> tuple[ForwardContext, Tensor]:
    ids, first = trace.ids.numpy(), rows[0][0]
    batch = collate([Window(start, ids[start:end], ids[:0], 0) for start, end in rows])
    place = torch.arange(batch.ids.shape[1]) + torch.tensor([start for start, _ in rows])[:, None]
    return batch, torch.where(batch.valid, place, first).reshape(-1)
