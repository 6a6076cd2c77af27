"""Loading a model: the bundled demo, a local folder, or a Hub id, checked before it is loaded."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from var_moe.errors import UsageError, VarMoeError, one_line
from var_moe.hub import cache_only, cached_folder
from var_moe.memory import memory_limit
from var_moe.models import checks, model_files
from var_moe.storage import sha256_of

DEMO_FOLDER = Path(__file__).resolve().parents[1] / "demo" / "model"
LONGEST_WINDOW = 1024
FLOAT32_SHARE = 0.5
"""Of the memory, at most so much is taken by a float16 model that computes in float32."""
_LOG = logging.getLogger(__name__)


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

    def generate(self, prompt: str, **options: Any) -> str:
        """Continue a text.

        Args:
            prompt: text to go on from, not empty.
            options: of transformers' ``generate``, such as ``max_new_tokens=40``.

        Returns:
            The new text alone, without special tokens.
        """
        if not isinstance(prompt, str) or not prompt:
            raise UsageError(f"generate: got {prompt!r:.80}, expected a text that is not empty")
        inputs = self.tokenizer(prompt, return_tensors="pt").to(self.device)
        ids = inputs["input_ids"]
        made = self.model.generate(ids, attention_mask=inputs["attention_mask"], **options)
        sequences = made if hasattr(made, "shape") else made.sequences
        return str(self.tokenizer.decode(sequences[0, ids.shape[1] :], skip_special_tokens=True))

    @classmethod
    def of(
        cls, model: Any, tokenizer: Any, *, name: str | None = None, revision: str | None = None
    ) -> LoadedModel:
        """Wrap a model that is loaded already.

        Raises:
            UsageError: it is no Mixture-of-Experts model that goes through the experts dispatch.
        """
        from var_moe.models.moe_layers import experts_modules

        if not hasattr(model, "config") or not hasattr(tokenizer, "get_vocab"):
            got = f"{type(model).__name__} and {type(tokenizer).__name__}"
            raise UsageError(
                f"LoadedModel.of(...): got {got}, expected a transformers model and its tokenizer"
            )
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
            top_k=checks.check_top_k(label, model),
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


def check_name(name: str) -> None:
    """Refuse a model that is not there, before anything heavy is imported.

    Raises:
        UsageError: no such folder, not a model folder, or a Hub id that is out of reach.
    """
    _locate(name)


def _locate(name: str) -> tuple[Path | None, bool]:
    """The model's folder, None for a Hub id; and whether only the local Hub cache serves."""
    folder = DEMO_FOLDER if name == "demo" else model_files.local_folder(name)
    if folder is not None:
        model_files.check_folder(name, folder)
        return folder, False
    cached = cache_only("model", name, repo=name)
    place = cached_folder(name) if cached else None
    if place is not None:
        model_files.check_folder(name, place)
    return None, cached


def load_model(
    name: str, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> LoadedModel:
    """Load a model and its tokenizer, ready for scoring.

    Args:
        name: ``demo``, a local folder, or a Hub id such as ``mistralai/Mixtral-8x7B-v0.1``.
        device: ``auto`` (``device_map="auto"`` for a Hub model and where there is a GPU, else
            the CPU), or a torch device such as ``cuda:0``.
        dtype: ``auto`` takes the model's own, except that a float16 one computes in float32 on a
            CPU, where float16 is slow; a warning says so, but for the demo's.
        trust_remote_code: run code that comes with the model.

    Raises:
        UsageError: the model is missing, out of reach, damaged, or none that VAR can serve.
        VarMoeError: loading failed for another reason, such as memory. Both in one line.
    """
    checks.check_dtype(dtype)
    # Asked before torch is imported: that takes longer than a refusal may.
    folder, cached = _locate(name)
    checks.check_device(device)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.peft_utils import find_adapter_config_file

    where = name if folder is None else str(folder)
    downloading = folder is None and not cached
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": cached}
    options = _options(name, folder, device, dtype)
    with quiet(downloads=downloading):
        adapter = _attempt(
            name, "adapter", find_adapter_config_file, where, local_files_only=not downloading
        )
        config = _attempt(name, "config.json", AutoConfig.from_pretrained, where, **common)
        experts = checks.check_config(name, config, trust_remote_code=trust_remote_code)
        found = cached_folder(name) if folder is None else None
        revision = found.name if found else None
        if revision:
            common["revision"] = revision  # all parts of one commit, also while it is pushed to
        common["config"] = config
        tokenizer = _attempt(name, "tokenizer", AutoTokenizer.from_pretrained, where, **common)
        load = AutoModelForCausalLM.from_pretrained
        model, info = _attempt(name, "weights", load, where, **common, **options)
        checks.check_weights(name, info)
        if adapter is not None:
            place = where if downloading else str(Path(adapter).parent)
            model = _attempt(name, "adapter", merged, place, model=model, revision=revision)
        checks.check_experts(name, model, experts)
        checks.check_numbers(name, model)
    if dtype == "auto" and device in ("auto", "cpu"):
        model = _without_float16(name, model)
    if device != "auto" and "device_map" not in options:
        model = _attempt(name, "weights", model.to, device)
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
        "ignore_mismatched_sizes": True,  # so that it says which they are: they are refused
        # An adapter would replace the model that lies beside it, or go in without being checked.
        "adapter_kwargs": {"subfolder": "no adapter", "local_files_only": True},
    }
    # A device map spares a copy in the CPU's memory; without accelerate there is none.
    if (gpu or (folder is None and device == "auto")) and importlib.util.find_spec("accelerate"):
        options["device_map"] = device
    return options


def _without_float16(name: str, model: Any) -> Any:
    """The model in float32, where it is on a CPU, in float16, and there is memory for it."""
    import torch

    size = sum(one.numel() for one in model.parameters() if one.dtype == torch.float16)
    if not size or any(one.device.type != "cpu" for one in model.parameters()):
        return model
    slow = f"model {name!r} is stored in float16, which is slow on a CPU"
    if 4 * size > FLOAT32_SHARE * memory_limit():
        _LOG.warning("%s, and float32 takes too much memory (--dtype bfloat16 rounds it)", slow)
        return model
    _LOG.warning("%s: it computes in float32 (--dtype float16 keeps it)", slow)
    return model.float()


def _attempt(name: str, part: str, load: Callable[..., Any], where: str, **options: Any) -> Any:
    """Call a loader of transformers for a part of the model; what it raises becomes one line."""
    from safetensors import SafetensorError

    try:
        return load(where, **options)
    except UsageError:
        raise
    except Exception as error:
        known = (OSError, ValueError, KeyError, ImportError, SafetensorError)
        # Files of a model are what the user gave; loading weights also fails for want of memory.
        kind = UsageError if part != "weights" or isinstance(error, known) else VarMoeError
        raise kind(f"model {name!r}: its {part} cannot be loaded ({one_line(error)})") from error


def merged(where: str, *, model: Any, revision: str | None) -> Any:
    """The model with an adapter in its weights.

    transformers would keep it in modules beside them, which what copies the experts' weights
    does not see; and it says nothing where the adapter is of another model.
    """
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(where, revision=revision)
    wrapped = PeftModel(model, config)
    found = wrapped.load_adapter(where, "default", revision=revision)
    odd = sorted({*found.missing_keys, *found.unexpected_keys})
    if odd:
        raise ValueError(f"{len(odd)} of its tensors do not fit the model: {odd[0]}, ...")
    whole = wrapped.merge_and_unload()
    vars(whole).pop("peft_config", None)
    return whole


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
