"""What the modules with the shared suite have in common."""

import pytest
import torch

from var_moe.models.moe_layers import experts_modules

# Failures inside the suite are explained as in a test module.
pytest.register_assert_rewrite("contract", "dispatch_contract", "made_experts")


@pytest.fixture(scope="module")
def backend():
    """Who executes the pairs, unless a module says otherwise."""
    return "sorted"


@pytest.fixture
def module(make_tiny_mixtral):
    return experts_modules(make_tiny_mixtral(top_k=2))[0][1]


@pytest.fixture
def pairs(module):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(30, module.gate_up_proj.shape[2], generator=generator)
    index = torch.rand(30, module.num_experts, generator=generator).argsort(dim=1)[:, :2]
    index[::3, 1] = -1
    index[7] = -1  # a token without any expert
    index[index == 1] = 0  # an expert without any token; also a token with one expert twice
    return hidden, index
