"""What the modules with the shared suite have in common."""

import pytest

# Failures inside the suite are explained as in a test module.
pytest.register_assert_rewrite("contract", "seam_contract")


@pytest.fixture(scope="module")
def backend():
    """Who executes the pairs, unless a module says otherwise."""
    return "sorted"
