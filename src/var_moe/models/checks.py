"""What is refused before a model is loaded: each in one line that says what to do."""

from __future__ import annotations

import copy
from typing import Any

from var_moe.errors import UsageError, one_line

DTYPES = ("auto", "float32", "bfloat16", "float16")

# Where the families' configurations say how many experts run per token.
TOP_K_FIELDS = (
    *("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk"),
    *("top_k", "moe_k"),
)


def check_dtype(dtype: str) -> None:
    """Refuse an unknown dtype."""
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")


def check_device(device: str) -> None:
    """Refuse a device that is unknown or not there: the only sure way is to use it."""
    if device in ("auto", "cpu"):
        return
    import torch

    try:
        if not torch.empty(1, device=device).is_meta:
            return
    except Exception:  # of as many kinds as there are devices
        pass
    raise UsageError(
        f"device {device!r}: no such device here; expected auto, cpu, cuda, cuda:0, ..."
    )


def top_k_of(config: Any, name: str) -> int:
    """K of a model's text configuration; ``name`` is for the message.

    Raises:
        UsageError: no field of `TOP_K_FIELDS` says it, or not one whole number for all layers.
    """
    for field in TOP_K_FIELDS:
        value = getattr(config, field, None)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, int) and value > 0:
            return value
        if value is not None:
            raise UsageError(
                f"model {name!r}: its configuration has {field} = {value!r}; expected how many "
                "experts run per token, one number of at least 1 for all layers"
            )
    raise UsageError(
        f"model {name!r}: its configuration does not say how many experts run per token; "
        "extend TOP_K_FIELDS in var_moe/models/checks.py"
    )


def check_config(name: str, config: Any, *, trust_remote_code: bool) -> int:
    """Refuse what VAR can't serve from its configuration: built without weights.

    Returns:
        The number of experts modules, for `check_experts` after loading.

    Raises:
        UsageError: no causal language model, no MoE, FP8 experts, a fixed experts backend, or
            sizes that nothing can run.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    from var_moe.models.moe_layers import REFUSED_BACKENDS, experts_modules

    label = f"model {name!r} (type {config.model_type!r})"
    method = quantization(config)
    if method and "fp8" in method:
        raise UsageError(f"{label}: {method} experts are not served; use its bfloat16 weights")
    if method and not any(known.startswith(method) for known in AUTO_QUANTIZATION_CONFIG_MAPPING):
        raise UsageError(
            f"{label}: its quantization {method!r} is none that transformers here knows; use its "
            "bfloat16 weights"
        )
    for part in (config, config.get_text_config()):
        backend = getattr(part, "_experts_implementation", None)
        if backend in REFUSED_BACKENDS:
            raise UsageError(
                f"{label}: its experts backend {backend!r} is fixed when the model is loaded; take "
                "experts_implementation out of its config.json"
            )
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not own_code and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(f"{label}: no causal language model; expected one such as Mixtral")
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=torch.float32, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        what = f"{type(error).__name__}: {one_line(error)}"
        raise UsageError(f"{label}: cannot be built from its config.json ({what})") from None
    check_moe(label, empty)
    check_top_k(name, empty)
    return len(experts_modules(empty))


def check_moe(label: str, model: Any) -> None:
    """Refuse a model whose experts transformers does not dispatch."""
    from var_moe.models.moe_layers import experts_modules

    if not experts_modules(model):
        raise UsageError(
            f"{label} is not a Mixture of Experts that transformers dispatches: no layer of it has "
            "such experts; expected a model such as Mixtral, OLMoE, Qwen3-MoE"
        )


def check_top_k(name: str, model: Any) -> int:
    """K of a model, after refusing a K or E that not all of its layers can have."""
    from var_moe.models.moe_layers import experts_modules

    top_k = top_k_of(model.config.get_text_config(), name)
    sizes = sorted({int(getattr(one, "num_experts", 0)) for _, one in experts_modules(model)})
    if len(sizes) > 1:
        raise UsageError(
            f"model {name!r}: its layers have {' and '.join(map(str, sizes))} experts; expected "
            "one number of experts for all"
        )
    if top_k > sizes[0]:
        raise UsageError(
            f"model {name!r}: its configuration asks for {top_k} experts per token of {sizes[0]}; "
            "expected at most as many as there are"
        )
    return top_k


def check_experts(name: str, model: Any, expected: int) -> None:
    """Refuse a model whose experts became others in loading, as quantisation makes them."""
    from var_moe.models.moe_layers import experts_modules

    found = experts_modules(model)
    odd = [
        f"{place} ({type(module).__name__})"
        for place, module in found
        if "FP8" in type(module).__name__.upper()
        or any("float8" in str(weight.dtype) for weight in module.parameters())
    ]
    if odd or len(found) != expected:
        what = odd[0] if odd else f"{expected - len(found)} of {expected} experts modules"
        method = quantization(model.config) or "the way it is stored"
        raise UsageError(
            f"model {name!r}: {what} do not go through the experts dispatch, for {method}; "
            "use its bfloat16 weights"
        )


def quantization(config: Any) -> str | None:
    """The quantisation method that a configuration names."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    return str(getattr(method, "value", method)).lower()


def check_droppable(name: str, top_k: int) -> None:
    """Refuse a model that leaves no choice, before anything is searched or fitted for it."""
    if top_k == 1:
        raise UsageError(
            f"model {name!r} runs one expert per token: there is nothing to drop, search or "
            "compensate; expected a model with a top-k of at least 2"
        )


def check_weights(name: str, info: dict[str, Any]) -> None:
    """Refuse weights that leave a part of the model random: transformers only warns."""
    missing, other = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    if other:
        tensor, stored, wanted = other[0]
        raise UsageError(
            f"model {name!r}: {len(other)} of its tensors have another shape than its config.json "
            f"gives them ({tensor}: {list(stored)}, expected {list(wanted)})"
        )
    if missing:
        raise UsageError(
            f"model {name!r}: its weights lack {len(missing)} tensors ({missing[0]}, ...); "
            "expected those of the whole causal language model"
        )


def check_numbers(name: str, model: Any) -> None:
    """Refuse weights that are no numbers, as a failed merge or a too narrow dtype leaves them."""
    import torch

    for tensor, weight in model.named_parameters():
        plain = type(weight.data) is torch.Tensor and weight.element_size() > 1  # not quantised
        if not (plain and weight.is_floating_point() and weight.numel()) or weight.is_meta:
            continue
        low, high = torch.aminmax(weight)
        # One that is no matrix may switch something off by an infinite bias.
        if low.isnan() or (weight.dim() > 1 and (low.isinf() or high.isinf())):
            raise UsageError(
                f"model {name!r}: {tensor} holds NaN or infinity in {weight.dtype}; the weights "
                "are damaged, or too large for this dtype (try --dtype bfloat16)"
            )
