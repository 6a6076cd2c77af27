"""Replaying any routing policy on a trace: its own code, fed with the recorded decisions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from var_moe.errors import UsageError
from var_moe.evaluation.batching import Window, collate
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.counts import RoutingReport, TierCounts
from var_moe.routing.damage import DamagePolicy
from var_moe.routing.decision import ForwardContext, Routing
from var_moe.routing.ranking import rescaled
from var_moe.tracing.decisions import predicted_degradation

if TYPE_CHECKING:
    from var_moe.tracing.trace import ProfileView, RoutingTrace

_TOKENS_PER_CHUNK = 16_384  # padded
_TOLERANCE = 1e-5  # of weights that sum to one, in float32


@dataclass(frozen=True, kw_only=True)
class PolicyReplay:
    """What a policy decides on a trace, and the damage where that can be told.

    ``first`` and ``squares`` sum, over layers and tokens, the recorded damage of running only
    the first experts, and its square. They are None where the trace has no damages, or where a
    decision is of another sort: see `evaluate_policy`.
    """

    report: RoutingReport
    scored: int  # tokens that have a loss
    first: float | None = None
    squares: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For result files."""
        return {**self.report.to_dict(), "predicted_degradation": self.degradation}

    @property
    def degradation(self) -> float | None:
        """Predicted PPL(policy) / PPL(baseline) - 1, as `tracing.replay.Replay.degradation`."""
        if self.first is None or self.squares is None:
            return None
        return float(predicted_degradation(self.first, self.squares, self.scored))


def replay_policy(
    trace: RoutingTrace, policy: RoutingPolicy, profile: ProfileView | None = None
) -> RoutingReport:
    """What ``policy`` decides, from empty caches; see `evaluate_policy`."""
    return evaluate_policy(trace, policy, profile).report


def evaluate_policy(
    trace: RoutingTrace, policy: RoutingPolicy, profile: ProfileView | None = None
) -> PolicyReplay:
    """What ``policy`` decides, from empty caches, if that does not change later layers' inputs.

    The degradation is predicted for a policy of which every decision runs at least one of the
    token's experts, none with less weight than one that it drops: rescaled to the full sum, or
    with the compensation that the trace was recorded with.

    Args:
        trace: the router's decisions.
        policy: any policy; VAR's own configurations are replayed much faster by `TraceReplay`.
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
            counts.add(one.layer, one.routing, one.counted, one.index, one.weight)
            cuts.add(one)
    first, squares = (cuts.first, cuts.squares) if cuts.known else (None, None)
    return PolicyReplay(report=counts.report(), scored=trace.scored, first=first, squares=squares)


@dataclass(frozen=True)
class Decided:
    """What a policy decides of T tokens, some of them padding, in one layer."""

    layer: int
    index: Tensor  # (T, K) the router's experts by rank
    weight: Tensor  # (T, K) float32 shares
    routing: Routing
    position: Tensor  # (T,) of the tokens in the trace
    counted: Tensor  # (T,) bool, False for padding


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
        counted = context.counted.reshape(-1)
        for layer in range(trace.layers):
            index = trace.index[layer][position].long()
            weight = trace.weight[layer][position].float()
            if hint is not None and isinstance(policy, DamagePolicy):
                policy.see_hint(hint[layer][position])
            routing = policy.route(context, layer, index, weight)
            yield Decided(layer, index, weight, routing, position, counted)
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
        self.first = self.squares = 0.0
        self._trace = trace

    def add(self, one: Decided) -> None:
        """One layer of a chunk."""
        index, weight, routing, counted = one.index, one.weight, one.routing, one.counted
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
        self.first += float(effect.sum())
        self.squares += float(effect.square().sum())


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
