"""Files of what is fitted with gradients: ``damage.safetensors`` and a compensation's folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from var_moe.errors import UsageError
from var_moe.models.identity import difference, identity
from var_moe.routing.compensation import Compensation
from var_moe.routing.damage import DamageModel
from var_moe.storage import (
    SCHEMA_VERSION,
    atomic_write,
    atomic_write_json,
    entries_of,
    read_json,
)

if TYPE_CHECKING:
    from var_moe.models.loading import LoadedModel

DAMAGE_FILE = "damage.safetensors"
COMPENSATION_FILE, HEAD_FILE = "compensation.safetensors", "compensation.json"
FOLDER = "compensation"
"""Where a profile's folder holds the compensation that was fitted with it."""
LEARNED = "learned"
_FIT = "make it again with `var-moe fit-compensation`"
_PROFILE = "make it again with `var-moe profile`"


@dataclass(frozen=True, kw_only=True)
class FittedCompensation:
    """A compensation, the damages predicted with it in place, and where both come from.

    ``head`` names the model, the text, and how the fit went.
    """

    damage: DamageModel
    head: dict[str, Any]

    @property
    def compensation(self) -> Compensation:
        """What stands in for dropped experts."""
        assert self.damage.compensation is not None
        return self.damage.compensation

    def save(self, folder: Path) -> None:
        """Write the folder, which is made when needed; the head comes last."""
        from safetensors.torch import save_file

        compensation = self.compensation
        folder.mkdir(parents=True, exist_ok=True)
        (folder / HEAD_FILE).unlink(missing_ok=True)
        tensors = {name: t.contiguous() for name, t in compensation.named("layer").items()}
        atomic_write(folder / COMPENSATION_FILE, lambda temporary: save_file(tensors, temporary))
        save_damages({LEARNED: self.damage}, folder / DAMAGE_FILE)
        about = {
            "schema_version": SCHEMA_VERSION,
            "hash": compensation.hash,
            "by_pair": compensation.by_pair,
        }
        atomic_write_json(folder / HEAD_FILE, {**self.head, **about})


def save_damages(damages: Mapping[str, DamageModel], path: Path) -> None:
    """Write damage models by the name of their compensation."""
    from safetensors.torch import save_file

    tensors, note = {}, {"schema_version": str(SCHEMA_VERSION)}
    for name, damage in damages.items():
        note[name] = damage.hash
        for part, value in damage.tensors().items():
            tensors[f"{name}.{part}"] = value.contiguous()
    atomic_write(path, lambda temporary: save_file(tensors, temporary, metadata=note))


def load_damages(
    path: Path, compensations: Mapping[str, Compensation | None]
) -> dict[str, DamageModel]:
    """Read what `save_damages` wrote, for the compensations by name that they were fitted with.

    Raises:
        UsageError: it is missing, damaged, or of other compensations; names the file.
    """
    tensors, note = _read(path, _PROFILE)
    if note.get("schema_version") != str(SCHEMA_VERSION):
        raise UsageError(f"{path}: no damages of schema {SCHEMA_VERSION}; {_PROFILE}")
    damages = {}
    for name in (one for one in compensations if one in note):
        with entries_of(path):
            damages[name] = DamageModel.of_named(tensors, name, compensations[name])
        if damages[name].hash != note[name]:
            raise UsageError(
                f"{path}: its damages {name!r} do not belong to the files beside it; make it again"
            )
    return damages


def load_compensation(folder: str | Path, loaded: LoadedModel | None = None) -> FittedCompensation:
    """Read what `FittedCompensation.save` wrote.

    Raises:
        UsageError: no such folder, damaged, or of another model than ``loaded``; names what.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(
            f"{folder}: no such compensation folder; make one with `var-moe fit-compensation`"
        )
    head = read_json(folder / HEAD_FILE, what="compensation")
    if not isinstance(head, dict) or head.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(f"{folder / HEAD_FILE}: no compensation of schema {SCHEMA_VERSION}")
    tensors, _ = _read(folder / COMPENSATION_FILE, _FIT)
    with entries_of(folder):
        sizes = {name: head[name] for name in ("layers", "by_pair", "experts")}
        compensation = Compensation.of_named(tensors, "layer", **sizes)
        if compensation.hash != head["hash"]:
            raise UsageError(
                f"{folder}: {COMPENSATION_FILE} does not belong to {HEAD_FILE}; {_FIT}"
            )
        damages = load_damages(folder / DAMAGE_FILE, {LEARNED: compensation})
        fault = loaded and difference(head, identity(loaded))
        if loaded and fault:
            raise UsageError(
                f"{folder}: compensation of model {head['model']!r} does not fit model "
                f"{loaded.name!r}: {fault}; fit one with `var-moe fit-compensation`"
            )
    if LEARNED not in damages:
        raise UsageError(f"{folder / DAMAGE_FILE}: holds no damages {LEARNED!r}; {_FIT}")
    return FittedCompensation(damage=damages[LEARNED], head=head)


def _read(path: Path, again: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UsageError(f"{path}: missing; {again}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: damaged ({error}); {again}") from None
