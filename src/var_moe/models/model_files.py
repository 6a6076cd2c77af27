"""What is refused of a model's folder before anything heavy is imported: each file by its name."""

from __future__ import annotations

import importlib.util
import json
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
LFS = b"version https://git-lfs"

# What lies in a folder that is no model folder, and what to do then; the first that is there.
IN_PLACE_OF_A_MODEL = {
    "*.gguf": "is a GGUF file, which transformers would unpack; give the model it was made of",
    "*.bin": "is a pickle file; convert the model to safetensors",
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
        if name and path.is_dir():
            return path
        file = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, a NUL in it
        why = getattr(error, "strerror", None) or one_line(error)
        raise UsageError(f"model {name!r}: cannot be looked for ({why})") from None
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
    for path in _shards(label, folder):
        _check_whole(label, path)
        _check_head(label, path)
    if (folder / ADAPTER).is_file() and importlib.util.find_spec("peft") is None:
        raise UsageError(
            f"{label}: {ADAPTER} says that an adapter belongs to it, which needs peft: pip "
            "install 'var-moe[adapters]'; without the adapter, give a copy that lacks this file"
        )
    tokenizer = [folder / file for file in TOKENIZER_FILES if (folder / file).is_file()]
    if not tokenizer:
        raise UsageError(
            f"{label}: no tokenizer in the folder; save the model's own beside its weights"
        )
    for path in tokenizer:
        _check_whole(label, path)


def _refuse(label: str, folder: Path, otherwise: str) -> NoReturn:
    """Say what lies in the folder in place of a model."""
    if (folder / ADAPTER).is_file():
        base = _object(label, folder / ADAPTER).get("base_model_name_or_path")
        raise UsageError(
            f"{label}: is an adapter of {base!r}, not a model; load both with peft, "
            "merge_and_unload(), save_pretrained() with the tokenizer, and give that folder"
        )
    for pattern, what in IN_PLACE_OF_A_MODEL.items():
        found = min(folder.glob(pattern), default=None)
        if found is not None:
            raise UsageError(f"{label}: {otherwise}: {found.relative_to(folder)} {what}")
    raise UsageError(f"{label}: {otherwise}")


def _shards(label: str, folder: Path) -> list[Path]:
    """The files of weights, all of them there."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        _refuse(label, folder, f"no {WEIGHTS} weights in the folder")
    places = _object(label, folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UsageError(
            f"{label}: {INDEX} lacks weight_map, which says where tensors are; download it again"
        )
    names = sorted(set(map(str, places.values())))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UsageError(
            f"{label}: {len(missing)} of its {len(names)} weight files missing "
            f"({missing[0]}, ...); download the rest"
        )
    return [folder / name for name in names]


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


def _check_head(label: str, path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise UsageError(
            f"{label}: {path.name} is no whole safetensors file ({one_line(error)}); "
            "download it again"
        ) from None


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
