"""Files: written whole or not at all, read with one clear line when they are wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

from var_moe.errors import UsageError, VarMoeError

try:
    import fcntl
except ImportError:  # no Unix
    fcntl = None  # type: ignore[assignment]

SCHEMA_VERSION = 1

_COMMAND: ContextVar[str | None] = ContextVar("command", default=None)


def atomic_write(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it into place.

    Raises:
        VarMoeError: it cannot be written; names the path and the system's reason.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        # mkstemp makes private files; a result is as readable as any other new file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except Exception as error:
        # What safetensors raises on a full disk is no OSError.
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        reason = getattr(error, "strerror", None) or error
        raise VarMoeError(f"{path}: cannot be written ({reason})") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all; characters without UTF-8 as their codes."""
    atomic_write(path, lambda place: place.write_text(text, "utf-8", "backslashreplace"))


def atomic_write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON; a number that JSON has no word for (NaN) is an error."""
    atomic_write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path, *, what: str = "file") -> Any:
    """Parse a JSON file.

    Raises:
        UsageError: it is missing, a folder, or no JSON; names the path.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such {what}; expected a JSON file")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows mark UTF-8
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid JSON ({error}); expected a {what}") from None


@contextmanager
def entries_of(source: str | Path) -> Iterator[None]:
    """Within it, entries of files that we wrote are looked up: `source` is a file, or a folder.

    Raises:
        UsageError: one is missing or of another kind, in a file of another version or one that
            was edited; names `source`.
    """
    try:
        yield
    except UsageError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        lacks = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UsageError(
            f"{source}: not as this version of var_moe writes it ({lacks}); make it again"
        ) from error


def check_output_folder(path: str | Path) -> Path:
    """`path` as a folder that results can go to, before any work is done.

    Raises:
        UsageError: it, or a parent of it, is a file, or it cannot be written.
    """
    path = Path(path)
    if "\0" in str(path) or str(path) != str(path).encode("utf-8", "replace").decode("utf-8"):
        raise UsageError(f"{str(path)!r}: no name that all libraries can write; choose another")
    for place in (path, *path.parents):
        try:
            there = place.exists()
        except OSError as error:  # such as a name that is too long
            raise UsageError(f"{place}: {error.strerror}; choose another --output") from None
        if there:
            if not place.is_dir():
                raise UsageError(f"{place}: is a file; --output expects a folder")
            if not os.access(place, os.W_OK):
                raise UsageError(f"{place}: cannot be written; choose another --output")
            break
    return path


def expanded(value: str) -> str:
    """`value` with the home folder for each ``~`` that begins it, or what follows a comma."""
    return re.sub(r"(?:^|(?<=,))(\s*)(~[^/,]*)", lambda m: m[1] + os.path.expanduser(m[2]), value)  # noqa: PTH111


def sha256_of(parts: Iterable[str | bytes]) -> str:
    """One hash over a sequence of strings, each with its length so that joins differ."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


@cache
def _commit() -> str | None:
    """The project's commit, when it runs from a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    with suppress(OSError, subprocess.TimeoutExpired):
        words = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=5)
        return done.stdout.strip() or None
    return None


def version_of(package: str) -> str | None:
    """The installed version of `package`, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@contextmanager
def command_line(words: Sequence[str]) -> Iterator[None]:
    """Within it, `provenance` names this command: what a report gives for repeating a result."""
    token = _COMMAND.set(shlex.join(words))
    try:
        yield
    finally:
        _COMMAND.reset(token)


def provenance() -> dict[str, Any]:
    """Where a result comes from: command, versions, commit and hardware (no model, no data)."""
    return {
        "command": _COMMAND.get(),  # None where a program called the library
        "versions": {
            name: version_of(name)
            for name in ("var-moe", "torch", "transformers", "optuna", "numpy")
        },
        "python": platform.python_version(),
        "commit": _commit(),
        "hardware": {
            "machine": platform.machine(),
            "processor": _processor(),
            "cpus": os.cpu_count(),
        },
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model[1].strip() if model else platform.processor()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Within it, no other run may write a results folder; it is made where there is none.

    The lock is on the folder itself, ends with the process, and leaves no file.

    Raises:
        UsageError: another run is there.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    handle = None
    try:
        if fcntl is not None:
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"{folder}: another run is using it; wait for it or choose another folder"
                ) from None
            except OSError:  # a file system without locks on folders
                pass
        yield
    finally:
        if handle is not None:
            os.close(handle)
        if made:
            with suppress(OSError):  # results are in it
                folder.rmdir()


def jsonable(value: Any) -> Any:
    """`value` in JSON's own types: no NaN or infinity (None instead), no numpy scalars."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, PurePath):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return jsonable(value.to_dict() if hasattr(value, "to_dict") else dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [jsonable(item) for item in value]
    # numpy and torch: scalars have .item(), arrays .tolist(); both know .tolist().
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    raise UsageError(f"{value!r} of type {type(value).__name__} cannot be written as JSON")
