"""var_moe: Verifiable Adaptive Routing for Mixture-of-Experts language models.

Names are imported when first used, so that ``import var_moe`` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors see; `_PLACES` is what runs
    from var_moe.calibration.collect import collect_profile
    from var_moe.calibration.profile import RoutingProfile
    from var_moe.certification.certify import certify
    from var_moe.certification.exporting import export
    from var_moe.config import PRESETS, VARConfig
    from var_moe.data.text import load_text
    from var_moe.errors import UsageError, VarMoeError
    from var_moe.evaluation.evaluator import Evaluator
    from var_moe.evaluation.guarding import calibrate_guard
    from var_moe.evaluation.perplexity import perplexity
    from var_moe.execution.session import routed
    from var_moe.models.loading import load_model
    from var_moe.optimization.candidate import load_candidate
    from var_moe.optimization.run import tune
    from var_moe.routing.damage import DamagePolicy
    from var_moe.routing.guard import Guard
    from var_moe.routing.registry import make_policy
    from var_moe.routing.var import VARPolicy
    from var_moe.serving.folder import load_exported
    from var_moe.tracing.record import record_trace
    from var_moe.tracing.replay import TraceReplay
    from var_moe.tracing.trace import RoutingTrace

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "DamagePolicy",
    "Evaluator",
    "Guard",
    "RoutingProfile",
    "RoutingTrace",
    "TraceReplay",
    "UsageError",
    "VARConfig",
    "VARPolicy",
    "VarMoeError",
    "calibrate_guard",
    "certify",
    "collect_profile",
    "export",
    "load_candidate",
    "load_exported",
    "load_model",
    "load_text",
    "make_policy",
    "perplexity",
    "record_trace",
    "routed",
    "tune",
]

_PLACES = {
    "PRESETS": "config",
    "DamagePolicy": "routing.damage",
    "Evaluator": "evaluation.evaluator",
    "Guard": "routing.guard",
    "RoutingProfile": "calibration.profile",
    "RoutingTrace": "tracing.trace",
    "TraceReplay": "tracing.replay",
    "UsageError": "errors",
    "VARConfig": "config",
    "VARPolicy": "routing.var",
    "VarMoeError": "errors",
    "calibrate_guard": "evaluation.guarding",
    "certify": "certification.certify",
    "collect_profile": "calibration.collect",
    "export": "certification.exporting",
    "load_candidate": "optimization.candidate",
    "load_exported": "serving.folder",
    "load_model": "models.loading",
    "load_text": "data.text",
    "make_policy": "routing.registry",
    "perplexity": "evaluation.perplexity",
    "record_trace": "tracing.record",
    "routed": "execution.session",
    "tune": "optimization.run",
}

if not TYPE_CHECKING:  # else a misspelt name would pass as Any

    def __getattr__(name: str) -> Any:
        if name in _PLACES:
            return getattr(importlib.import_module(f"var_moe.{_PLACES[name]}"), name)
        raise AttributeError(f"module 'var_moe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
