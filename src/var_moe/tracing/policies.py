"""Replaying any routing policy on a trace: its own code, fed with the recorded decisions."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from var_moe.evaluation.batching import Window, collate
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.counts import RoutingReport, TierCounts
from var_moe.routing.decision import TokenBatch

if TYPE_CHECKING:
    from var_moe.profiling.profile import RoutingProfile
    from var_moe.tracing.trace import RoutingTrace

_TOKENS_PER_CHUNK = 16_384  # padded


def replay_policy(
    trace: RoutingTrace, policy: RoutingPolicy, profile: RoutingProfile | None = None
) -> RoutingReport:
    """What ``policy`` decides, from empty caches, if that does not change later layers' inputs.

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
    counts = TierCounts(trace.layers)
    policy.reset()
    with torch.inference_mode():
        for batch, position in _chunks(trace, policy.context_window - 1):
            policy.begin(batch)
            counted = batch.counted.reshape(-1)
            for layer in range(trace.layers):
                index = trace.index[layer][position].long()
                routing = policy.route(layer, index, trace.weight[layer][position].float())
                counts.add(layer, routing, counted)
    policy.reset()
    return counts.report()


def _chunks(trace: RoutingTrace, prefix: int) -> Iterator[tuple[TokenBatch, Tensor]]:
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


def _chunk(rows: list[Window], first: list[int]) -> tuple[TokenBatch, Tensor]:
    batch = collate(rows)
    place = torch.arange(batch.ids.shape[1]) + torch.tensor(first)[:, None]
    return batch, torch.where(batch.valid, place, first[0]).reshape(-1)
