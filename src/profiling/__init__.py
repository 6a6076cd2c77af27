"""The documented import path of the systems analysis; everything lives in var_moe.analysis.

Python 3.15 has a standard module named ``profiling``. Where both are found the standard one may
come first; `var_moe.analysis` is the real place and works everywhere.
"""

from __future__ import annotations

from typing import Any

__all__ = ["GPUProfiler", "PerformanceModel", "profile_full_pipeline"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from var_moe import analysis

        return getattr(analysis, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
