"""var_moe: Verifiable Adaptive Routing for Mixture-of-Experts language models.

Names are imported when first used, so that ``import var_moe`` stays light.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "VARConfig": "var_moe.config",
    "PRESETS": "var_moe.config",
    "VarMoeError": "var_moe.errors",
    "UsageError": "var_moe.errors",
    "load_model": "var_moe.models.loading",
    "load_text": "var_moe.data.text",
    "routed": "var_moe.execution.session",
    "export": "var_moe.certification.exporting",
    "load_exported": "var_moe.serving.folder",
    "RoutingProfile": "var_moe.calibration.profile",
    "collect_profile": "var_moe.calibration.collect",
    "RoutingTrace": "var_moe.tracing.trace",
    "record_trace": "var_moe.tracing.record",
    "TraceReplay": "var_moe.tracing.replay",
    "VARPolicy": "var_moe.routing.var",
    "DamagePolicy": "var_moe.routing.damage",
    "make_policy": "var_moe.routing.registry",
    "load_candidate": "var_moe.optimization.candidate",
    "certify": "var_moe.certification.certify",
    "perplexity": "var_moe.evaluation.perplexity",
    "Evaluator": "var_moe.evaluation.compare",
    "Guard": "var_moe.routing.guard",
    "calibrate_guard": "var_moe.evaluation.guarding",
    "tune": "var_moe.optimization.run",
}

__all__ = sorted(_PUBLIC)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'var_moe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
