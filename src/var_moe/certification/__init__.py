"""Certificates: statements about a configuration with an error rate that a sceptic can check.

Names are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "CertifySettings": "settings",
    "NotCertifiedError": "certify",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
