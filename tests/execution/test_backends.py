"""The contract with each other backend as the one that executes the pairs."""

from __future__ import annotations

import pytest
from dispatch_contract import DispatchContract, Tiny

from families import find_families, tiny_model

BACKENDS = ("eager", "batched_mm", "grouped_mm", "packed", "fused", "grouped")
MODULES = ("mixtral", "olmoe", "qwen3_moe", "gpt_oss", "deepseek_v3")
FAMILY = {family.module: family for family in find_families()}


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(scope="module", params=MODULES)
def tiny(request):
    family = FAMILY[request.param]
    return Tiny(family, tiny_model(family), family.top_k)


@pytest.mark.slow
class TestBackends(DispatchContract):
    """Nothing more than the suite."""
