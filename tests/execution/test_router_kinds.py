"""Each kind of router once with K = 8: the contract, and that the kind is what it is said to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from contract import Call, logits, watched
from dispatch_contract import DispatchContract, Tiny
from torch import Tensor

from families import find_families, tiny_model

TOP_K, KIND_EXPERTS = 8, 32


@dataclass(frozen=True)
class Kind:
    """A kind of router, a family that has it, and how its decisions show it."""

    name: str
    module: str
    shows: Callable[[Tensor, Call], Any]  # (T, E) logits and the call with the decision
    changes: dict[str, Any] = field(default_factory=dict)


def softmax_of_the_logits(scores: Tensor, call: Call) -> bool:
    shares = scores.softmax(1).gather(1, call.index)
    return torch.allclose(shares / shares.sum(1, keepdim=True), call.weight, atol=1e-6)


def choice_is_not_the_largest_score(scores: Tensor, call: Call) -> bool:
    weight = scores.sigmoid().gather(1, call.index)
    weight = weight / weight.sum(1, keepdim=True)
    plain = scores.topk(TOP_K, dim=1).indices.sort(1).values
    same = (plain == call.index.sort(1).values).all(1)
    return torch.allclose(weight, call.weight, atol=1e-6) and 0 < int(same.sum()) < len(same)


def weights_are_not_descending(_scores: Tensor, call: Call) -> bool:
    return not torch.equal(call.weight, call.weight.sort(dim=1, descending=True).values)


def at_most_two_groups_of_four(scores: Tensor, call: Call) -> bool:
    group = call.index // (KIND_EXPERTS // 4)
    plain = scores.topk(TOP_K, dim=1).indices // (KIND_EXPERTS // 4)
    return groups(group) <= 2 < groups(plain)


def groups(group: Tensor) -> int:
    """The largest number of different groups that a token's experts are in."""
    return max(len(set(row)) for row in group.tolist())


def sums_below_one(_scores: Tensor, call: Call) -> bool:
    total = call.weight.sum(1)
    return bool((total < 1).all()) and float(total.std()) > 0


def sums_are_the_factor(_scores: Tensor, call: Call) -> bool:
    return torch.allclose(call.weight.sum(1), torch.tensor(2.5), atol=1e-5)


KINDS = [
    Kind("softmax", "mixtral", softmax_of_the_logits),
    Kind("sigmoid with correction bias", "minimax_m2", choice_is_not_the_largest_score),
    Kind("unsorted", "hy_v3", weights_are_not_descending),
    Kind("grouped", "deepseek_v3", at_most_two_groups_of_four),
    Kind("not normalised", "olmoe", sums_below_one, {"norm_topk_prob": False}),
    Kind("scaled", "glm4_moe", sums_are_the_factor, {"routed_scaling_factor": 2.5}),
]
FAMILY = {family.module: family for family in find_families()}


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name.replace(" ", "-"))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def tiny(kind):
    family = FAMILY[kind.module]
    model = tiny_model(family, top_k=TOP_K, experts=KIND_EXPERTS, **kind.changes)
    return Tiny(family, model, TOP_K, KIND_EXPERTS)


@pytest.mark.slow
class TestRouterKinds(DispatchContract):
    def test_the_router_is_of_its_kind(self, kind, tiny):
        with watched(tiny.model) as calls:
            logits(tiny.model, tiny.ids, "grouped_mm")
        for call in calls:
            router = tiny.model.get_submodule(call.name.rpartition(".")[0] + ".gate")
            assert kind.shows((call.hidden @ router.weight.T).float(), call)
