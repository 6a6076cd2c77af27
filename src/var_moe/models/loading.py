"""Loading a model: the bundled demo, a local folder, or a Hub id, checked before it is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from var_moe.errors import UsageError, VarMoeError
from var_moe.storage import sha256_of

DEMO_FOLDER = Path(__file__).resolve().parents[1] / "demo" / "model"
DTYPES = ("auto", "float32", "bfloat16", "float16")
LONGEST_WINDOW = 1024


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A causal language model with its tokenizer, and what identifies them.

    ``window`` is the longest row that text is scored in: the model's context, at most 1,024.
    """

    model: Any
    tokenizer: Any
    name: str
    revision: str | None = None
    tokenizer_hash: str = ""
    top_k: int = 0
    window: int = LONGEST_WINDOW

    @property
    def device(self) -> Any:
        """Where the inputs go."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> str:
        """The dtype of the weights, e.g. ``float32``."""
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    @classmethod
    def of(cls, model: Any, tokenizer: Any, *, name: str | None = None) -> LoadedModel:
        """Wrap a model that is loaded already.

        Raises:
            UsageError: it is no Mixture-of-Experts model that goes through the experts seam.
        """
        from var_moe.models.seam import experts_modules

        config = model.config.get_text_config()
        label = name or getattr(model, "name_or_path", "") or type(model).__name__
        if not experts_modules(model):
            raise UsageError(
                f"model {label!r} (type {model.config.model_type!r}) is not a Mixture of Experts "
                "that transformers dispatches; expected one such as Mixtral, OLMoE, Qwen3-MoE"
            )
        context = getattr(config, "max_position_embeddings", None) or LONGEST_WINDOW
        return cls(
            model=model.eval(),
            tokenizer=tokenizer,
            name=str(label),
            revision=getattr(config, "_commit_hash", None),
            tokenizer_hash=tokenizer_hash(tokenizer),
            top_k=_top_k(config, str(label)),
            window=min(int(context), LONGEST_WINDOW),
        )


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash over the vocabulary with its ids."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return sha256_of(f"{index}:{token}" for token, index in vocabulary)


def _top_k(config: Any, name: str) -> int:
    for field in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k", "moe_k"):
        value = getattr(config, field, None)
        if isinstance(value, int) and value > 0:
            return value
        if isinstance(value, list) and value:
            return int(value[0])
    raise UsageError(f"model {name!r}: its config does not say how many experts run per token")


def load_model(
    name: str, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> LoadedModel:
    """Load a model and its tokenizer, ready for scoring.

    Args:
        name: ``demo``, a local folder, or a Hub id such as ``mistralai/Mixtral-8x7B-v0.1``.
        device: ``auto`` (``device_map="auto"`` where there is a GPU, else the CPU), or a torch
            device such as ``cuda:0``.
        dtype: ``auto`` takes the model's own, except float32 for half-precision on a CPU demo.
        trust_remote_code: run code that comes with a Hub model.

    Raises:
        UsageError: the model is missing, out of reach, or no MoE; in one line.
        VarMoeError: loading failed.
    """
    _check_choices(device, dtype)
    where = str(DEMO_FOLDER) if name == "demo" else str(Path(name).expanduser())
    if name != "demo" and not Path(where).is_dir():
        where = _hub_id(name)
    else:
        _check_folder(name, Path(where))
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = _attempt(name, AutoConfig.from_pretrained, where, trust_remote_code=trust_remote_code)
    _check_config(name, config, trust_remote_code)
    wanted: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
    if name == "demo" and dtype == "auto":
        wanted = torch.float32  # stored as float16 to be small; a CPU computes in float32
    options: dict[str, Any] = {
        "dtype": wanted,
        "use_safetensors": True,
        "trust_remote_code": trust_remote_code,
    }
    if device == "auto" and torch.cuda.is_available():
        options["device_map"] = "auto"
    tokenizer = _attempt(
        name, AutoTokenizer.from_pretrained, where, trust_remote_code=trust_remote_code
    )
    model = _attempt(name, AutoModelForCausalLM.from_pretrained, where, **options)
    if device not in ("auto", "cpu"):
        model = model.to(device)
    model.requires_grad_(False)
    return LoadedModel.of(model, tokenizer, name=name)


def _check_choices(device: str, dtype: str) -> None:
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if device in ("auto", "cpu"):
        return
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UsageError(f"device {device!r}: expected auto, cpu, cuda, cuda:0, ...") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {device!r}: no CUDA device here; use --device cpu")


def _check_folder(name: str, folder: Path) -> None:
    """A local folder must hold a config and weights, before anything is loaded."""
    config = folder / "config.json"
    if not config.is_file():
        raise UsageError(f"model {name!r}: no config.json in the folder; expected a model folder")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UsageError(f"model {name!r}: {config.name} is not valid JSON") from None
    if not any(folder.glob("*.safetensors")):
        raise UsageError(
            f"model {name!r}: no .safetensors weights in the folder; convert the model first"
        )


def _hub_id(name: str) -> str:
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise UsageError(f"model {name!r}: no such folder; expected a model folder or a Hub id")
    from var_moe.hub import require_reachable

    require_reachable("model", name, repo=name)
    return name


def _check_config(name: str, config: Any, trust_remote_code: bool) -> None:
    """Refuse what is no MoE from its config alone: built without weights, on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    from var_moe.models.seam import experts_modules

    quantization = getattr(config, "quantization_config", None) or {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method and "fp8" in str(method):
        raise UsageError(f"model {name!r}: FP8 experts do not go through the seam; use bfloat16")
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UsageError(
            f"model {name!r} (type {config.model_type!r}): no causal language model ({first})"
        ) from None
    if not experts_modules(empty):
        raise UsageError(
            f"model {name!r} (type {config.model_type!r}) is not a Mixture of Experts that "
            "transformers dispatches; expected one such as Mixtral, OLMoE, Qwen3-MoE"
        )


def _attempt(name: str, load: Any, where: str, **options: Any) -> Any:
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return load(where, **options)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise VarMoeError(f"model {name!r}: cannot be loaded ({first})") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
