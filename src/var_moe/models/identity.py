"""Which model something was made with, and whether it is the one at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from var_moe.errors import UsageError
from var_moe.models.router_hooks import router_fingerprint
from var_moe.models.seam import experts_modules

if TYPE_CHECKING:
    from var_moe.models.loading import LoadedModel

FINGERPRINT_TOLERANCE = 0.005  # a dtype's rounding stays far below, another training far above

# What two models must have in common, by its name in a head, and what it is called.
_SHAPE = {
    "tokenizer_hash": "tokenizer",
    "layers": "number of MoE layers",
    "experts": "number of experts",
    "top_k": "top-k",
}


def identity(loaded: LoadedModel) -> dict[str, Any]:
    """What a file's head says of its model: name, revision, tokenizer, sizes and routers."""
    return {
        "model": loaded.name,
        "revision": loaded.revision,
        "tokenizer_hash": loaded.tokenizer_hash,
        **_shape(loaded.model, loaded.top_k),
    }


def identity_of_model(model: Any) -> dict[str, Any]:
    """The same of a `LoadedModel`, or as far as a bare transformers model tells it."""
    from var_moe.models.checks import top_k_of
    from var_moe.models.loading import LoadedModel

    if isinstance(model, LoadedModel):
        return identity(model)
    name = str(getattr(model, "name_or_path", "") or type(model).__name__)
    return {"model": name, **_shape(model, top_k_of(model.config.get_text_config(), name))}


def _shape(model: Any, top_k: int) -> dict[str, Any]:
    modules = experts_modules(model)
    return {
        "routers": router_fingerprint(model),
        "layers": len(modules),
        "experts": int(getattr(modules[0][1], "num_experts", 0)) if modules else 0,
        "top_k": top_k,
    }


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """In which way two heads are not of one model, in words; None where they are.

    Names may differ: a folder and a Hub id can hold the same model.
    """
    for field, words in _SHAPE.items():
        if one[field] != other[field]:
            return f"another {words}"
    mine, theirs = one.get("routers", []), other.get("routers", [])
    comparable = len(mine) == len(theirs) > 0
    if comparable and not np.allclose(mine, theirs, rtol=FINGERPRINT_TOLERANCE):
        return "the routers have other weights"
    return None


def check_fits(what: str, head: Mapping[str, Any], loaded: LoadedModel) -> None:
    """Refuse a ``what`` ("profile", "trace") that another model made.

    Raises:
        UsageError: names the model of the head and the one at hand.
    """
    fault = difference(head, identity(loaded))
    if fault:
        raise UsageError(
            f"{what} of model {head['model']!r} does not fit model {loaded.name!r}: {fault}; "
            f"make one with `var-moe {what} --model {loaded.name}`"
        )
