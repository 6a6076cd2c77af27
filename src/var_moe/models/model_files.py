"""What is refused of a model's folder before anything heavy is imported: each file by its name."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NoReturn

from var_moe.errors import UsageError, one_line

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model"),
    *("vocab.json", "vocab.txt", "tekken.json"),
)
# Whole objects; the tokenizer's own files are large, and the library that reads them checks them.
OBJECTS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
LFS = b"version https://git-lfs"
FLOATS = ("F64", "F32", "F16", "BF16")  # how safetensors' headers call weights that are numbers

# What lies in a folder that is no model folder, and what to do then; the first that is there.
IN_PLACE_OF_A_MODEL = {
    "*.gguf": "is a GGUF file, which transformers would unpack; give the model it was made of",
    "consolidated*": "is in the layout of the model's makers; give the one that is converted "
    "for transformers",
    "*.bin": "is a pickle file; convert the model to safetensors",
    "*.pt*": "is a pickle file; convert the model to safetensors",
    f"*/{CONFIG}": "lies below; give its folder",
    f"snapshots/*/{CONFIG}": "lies below; give its folder",
}


def local_folder(name: str) -> Path | None:
    """The local folder that a name means, or None where it can only be a Hub id.

    Raises:
        UsageError: it is written like a path, and no folder is there.
    """
    try:
        path = Path(name).expanduser()
        folder, file = bool(name) and path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, a NUL in it
        why = getattr(error, "strerror", None) or one_line(error)
        raise UsageError(f"model {name!r}: cannot be looked for ({why})") from None
    if folder:
        return path
    if file:
        raise UsageError(f"model {name!r}: is a file; expected the model's folder or a Hub id")
    if not name or name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise UsageError(f"model {name!r}: no such folder; expected a model folder or a Hub id")
    return None


def check_folder(name: str, folder: Path) -> None:
    """Refuse a folder without a configuration, whole safetensors weights, or a tokenizer.

    Only the head of each file of weights is read.
    """
    try:
        _check_folder(f"model {name!r}", folder)
    except OSError as error:
        raise UsageError(f"model {name!r}: cannot be read ({one_line(error)})") from None


def _check_folder(label: str, folder: Path) -> None:
    if not (folder / CONFIG).is_file():
        _refuse(label, folder, f"no {CONFIG} in the folder; expected a model folder")
    config = _object(label, folder / CONFIG)
    if not isinstance(config.get("model_type"), str) and "auto_map" not in config:
        raise UsageError(f"{label}: its {CONFIG} names no model_type")
    shards = _shards(label, folder, config)
    check_adapter(label, folder / ADAPTER)
    for file in OBJECTS:
        if (folder / file).is_file():
            _object(label, folder / file)
    tokenizer = [folder / file for file in TOKENIZER_FILES if (folder / file).is_file()]
    if not tokenizer:
        raise UsageError(
            f"{label}: no tokenizer in the folder; save the model's own beside its weights"
        )
    for path in tokenizer:
        _check_whole(label, path)
    tensors = {name: found for path in shards for name, found in _tensors(label, path).items()}
    _check_experts(label, tensors)
    if not config.get("quantization_config"):
        odd = [name for name, (_, dtype) in tensors.items() if _is_quantised(name, dtype)]
        if odd:
            raise UsageError(
                f"{label}: {odd[0]} is stored as {tensors[odd[0]][1]}, and {CONFIG} has no "
                "quantization_config that says how to read it; give the unquantised model"
            )


def _refuse(label: str, folder: Path, otherwise: str) -> NoReturn:
    """Say what lies in the folder in place of a model."""
    check_adapter(label, folder / ADAPTER, alone=True)
    for pattern, what in IN_PLACE_OF_A_MODEL.items():
        found = min(folder.glob(pattern), default=None)
        if found is not None:
            raise UsageError(f"{label}: {otherwise}: {found.relative_to(folder)} {what}")
    raise UsageError(f"{label}: {otherwise}")


def check_adapter(label: str, path: Path, *, alone: bool = False) -> None:
    """Refuse an adapter without its model, and one that transformers would pass over in silence.

    Args:
        label: the model, for the message.
        path: of the adapter's configuration, where there is one.
        alone: no model lies beside it.
    """
    if not path.is_file():
        return
    base = _object(label, path).get("base_model_name_or_path")
    if alone:
        raise UsageError(
            f"{label}: is an adapter of {base!r}, not a model; load both with peft, "
            "merge_and_unload(), save_pretrained() with the tokenizer, and give that folder"
        )
    if importlib.util.find_spec("peft") is None:
        raise UsageError(
            f"{label}: {path.name} says that an adapter belongs to it, which needs peft: pip "
            "install 'var-moe[adapters]'; without the adapter, give a copy that lacks this file"
        )


def _shards(label: str, folder: Path, config: dict[str, Any]) -> list[Path]:
    """The files of weights, all of them there."""
    explicit = config.get("transformers_weights")  # the configuration may name another file
    index = str(explicit) if str(explicit).endswith(".json") else INDEX
    if explicit and index == INDEX:
        names = [str(explicit)]
    elif not explicit and (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    elif (folder / index).is_file():
        content = _object(label, folder / index)
        places = content.get("weight_map")
        names = sorted(set(map(str, places.values()))) if isinstance(places, dict) else []
        if not names or not isinstance(content.get("metadata"), dict):
            raise UsageError(
                f"{label}: {index} lacks weight_map or metadata, the objects that say where "
                "tensors are; download it again"
            )
    else:
        _refuse(label, folder, f"no {WEIGHTS} weights in the folder")
    missing = [shard for shard in names if not (folder / shard).is_file()]
    if missing:
        raise UsageError(
            f"{label}: {len(missing)} of its {len(names)} weight files missing "
            f"({missing[0]}, ...); download the rest"
        )
    return [folder / shard for shard in names]


def _check_whole(label: str, path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(len(LFS))
    if start == LFS:
        raise UsageError(
            f"{label}: {path.name} is a Git LFS pointer in place of the file; run `git lfs pull` "
            "in its repository"
        )
    if not start:
        raise UsageError(f"{label}: {path.name} is empty; download it again")


def _object(label: str, path: Path) -> dict[str, Any]:
    """The object of a JSON file."""
    _check_whole(label, path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{label}: {path.name} is not a valid JSON object ({one_line(error)})"
        ) from None
    if not isinstance(found, dict):
        raise UsageError(f"{label}: {path.name} is not a valid JSON object")
    return found


def _tensors(label: str, path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each tensor of a safetensors file, by its head."""
    from safetensors import SafetensorError, safe_open

    _check_whole(label, path)
    try:
        with safe_open(path, framework="np") as held:
            parts = {name: held.get_slice(name) for name in held.keys()}  # noqa: SIM118
            return {
                name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()
            }
    except SafetensorError as error:
        raise UsageError(
            f"{label}: {path.name} is no whole safetensors file ({one_line(error)}); "
            "download it again"
        ) from None


def _is_quantised(name: str, dtype: str) -> bool:
    return name.endswith("weight") and dtype not in FLOATS


def _check_experts(label: str, tensors: dict[str, tuple[tuple[int, ...], str]]) -> None:
    """Refuse an expert that lacks what its neighbours have.

    transformers stacks them, and of an odd one it only says that something did not fit.
    """
    parts: dict[tuple[str, str], dict[int, tuple[int, ...]]] = defaultdict(dict)
    counts: dict[str, int] = defaultdict(int)
    for name, (shape, _) in tensors.items():
        found = re.fullmatch(r"(.*\.experts)\.(\d+)\.(.*)", name)
        if found:
            place, expert, part = found[1], int(found[2]), found[3]
            parts[place, part][expert] = shape
            counts[place] = max(counts[place], expert + 1)
    for (place, part), shapes in parts.items():
        usual = Counter(shapes.values()).most_common(1)[0][0]
        odd = [expert for expert in range(counts[place]) if shapes.get(expert) != usual]
        if len(odd) == 1:  # of several sizes, a family may know how to read them
            what = f"has shape {shapes[odd[0]]}" if odd[0] in shapes else "is missing"
            raise UsageError(
                f"{label}: its weights do not belong together: {place}.{odd[0]}.{part} "
                f"{what}, other experts have {usual}"
            )
