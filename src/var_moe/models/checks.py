"""What is refused before a model is loaded: each in one line that says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from var_moe.errors import UsageError
from var_moe.models.hub import one_line

DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model"),
    *("vocab.json", "vocab.txt", "tekken.json"),
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
        kind = torch.device(device).type
    except RuntimeError:
        kind = "meta"
    if kind == "meta":
        raise UsageError(f"device {device!r}: expected auto, cpu, cuda, cuda:0, ...")
    try:
        torch.empty(1, device=device)
    except Exception:
        name = "CUDA" if kind == "cuda" else kind
        raise UsageError(f"device {device!r}: no such {name} device here; use cpu") from None


def local_folder(name: str) -> Path | None:
    """The local folder that a name means, or None where it can only be a Hub id.

    Raises:
        UsageError: it is written like a path, and no folder is there.
    """
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if path.is_file():
        raise UsageError(f"model {name!r}: is a file; expected the model's folder or a Hub id")
    if not name or name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise UsageError(f"model {name!r}: no such folder; expected a model folder or a Hub id")
    return None


def check_folder(name: str, folder: Path) -> None:
    """Refuse a folder without a configuration, whole safetensors weights, or a tokenizer."""
    config = _read(name, folder / "config.json")
    if config is None:
        raise UsageError(f"model {name!r}: no config.json in the folder; expected a model folder")
    if not isinstance(config.get("model_type"), str) and "auto_map" not in config:
        raise UsageError(f"model {name!r}: its config.json names no model_type")
    if not (folder / WEIGHTS).is_file():
        _check_shards(name, folder, config)
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise UsageError(
            f"model {name!r}: no tokenizer in the folder; save the model's own beside its weights"
        )


def _check_shards(name: str, folder: Path, config: dict[str, Any]) -> None:
    index = _read(name, folder / INDEX)
    explicit = config.get("transformers_weights")  # the configuration may name another file
    if index is not None:
        shards = sorted(set(index.get("weight_map", {}).values()))
    elif isinstance(explicit, str):
        shards = [explicit]
    else:
        raise UsageError(
            f"model {name!r}: no {WEIGHTS} weights in the folder; convert the model to safetensors"
        )
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise UsageError(
            f"model {name!r}: {len(missing)} of its {len(shards)} weight files missing "
            f"({missing[0]}, ...); download the rest"
        )


def _read(name: str, path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError):
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"model {name!r}: {path.name} is not a valid JSON object")
    return found


def check_config(name: str, config: Any, *, trust_remote_code: bool) -> int:
    """Refuse what VAR can't serve from its configuration: built without weights.

    Returns:
        The number of experts modules, for `check_experts` after loading.

    Raises:
        UsageError: no causal language model, no MoE, FP8 experts, or a fixed experts backend.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from var_moe.models.seam import REFUSED_BACKENDS, experts_modules

    label = f"model {name!r} (type {config.model_type!r})"
    method = quantization(config)
    if method and "fp8" in method:
        raise UsageError(f"{label}: {method} experts are not served; use its bfloat16 weights")
    for part in (config, config.get_text_config()):
        backend = getattr(part, "_experts_implementation", None)
        if backend in REFUSED_BACKENDS:
            raise UsageError(
                f"{label}: its experts backend {backend!r} is fixed when the model is loaded; take "
                "experts_implementation out of its config.json"
            )
    if not _is_causal(config):
        raise UsageError(f"{label}: no causal language model; expected one such as Mixtral")
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UsageError(f"{label}: cannot be built ({one_line(error)})") from None
    check_moe(label, empty)
    return len(experts_modules(empty))


def _is_causal(config: Any) -> bool:
    """Whether transformers, or the model's own code, has a causal language model of this type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return True
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(
        config, "is_encoder_decoder", False
    )


def check_moe(label: str, model: Any) -> None:
    """Refuse a model whose experts transformers does not dispatch."""
    from var_moe.models.seam import experts_modules

    if not experts_modules(model):
        raise UsageError(
            f"{label} is not a Mixture of Experts that transformers dispatches; expected one such "
            "as Mixtral, OLMoE, Qwen3-MoE"
        )


def check_experts(name: str, model: Any, expected: int) -> None:
    """Refuse a model whose experts became others in loading, as quantisation makes them."""
    from var_moe.models.seam import experts_modules

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
            f"model {name!r}: {what} do not go through the seam, for {method}; "
            "use its bfloat16 weights"
        )


def quantization(config: Any) -> str | None:
    """The quantisation method that a configuration names."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    return str(getattr(method, "value", method)).lower()


def check_weights(name: str, info: dict[str, Any]) -> None:
    """Refuse weights that leave a part of the model random: transformers only warns."""
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise UsageError(
            f"model {name!r}: its weights lack {len(missing)} tensors ({missing[0]}, ...); "
            "expected those of the whole causal language model"
        )
