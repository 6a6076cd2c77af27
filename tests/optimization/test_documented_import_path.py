import subprocess
import sys
from types import FunctionType

import pytest

import var_moe.optimization as package


@pytest.mark.slow
def test_the_documented_names_without_a_model():
    code = (
        "from optimization.hyperparameter_optimization import (\n"
        "    SEARCH_SPACE, bayesian_optimization, grid_search, save_optimization_results)\n"
        "import sys\n"
        "grid_search(objective_fn=lambda p: 1.0, search_space=SEARCH_SPACE, n_points_per_dim=1,\n"
        "            verbose=False)\n"
        "print(sorted({'torch', 'transformers', 'skopt'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "[]\n", done.stderr


def test_a_name_that_is_not_there():
    with pytest.raises(ImportError, match="cannot import name 'create_objectives'"):
        from optimization.hyperparameter_optimization import create_objectives  # noqa: F401


def test_no_public_name_hides_a_module():
    """A module of the same name would replace the function once it is imported."""
    assert not set(package._PUBLIC) & set(package._PUBLIC.values())
    for name in ("bayesian_optimization", "grid_search", "random_search"):
        assert isinstance(getattr(package, name), FunctionType)
