"""The files of a trace: shards of so many tokens each, and a head that is written last.

A shard is a safetensors file whose tensors have the tokens along one dimension. Its note says
how many forwards are done with it, so that a killed recording goes on after the last whole
shard. The head knows every shard's size and hash.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from var_moe.errors import UsageError
from var_moe.storage import SCHEMA_VERSION, atomic_write, atomic_write_json, read_json

HEAD_FILE = "trace.json"
_AGAIN = "make it again with `var-moe trace`"


def token_dim(name: str) -> int:
    """Along which dimension a tensor of a shard has its tokens."""
    return 0 if name in ("ids", "nll") else 1


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Several shards' tensors as one, in order."""
    return {
        name: torch.cat([part[name] for part in parts], dim=token_dim(name)) for name in parts[0]
    }


def shard_file(number: int) -> str:
    """Name of a shard's file."""
    return f"trace-{number:05d}.safetensors"


class Writer:
    """Writes the shards of one recording, and finally its head.

    Args:
        folder: where to; made when needed.
        key: what the shards were made from. Shards of another key are not gone on with.
    """

    def __init__(self, folder: Path, *, key: str) -> None:
        self.folder, self.key = folder, key
        self._shards: list[dict[str, Any]] = []

    def resume(self) -> int:
        """Keep the whole shards of the same key and drop all else; returns the forwards done."""
        done = 0
        while found := self._whole(self.folder / shard_file(len(self._shards))):
            done = found.pop("done")
            self._shards.append(found)
        self.clear(keep=len(self._shards))
        return int(done)

    def _whole(self, path: Path) -> dict[str, Any] | None:
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                note = file.metadata() or {}
        except (SafetensorError, OSError):
            return None
        if note.get("key") != self.key:
            return None
        return {
            "file": path.name,
            "tokens": int(note["tokens"]),
            "sha256": _hash(path),
            "done": int(note["done"]),
        }

    def clear(self, *, keep: int = 0) -> None:
        """Remove the head, the shards from number ``keep`` on, and what a kill left unfinished."""
        (self.folder / HEAD_FILE).unlink(missing_ok=True)
        kept = {shard_file(number) for number in range(keep)}
        for path in self.folder.glob("trace-*.safetensors"):
            if path.name not in kept:
                path.unlink()
        for path in self.folder.glob(".trace*.tmp"):
            path.unlink()

    def add(self, columns: dict[str, Tensor], *, done: int) -> None:
        """Write the next shard; ``done`` forwards of the recording are in it and those before."""
        from safetensors.torch import save_file

        path = self.folder / shard_file(len(self._shards))
        tokens = len(columns["ids"])
        note = {"key": self.key, "done": str(done), "tokens": str(tokens)}
        tensors = {name: value.contiguous() for name, value in columns.items()}
        atomic_write(path, lambda temporary: save_file(tensors, temporary, metadata=note))
        self._shards.append({"file": path.name, "tokens": tokens, "sha256": _hash(path)})

    def finish(self, head: dict[str, Any]) -> None:
        """Write the head: from now on the folder is a whole trace."""
        atomic_write_json(self.folder / HEAD_FILE, {**head, "shards": self._shards})


def folder_size(folder: Path) -> int:
    """Bytes of a trace's files."""
    files = [folder / HEAD_FILE, *folder.glob("trace-*.safetensors")]
    return sum(path.stat().st_size for path in files)


def read_head(folder: Path) -> dict[str, Any]:
    """The head of a trace's folder.

    Raises:
        UsageError: no such folder, the recording did not end, or it is no head of a trace.
    """
    path = folder / HEAD_FILE
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such trace folder; make one with `var-moe trace`")
    if not path.is_file() and any(folder.glob("trace-*.safetensors")):
        raise UsageError(
            f"{path}: missing, so the recording did not end; go on with it by the same "
            "`var-moe trace`"
        )
    head = read_json(path, what="routing trace")
    if not isinstance(head, dict) or head.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(f"{path}: not a trace of schema {SCHEMA_VERSION}; {_AGAIN}")
    if not isinstance(head.get("shards"), list) or not head["shards"]:
        raise UsageError(f"{path}: names no shards; {_AGAIN}")
    return head


def read_shards(folder: Path, shards: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The tensors of all shards as one.

    Raises:
        UsageError: a shard is missing, truncated or not the one that the head means.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    total, at = sum(shard["tokens"] for shard in shards), 0
    found: dict[str, Tensor] = {}
    for shard in shards:
        path = folder / str(shard["file"])
        if not path.is_file():
            raise UsageError(f"{path}: missing shard of a trace; {_AGAIN}")
        try:
            if _hash(path) != shard["sha256"]:
                raise UsageError(f"{path}: damaged or truncated shard of a trace; {_AGAIN}")
            part = load_file(path)
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path}: damaged shard of a trace ({error}); {_AGAIN}") from None
        # Filled shard by shard, so that a large trace is not held twice.
        for name, value in part.items():
            dim = token_dim(name)
            if name not in found:
                shape = [*value.shape]
                shape[dim] = total
                found[name] = value.new_empty(shape)
            found[name].narrow(dim, at, value.shape[dim]).copy_(value)
        at += shard["tokens"]
    return found


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_of(values: dict[str, Any]) -> str:
    """A recording's key: what its shards depend on, as a hash."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
