"""The documented import path of the optimisation API; everything lives in var_moe.optimization.

`create_objective_function`, the one name that needs a model, is imported when first used.
"""

from __future__ import annotations

from typing import Any

from var_moe.config import SEARCH_SPACE
from var_moe.optimization.methods import bayesian_optimization, grid_search, random_search
from var_moe.optimization.results import Evaluation, OptimizationResult, save_optimization_results

__all__ = [
    "SEARCH_SPACE",
    "Evaluation",
    "OptimizationResult",
    "bayesian_optimization",
    "create_objective_function",  # noqa: F822  (from __getattr__)
    "grid_search",
    "random_search",
    "save_optimization_results",
]


def __getattr__(name: str) -> Any:
    if name == "create_objective_function":
        from var_moe import optimization

        return optimization.create_objective_function
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
