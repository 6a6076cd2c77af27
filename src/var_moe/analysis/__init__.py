"""Where a forward's time goes, how it scales, what bounds it, and what the cost model says of it.

Names are imported when first used, so that none of them costs more than it needs.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "GPUProfiler": "profiler",
    "PerformanceModel": "performance",
    "TierDistribution": "performance",
    "profile_full_pipeline": "systems",
    "profile_components": "components",
    "analyse": "systems",
    "AnalysisSettings": "systems",
    "SystemsAnalysis": "systems",
    "analyse_routing": "routing",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
