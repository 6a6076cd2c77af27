"""An exported configuration: what it holds, its files, and whether it fits a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from var_moe import hub
from var_moe.errors import UsageError, one_line
from var_moe.models.identity import difference, identity
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.registry import policy_spec
from var_moe.serving.parts import hash_of, pack, unpack
from var_moe.storage import SCHEMA_VERSION, atomic_write, atomic_write_json, provenance, read_json

HEAD_FILE, PARTS_FILE, CARD_FILE = "var_moe.json", "var_moe.safetensors", "README.md"

_AGAIN = "export it again with `var-moe export`"
_HEAD = ("policy", "settings", "compensation", "parts", "model", "hashes")
_MODEL = (
    *("model", "revision", "tokenizer_hash", "layers", "experts", "top_k"),
    *("routers", "weights", "dtype"),
)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A policy's settings with all that it was calibrated to.

    Args:
        head: what ``var_moe.json`` says: policy, settings, compensation, model, hashes.
        calibration: by the names of `routing.registry.CALIBRATION`.
    """

    head: Mapping[str, Any]
    calibration: Mapping[str, Any]

    def policy(self) -> RoutingPolicy:
        """A fresh policy with empty caches.

        Raises:
            UsageError: this version knows no such policy, or not with such settings.
        """
        spec = policy_spec(self.head["policy"])
        return spec.make(self.head["settings"], self.calibration)

    def per_document(self) -> Exported:
        """The same, with a document's decisions depending on that document alone."""
        settings = policy_spec(self.head["policy"]).load().per_document(self.head["settings"])
        return replace(self, head={**self.head, "settings": settings})

    def check_model(self, model: Any) -> None:
        """Refuse another model than the one that it was made for.

        Args:
            model: of transformers, or a `LoadedModel`, whose tokenizer is looked at as well.

        Raises:
            UsageError: names both models, and in what they differ.
        """
        own = self.head["model"]
        here = identity(model)
        # A bare model does not tell its tokenizer; its routers tell its weights.
        fault = difference(own, {"tokenizer_hash": own["tokenizer_hash"], **here})
        if fault:
            raise UsageError(
                f"configuration exported for model {own['model']!r} does not fit model "
                f"{here['model']!r}: {fault}; export one for this model with `var-moe export`"
            )


def save_exported(
    folder: Path,
    *,
    policy: str,
    settings: Mapping[str, Any],
    compensation: str | None,
    calibration: Mapping[str, Any],
    profile: Mapping[str, Any],
    certificate: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write ``var_moe.safetensors`` and, last, ``var_moe.json``.

    Args:
        folder: made when needed.
        policy, settings: of the registry.
        compensation: name of what stands in for dropped experts; None leaves it to the policy.
        calibration: what the policy was calibrated to; only what it needs is written.
        profile: head of the profile that this comes from: model, text, hash.
        certificate: what is certified of it, kept in the head.

    Returns:
        The head.
    """
    from safetensors.torch import save_file

    spec = policy_spec(policy)
    wanted = {name: calibration.get(name) for name in (*spec.needed(settings), "compensation")}
    tensors, parts = pack(wanted)
    in_place = spec.make(settings, wanted).compensation
    head = {
        "schema_version": SCHEMA_VERSION,
        "policy": policy,
        "settings": dict(settings),
        "compensation": compensation,
        "model": {name: profile.get(name) for name in _MODEL},
        "text": {name: profile.get(name) for name in ("dataset", "data_hash", "tokens")},
        "parts": parts,
        "hashes": {
            "tensors": hash_of(tensors),
            "profile": profile["hash"],
            "compensation": None if in_place is None else in_place.hash,
        },
        "certificate": certificate,
        "provenance": provenance(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / HEAD_FILE).unlink(missing_ok=True)
    atomic_write(folder / PARTS_FILE, lambda temporary: save_file(tensors, temporary))
    atomic_write_json(folder / HEAD_FILE, head)
    return head


def load_exported(source: str | Path, model: Any = None) -> Exported:
    """Read what `save_exported` wrote.

    Args:
        source: its folder, or a Hub id.
        model: refuse it where it is not for this model (of transformers, or a `LoadedModel`).

    Raises:
        UsageError: missing, damaged, of another schema, or for another model; names what.
    """
    folder = locate(source)
    path = folder / HEAD_FILE
    head = read_json(path, what="exported configuration")
    if not isinstance(head, dict) or head.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(f"{path}: no exported configuration of schema {SCHEMA_VERSION}; {_AGAIN}")
    missing = [name for name in _HEAD if name not in head]
    if missing:
        raise UsageError(f"{path}: {missing[0]!r} is missing; {_AGAIN}")
    found = Exported(head=head, calibration={})
    if model is not None:
        found.check_model(model)
    return Exported(head=head, calibration=_calibration(folder / PARTS_FILE, head))


def _calibration(path: Path, head: Mapping[str, Any]) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UsageError(f"{path}: missing; {_AGAIN}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: damaged ({error}); {_AGAIN}") from None
    if hash_of(tensors) != head["hashes"].get("tensors"):
        raise UsageError(f"{path}: does not belong to {HEAD_FILE}; {_AGAIN}")
    try:
        return unpack(tensors, head["parts"])
    except (AttributeError, KeyError, TypeError) as error:
        raise UsageError(f"{path.parent / HEAD_FILE}: damaged ({error}); {_AGAIN}") from None


def locate(source: str | Path) -> Path:
    """The folder that is meant: this one, or the Hub's, which is fetched where it is not cached.

    Args:
        source: a folder that `var-moe export` wrote, or a Hub id (owner/name).

    Raises:
        UsageError: there is neither; says which of both was looked for.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    name = str(source)
    if isinstance(source, Path) or name.count("/") != 1 or not hub.is_id(name):
        raise UsageError(
            f"{name}: no such folder; expected one that `var-moe export` wrote, or a Hub id as "
            "owner/name"
        )
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    reachable = hub.reachable()
    if not reachable and not isinstance(try_to_load_from_cache(name, HEAD_FILE), str):
        raise UsageError(
            f"{name}: no such folder, not in the local Hub cache, and the Hugging Face Hub does "
            "not answer; give a folder that `var-moe export` wrote"
        )
    try:
        wanted = [HEAD_FILE, PARTS_FILE, CARD_FILE]
        found = snapshot_download(
            repo_id=name, allow_patterns=wanted, local_files_only=not reachable
        )
    except Exception as error:  # the library's own errors have no common parent
        raise UsageError(f"{name}: cannot be fetched from the Hub ({one_line(error)})") from None
    return Path(found)
