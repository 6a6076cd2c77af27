"""Finding the best configuration: search spaces, methods, results.

Names are imported when first used, so that none of them costs more than it needs.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "SEARCH_SPACE": "methods",
    "grid_size": "search_space",
    "parse_bounds": "search_space",
    "Evaluation": "results",
    "OptimizationResult": "results",
    "RichObjective": "worker",
    "documented_score": "results",
    "bayesian_optimization": "methods",
    "grid_search": "methods",
    "random_search": "methods",
    "save_optimization_results": "results",
    "create_objective_function": "objective",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
