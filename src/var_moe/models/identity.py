"""Which model something was made with, and whether it is the one at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from var_moe.errors import UsageError
from var_moe.models.checks import top_k_of
from var_moe.models.loading import LoadedModel
from var_moe.models.moe_layers import experts_modules, router_fingerprint

FINGERPRINT_TOLERANCE = 0.005  # a dtype's rounding stays far below, another training far above
_SAMPLE = 4096  # entries of a weight
# How far the numbers of a weight may differ: where both were loaded in one dtype, by how an
# adapter's merging rounds; else by the dtypes' rounding.
SAME_DTYPE_TOLERANCE, OTHER_DTYPE_TOLERANCE = 0.001, 0.02

# What two models must have in common, by its name in a head, and what it is called.
_SHAPE = {
    "tokenizer_hash": "tokenizer",
    "layers": "number of MoE layers",
    "experts": "number of experts",
    "top_k": "top-k",
}


def identity(model: Any) -> dict[str, Any]:
    """What a file's head says of its model: name, revision, tokenizer, sizes and weights.

    Args:
        model: a `LoadedModel`; or a transformers model, of which revision and tokenizer are left
            out.
    """
    if isinstance(model, LoadedModel):
        about: dict[str, Any] = {
            "model": model.name,
            "revision": model.revision,
            "tokenizer_hash": model.tokenizer_hash,
        }
        model, top_k = model.model, model.top_k
    else:
        about = {"model": str(getattr(model, "name_or_path", "") or type(model).__name__)}
        top_k = top_k_of(model.config.get_text_config(), about["model"])
    modules = experts_modules(model)
    return {
        **about,
        "routers": router_fingerprint(model),
        "weights": weights_fingerprint(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "layers": len(modules),
        "experts": int(getattr(modules[0][1], "num_experts", 0)) if modules else 0,
        "top_k": top_k,
    }


def weights_fingerprint(model: Any) -> list[float]:
    """A number for each matrix: tells a fine-tuned model from the one that it was.

    It is a fixed sum of entries from all over the matrix, relative to their norm: a change of 1%
    moves it by about 0.01. What is offloaded or quantised is left out.
    """
    found = []
    for weight in model.parameters():
        plain = weight.is_floating_point() and weight.element_size() > 1
        if weight.dim() > 1 and plain and weight.numel() and weight.device.type != "meta":
            # An odd step goes through all columns.
            step = weight.numel() // _SAMPLE | 1
            part = weight.detach().reshape(-1)[::step].double().cpu()
            total = part @ torch.arange(len(part), dtype=torch.float64).cos()
            found.append(round(float(total / part.norm().clamp(min=1e-30)), 6))
    return found


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """In which way two heads are not of one model, in words; None where they are.

    Names may differ: a folder and a Hub id can hold the same model.
    """
    for field, words in _SHAPE.items():
        if one[field] != other[field]:
            return f"another {words}"
    if not _near(one, other, "routers", rtol=FINGERPRINT_TOLERANCE):
        return "the routers have other weights"
    alike = one.get("dtype") == other.get("dtype")
    tolerance = SAME_DTYPE_TOLERANCE if alike else OTHER_DTYPE_TOLERANCE
    if not _near(one, other, "weights", rtol=0, atol=tolerance):
        return "the routers are the same, other weights are not"
    return None


def _near(
    one: Mapping[str, Any],
    other: Mapping[str, Any],
    field: str,
    *,
    rtol: float,
    atol: float = 0.0,
) -> bool:
    """Whether two heads' numbers agree, as far as both have them."""
    mine, theirs = one.get(field, []), other.get(field, [])
    return len(mine) != len(theirs) or np.allclose(mine, theirs, rtol=rtol, atol=atol)


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
