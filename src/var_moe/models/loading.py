"""Loading a model: the bundled demo, a local folder, or a Hub id, checked before it is loaded."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from var_moe.errors import UsageError, VarMoeError
from var_moe.models import checks
from var_moe.models.hub import cache_only, cached_revision, one_line
from var_moe.storage import sha256_of

DEMO_FOLDER = Path(__file__).resolve().parents[1] / "demo" / "model"
LONGEST_WINDOW = 1024

# Where the families' configurations say how many experts run per token.
TOP_K_FIELDS = (
    *("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk"),
    *("top_k", "moe_k"),
)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A causal language model with its tokenizer, and what identifies them.

    ``top_k`` is K and ``num_experts`` E of the design; ``moe_layers`` is L. ``window`` is the
    longest row that text is scored in: the model's context, at most 1,024. ``revision`` is the
    commit of a Hub model, None for a local one.
    """

    model: Any
    tokenizer: Any
    name: str
    revision: str | None = None
    tokenizer_hash: str = ""
    top_k: int = 0
    num_experts: int = 0
    moe_layers: int = 0
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
    def of(
        cls, model: Any, tokenizer: Any, *, name: str | None = None, revision: str | None = None
    ) -> LoadedModel:
        """Wrap a model that is loaded already.

        Raises:
            UsageError: it is no Mixture-of-Experts model that goes through the experts seam.
        """
        from var_moe.models.seam import experts_modules

        config = model.config.get_text_config()
        label = str(name or getattr(model, "name_or_path", "") or type(model).__name__)
        checks.check_moe(f"model {label!r} (type {model.config.model_type!r})", model)
        experts = [module for _, module in experts_modules(model)]
        context = getattr(config, "max_position_embeddings", None) or LONGEST_WINDOW
        return cls(
            model=model.eval(),
            tokenizer=tokenizer,
            name=label,
            revision=revision,
            tokenizer_hash=tokenizer_hash(tokenizer),
            top_k=top_k_of(config, label),
            num_experts=int(getattr(experts[0], "num_experts", 0)),
            moe_layers=len(experts),
            window=min(int(context), LONGEST_WINDOW),
        )


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash over the vocabulary with its ids, and the special tokens.

    Those as a set: giving a tokenizer its end token as padding does not make it another one.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    special = sorted({str(token) for token in tokenizer.all_special_tokens})
    tokens = (f"{index}:{token}" for token, index in vocabulary)
    return sha256_of([*tokens, *(f"special:{token}" for token in special)])


def top_k_of(config: Any, name: str) -> int:
    """K of a model's text configuration; ``name`` is for the message.

    Raises:
        UsageError: no field of `TOP_K_FIELDS` says it.
    """
    for field in TOP_K_FIELDS:
        value = getattr(config, field, None)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, int) and value > 0:
            return value
    raise UsageError(
        f"model {name!r}: its configuration does not say how many experts run per token; "
        "extend TOP_K_FIELDS in var_moe/models/loading.py"
    )


def check_name(name: str) -> None:
    """Refuse a model that is not there, before anything heavy is imported.

    Raises:
        UsageError: no such folder, not a model folder, or a Hub id that is out of reach.
    """
    _locate(name)


def _locate(name: str) -> tuple[Path | None, bool]:
    """The model's folder, None for a Hub id; and whether only the local Hub cache serves."""
    folder = DEMO_FOLDER if name == "demo" else checks.local_folder(name)
    if folder is None:
        return None, cache_only("model", name, repo=name)
    checks.check_folder(name, folder)
    return folder, False


def load_model(
    name: str, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> LoadedModel:
    """Load a model and its tokenizer, ready for scoring.

    Args:
        name: ``demo``, a local folder, or a Hub id such as ``mistralai/Mixtral-8x7B-v0.1``.
        device: ``auto`` (``device_map="auto"`` for a Hub model and where there is a GPU, else
            the CPU), or a torch device such as ``cuda:0``.
        dtype: ``auto`` takes the model's own, except that the demo, stored as float16 to be
            small, computes in float32 on a CPU.
        trust_remote_code: run code that comes with the model.

    Raises:
        UsageError: the model is missing, out of reach, damaged, or none that VAR can serve.
        VarMoeError: loading failed for another reason, such as memory. Both in one line.
    """
    checks.check_dtype(dtype)
    # Asked before torch is imported: that takes longer than a refusal may.
    folder, cached = _locate(name)
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if folder is None:
        common["local_files_only"] = cached
    checks.check_device(device)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = name if folder is None else str(folder)
    downloading = folder is None and not cached
    options = _options(name, folder, device, dtype)
    with quiet(downloads=downloading):
        config = _attempt(name, AutoConfig.from_pretrained, where, **common)
        experts = checks.check_config(name, config, trust_remote_code=trust_remote_code)
        revision = None if folder is not None else cached_revision(name)
        if revision:
            common["revision"] = revision  # all parts of one commit, also while it is pushed to
        tokenizer = _attempt(name, AutoTokenizer.from_pretrained, where, **common)
        model, info = _attempt(
            name, AutoModelForCausalLM.from_pretrained, where, **common, **options
        )
        checks.check_weights(name, info)
        checks.check_experts(name, model, experts)
    if device != "auto" and "device_map" not in options:
        model = _attempt(name, model.to, device)
    model.requires_grad_(False)
    return LoadedModel.of(model, tokenizer, name=name, revision=revision)


def _options(name: str, folder: Path | None, device: str, dtype: str) -> dict[str, Any]:
    """What `from_pretrained` is told beside the name."""
    import torch

    gpu = device not in ("auto", "cpu") or (device == "auto" and torch.cuda.is_available())
    wanted: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
    if name == "demo" and dtype == "auto" and not gpu:
        wanted = torch.float32
    options: dict[str, Any] = {
        "dtype": wanted,
        "use_safetensors": True,
        "output_loading_info": True,
    }
    # A device map spares a copy in the CPU's memory; without accelerate there is none.
    if (gpu or (folder is None and device == "auto")) and importlib.util.find_spec("accelerate"):
        options["device_map"] = device
    return options


def _attempt(name: str, load: Callable[..., Any], where: str, **options: Any) -> Any:
    """Call a loader of transformers; what it raises becomes one line."""
    from safetensors import SafetensorError

    try:
        return load(where, **options)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        if not options.get("trust_remote_code") and "trust_remote_code" in str(error):
            raise UsageError(
                f"model {name!r}: needs code of its own; read it, then allow it with "
                "--trust-remote-code (trust_remote_code=True)"
            ) from None
        raise UsageError(f"model {name!r}: cannot be loaded ({one_line(error)})") from error
    except Exception as error:
        raise VarMoeError(f"model {name!r}: cannot be loaded ({one_line(error)})") from error


@contextlib.contextmanager
def quiet(*, downloads: bool = False) -> Iterator[None]:
    """Silence transformers' bars and warnings, unless its verbosity asks for debugging.

    Args:
        downloads: let the Hub's download bars show: gigabytes deserve them.
    """
    import logging as levels

    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from transformers.utils import logging

    level = logging.get_verbosity()
    if level <= levels.DEBUG:
        yield
        return
    bars, hub_bars = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # the Hub's as well
    if downloads and hub_bars:
        enable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()
        else:
            disable_progress_bars()
