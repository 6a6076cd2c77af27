"""Every causal language model family of transformers with dispatched experts keeps the contract.

One row per family, on a tiny random model of its own configuration class. What the library
promises for Mixtral must hold wherever the experts dispatch is, without code for any family.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import logits, watched
from dispatch_contract import DTYPES, NO_FLOAT16, DispatchContract, Tiny, check_keep_all

from families import (
    EXPERTS,
    FAST,
    FIXED_TOP_K,
    UNSERVED,
    find_families,
    find_modules,
    tiny_model,
)
from var_moe.models.moe_layers import RouterLogits

ENTROPY_UNKNOWN = {
    "phimoe": "sparsemixer normalises each choice over other experts: no one score fits both",
}


def rows() -> list[Any]:
    """The families as parameters: slow outside of the fast subset, skipped where unserved."""
    found = []
    for family in find_families():
        marks = [] if family.module in FAST else [pytest.mark.slow]
        if family.module in UNSERVED:
            marks.append(pytest.mark.skip(reason=UNSERVED[family.module]))
        found.append(pytest.param(family, id=family.module, marks=marks))
    return found


@pytest.fixture(scope="module", params=rows())
def tiny(request):
    return Tiny(request.param, tiny_model(request.param), request.param.top_k)


def test_nearly_all_families_are_served():
    """A family that drops out must be named with its reason, and there may not be many."""
    names = {family.module for family in find_families()}
    assert len(find_modules()) > len(names) >= 50
    assert set(UNSERVED) <= names
    assert len(UNSERVED) == 0
    assert set(NO_FLOAT16) == {"deepseek_v4"}
    assert names >= FAST | set(FIXED_TOP_K)


class TestFamilies(DispatchContract):
    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
    @pytest.mark.parametrize("name", ["grouped_mm", "fused"])
    def test_keep_all_through_another_backend(self, tiny, dtype, name):
        check_keep_all(tiny, dtype, name)

    def test_entropy_is_that_of_the_routers_own_weights(self, tiny, record_property):
        """With K = E the weights show every expert's share; K must not change what is read of it.

        Only the first MoE layer sees the same input with any K.
        """
        if tiny.family.module in FIXED_TOP_K:
            pytest.skip(FIXED_TOP_K[tiny.family.module][1])
        if tiny.family.module in ENTROPY_UNKNOWN:
            pytest.skip(ENTROPY_UNKNOWN[tiny.family.module])
        free = {"top_k": EXPERTS, **tiny.family.ungrouped}
        everything = tiny_model(tiny.family, **free)
        with watched(everything) as calls:
            logits(everything, tiny.ids)
        weight = calls[0].weight.double()
        shares = weight / weight.sum(1, keepdim=True)
        expected = torch.special.entr(shares).sum(1)
        with watched(tiny.model) as calls, RouterLogits(tiny.model, tiny.layers) as router:
            logits(tiny.model, tiny.ids)
            got = router.entropy(0, calls[0].index, calls[0].weight)
        record_property("score", router._scores[0].__name__.strip("_"))
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-4)
