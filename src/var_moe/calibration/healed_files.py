"""Files of healed weights: differences in one file, LoRA factors in peft's own format.

They lie in the folder of the compensation that they were fitted with. The adapter's folder can be
read by peft, too; nothing here needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from var_moe.errors import UsageError
from var_moe.routing.healed import Change, Healed
from var_moe.storage import atomic_write, atomic_write_json

HEALED_FILE, ADAPTER_FOLDER = "healed.safetensors", "adapter"
ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_AGAIN = "make it again with `var-moe fit-compensation --heal`"


@dataclass(frozen=True, kw_only=True)
class AdapterKey:
    """Where peft keeps the factors of one parameter.

    ``experts`` is E for a parameter of all experts, else 0; ``swapped``: that one is
    (experts, out, in).
    """

    module: str
    experts: int
    swapped: bool

    def names(self) -> tuple[str, str]:
        """Of A and B in the file."""
        one, two = (f"{_PREFIX}{self.module}.lora_{part}.weight" for part in "AB")
        return one, two


@dataclass(frozen=True, kw_only=True)
class AdapterLayout:
    """How peft's files hold the factors, by the name of the parameter, and its configuration."""

    keys: Mapping[str, AdapterKey]
    config: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """For the head of a compensation."""
        keys = {name: asdict(key) for name, key in self.keys.items()}
        return {"folder": ADAPTER_FOLDER, "parameters": keys, "config": dict(self.config)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> AdapterLayout:
        """What `to_dict` gave."""
        keys = {name: AdapterKey(**key) for name, key in value["parameters"].items()}
        return cls(keys=keys, config=value["config"])


def factors(a: Tensor, b: Tensor, key: AdapterKey) -> tuple[Tensor, Tensor]:
    """(..., out, r) and (..., r, in) in the parameter's own shape, from peft's A and B."""
    if not key.experts:
        return b, a
    each = a.reshape(key.experts, -1, a.shape[-1])  # (E, r, in)
    back = b.reshape(b.shape[0], -1, key.experts).permute(2, 0, 1)  # (E, out, r)
    return (back, each) if key.swapped else (each.transpose(1, 2), back.transpose(1, 2))


def _of_factors(left: Tensor, right: Tensor, key: AdapterKey) -> tuple[Tensor, Tensor]:
    """peft's A and B: the way back."""
    if not key.experts:
        return right, left
    back, each = (left, right) if key.swapped else (right.transpose(1, 2), left.transpose(1, 2))
    return each.reshape(-1, each.shape[-1]), back.permute(1, 2, 0).reshape(back.shape[1], -1)


def save_healed(folder: Path, healed: Healed | None, layout: AdapterLayout | None) -> None:
    """Write healed weights into a compensation's folder, and remove what was there.

    Args:
        folder: of the compensation.
        healed: None leaves no file.
        layout: of the factors, where there are some.
    """
    from shutil import rmtree

    from safetensors.torch import save_file

    (folder / HEALED_FILE).unlink(missing_ok=True)
    rmtree(folder / ADAPTER_FOLDER, ignore_errors=True)
    if healed is None:
        return
    whole = {name: c[0].contiguous() for name, c in healed.changes.items() if len(c) == 1}
    if whole:
        atomic_write(folder / HEALED_FILE, lambda temporary: save_file(whole, temporary))
    low_rank = {name: change for name, change in healed.changes.items() if len(change) == 2}
    if not low_rank:
        return
    assert layout is not None
    tensors: dict[str, Tensor] = {}
    for name, (left, right) in low_rank.items():
        key = layout.keys[name]
        for entry, tensor in zip(key.names(), _of_factors(left, right, key), strict=True):
            tensors[entry] = tensor.contiguous()
    place = folder / ADAPTER_FOLDER
    note = {"format": "pt"}
    atomic_write(place / ADAPTER_FILE, lambda temporary: save_file(tensors, temporary, note))
    atomic_write_json(place / ADAPTER_CONFIG, dict(layout.config))


def load_healed(folder: Path, about: Mapping[str, Any] | None) -> Healed | None:
    """Read what `save_healed` wrote.

    Args:
        folder: of the compensation.
        about: the head's entry ``healed``; None where nothing was healed.

    Raises:
        UsageError: a file is missing or damaged, or not the one that the head names.
    """
    if about is None:
        return None
    changes: dict[str, Change] = {}
    if about.get("file"):
        for name, tensor in _tensors(folder / HEALED_FILE).items():
            changes[name] = (tensor,)
    if about.get("adapter"):
        layout = AdapterLayout.from_dict(about["adapter"])
        tensors = _tensors(folder / ADAPTER_FOLDER / ADAPTER_FILE)
        for name, key in layout.keys.items():
            one, two = key.names()
            if one not in tensors or two not in tensors:
                place = folder / ADAPTER_FOLDER / ADAPTER_FILE
                raise UsageError(f"{place}: {one!r} is missing; {_AGAIN}")
            left, right = factors(tensors[one], tensors[two], key)
            changes[name] = (left.contiguous(), right.contiguous())
    found = Healed(changes)
    if found.hash != about.get("hash"):
        raise UsageError(f"{folder}: its healed weights are not those of its head; {_AGAIN}")
    return found


def healed_head(healed: Healed, layout: AdapterLayout | None) -> dict[str, Any]:
    """The head's entry: which files there are, and the hash of what is in them."""
    whole = any(len(change) == 1 for change in healed.changes.values())
    low_rank = any(len(change) == 2 for change in healed.changes.values())
    return {
        "file": HEALED_FILE if whole else None,
        "adapter": layout.to_dict() if layout is not None and low_rank else None,
        "hash": healed.hash,
    }


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UsageError(f"{path}: missing; {_AGAIN}")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: damaged ({error}); {_AGAIN}") from None
    return tensors
