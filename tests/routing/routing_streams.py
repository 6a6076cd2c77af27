"""Token streams for the routing tests: one description, run by `VARPolicy` and by the oracle."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from unittest import mock

import torch

from oracle import Decision, ReferenceRow, ReferenceVAR, RouterChoice, TableEntry
from var_moe.config import VARConfig
from var_moe.routing.arrays import NUMPY, TORCH
from var_moe.routing.decision import ForwardContext, Routing, Tier
from var_moe.routing.var import RoutingTable, VARPolicy

Table = dict[tuple[int, int], TableEntry]


@dataclass(frozen=True)
class Forward:
    """Rows of one batch, all of one width, and the router's choices layer by layer."""

    rows: Sequence[ReferenceRow]
    router: dict[int, list[RouterChoice]]


@dataclass
class Stream:
    """A configuration, a table and the forwards that run through them."""

    config: VARConfig
    layers: int
    vocabulary: int
    top_k: int
    table: Table = field(default_factory=dict)
    forwards: list[Forward] = field(default_factory=list)
    spare_prefix: int = 0  # ids of a prefix beyond those that the window needs


def dense_table(table: Table, layers: int, vocabulary: int, leading: int) -> RoutingTable:
    """The dictionary as tensors, first expert first, as a profile would give it."""
    count = torch.zeros((layers, vocabulary), dtype=torch.float64)
    entropy = torch.zeros((layers, vocabulary), dtype=torch.float64)
    index = torch.zeros((layers, vocabulary, leading), dtype=torch.int64)
    weight = torch.zeros((layers, vocabulary, leading))
    for (layer, token), (occurrences, nats, experts) in table.items():
        ordered = sorted(experts, key=lambda pair: (-pair[1], pair[0]))
        count[layer, token] = occurrences
        entropy[layer, token] = nats
        index[layer, token] = torch.tensor([expert for expert, _ in ordered])
        weight[layer, token] = torch.tensor([mean for _, mean in ordered])
    return RoutingTable(count=count, entropy=entropy, index=index, weight=weight)


def context_of(rows: Sequence[ReferenceRow], prefix_ids: int) -> ForwardContext:
    """The rows as tensors, with at most the last ``prefix_ids`` ids of each prefix."""
    prefixes = [list(row.prefix)[max(len(row.prefix) - prefix_ids, 0) :] for row in rows]
    longest = max(len(prefix) for prefix in prefixes)
    padded = [[-1] * (longest - len(prefix)) + prefix for prefix in prefixes]
    return ForwardContext(
        ids=torch.tensor([list(row.ids) for row in rows]),
        valid=torch.tensor([list(row.valid) for row in rows]),
        counted=torch.tensor([list(row.counted) for row in rows]),
        document=tuple(row.document for row in rows),
        prefix=torch.tensor(padded) if longest else None,
    )


def choices(router: Sequence[RouterChoice]) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's choices as (T, K) index and weight."""
    return (
        torch.tensor([list(experts) for experts, _ in router]),
        torch.tensor([list(weights) for _, weights in router]),
    )


def executed(routing: Routing) -> list[Decision]:
    """Every token of a Routing in the oracle's form."""
    rows = zip(routing.index.tolist(), routing.weight.tolist(), routing.tier.tolist(), strict=True)
    decisions = []
    for index, weight, tier in rows:
        kept = [(e, w) for e, w in zip(index, weight, strict=True) if e >= 0]
        assert len({expert for expert, _ in kept}) == len(kept)
        decisions.append((Tier(tier).name, dict(kept)))
    return decisions


LIBRARIES = {"numpy": (NUMPY,), "torch": (TORCH,), "both in turn": (NUMPY, TORCH)}
"""What decisions are worked out in: forward by forward, over and over."""


def assert_agrees(stream: Stream) -> list[str]:
    """Run the oracle and `VARPolicy`, in each library, and compare every decision.

    Returns the tiers met, in order.
    """
    tiers = [_tiers(stream, name) for name in LIBRARIES]
    assert all(other == tiers[0] for other in tiers)
    return tiers[0]


def _tiers(stream: Stream, libraries: str) -> list[str]:
    leading = (stream.top_k + 1) // 2
    policy = VARPolicy(
        replace(stream.config, residuals=False),
        dense_table(stream.table, stream.layers, stream.vocabulary, leading),
    )
    oracle = ReferenceVAR(stream.config, stream.table)
    prefix_ids = stream.config.context_window_size - 1 + stream.spare_prefix
    tiers = []
    in_turn = itertools.cycle(LIBRARIES[libraries])
    for number, (forward, ops) in enumerate(zip(stream.forwards, in_turn, strict=False)):
        context = context_of(forward.rows, prefix_ids)
        policy.begin(context)
        expected = oracle.forward(forward.rows, forward.router)
        for layer, router in forward.router.items():
            with mock.patch("var_moe.routing.var.operations", return_value=ops):
                decided = executed(policy.route(context, layer, *choices(router)))
            for token, (got, wanted) in enumerate(zip(decided, expected[layer], strict=True)):
                if wanted is None:
                    continue
                place = f"{libraries}, forward {number}, layer {layer}, token {token}"
                assert got[0] == wanted[0], place
                assert sorted(got[1]) == sorted(wanted[1]), place
                for expert, weight in wanted[1].items():
                    assert abs(got[1][expert] - weight) <= 1e-5 * weight, place
                tiers.append(got[0])
    return tiers
