"""Libraries that var_moe works without, each with the extra that installs it."""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

from var_moe.errors import UsageError


class Optional(NamedTuple):
    """A library as pip knows it, the extra of var_moe that installs it, and what needs it."""

    package: str
    extra: str
    purpose: str

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"pip install 'var-moe[{self.extra}]'"


OPTIONAL = {
    "plotly": Optional("plotly", "report", "a report"),
    "skopt": Optional("scikit-optimize", "skopt", "tune --engine skopt"),
    "kaleido": Optional("kaleido", "figures", "report --figures"),
    "peft": Optional("peft", "adapters", "a model with an adapter beside it"),
    "lm_eval": Optional("lm_eval", "eval", "var-moe lm-eval"),
}
"""By the name that is imported."""


def require(module: str) -> None:
    """Import an optional library, or a module of it.

    Raises:
        UsageError: it is not installed, or broken; says how to install it.
    """
    name = module.partition(".")[0]
    wanted = OPTIONAL[name]
    try:
        import_module(module)
    except Exception as error:  # an old release breaks on a new numpy in many ways
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        line = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(
            f"{wanted.purpose} needs {wanted.package}"
            + ("" if missing else f", which cannot be imported ({line})")
            + f": {wanted.install}"
        ) from None
