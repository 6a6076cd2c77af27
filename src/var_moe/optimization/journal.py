"""Finished evaluations on disk, safe against a kill at any moment, and who may resume them.

An append-only file with one JSON object per line: a header (what is searched, how, with
which seed, how many evaluations) and then each evaluation as it finishes, synced to disk.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from var_moe.errors import UsageError
from var_moe.optimization.results import Evaluation, jsonable
from var_moe.storage import SCHEMA_VERSION, check_output_folder, entries_of

try:
    import fcntl
except ImportError:  # no Unix: runs without the guard against two writers
    fcntl = None  # type: ignore[assignment]

_LOG = logging.getLogger(__name__)

JOURNAL_NAME = "trials.jsonl"
STUDY_NAME = "optuna_study.log"
_KNOWN_NAMES = (JOURNAL_NAME, STUDY_NAME)


@dataclass(frozen=True, kw_only=True)
class SearchHeader:
    """What a search is; a resumed one must be the same.

    Args:
        method: the search method and engine.
        seed: None lets a new search choose one, and a resumed one take over its own.
        total: evaluations planned.
        space: the search space.
        settings: whatever else decides the results, as JSON values.
    """

    method: str
    seed: int | None
    total: int
    space: dict[str, Any]
    settings: dict[str, Any]

    @property
    def known_seed(self) -> int:
        """The seed of a search that has begun."""
        if self.seed is None:
            raise ValueError("the search has not begun: its seed is not chosen yet")
        return self.seed

    def begun(self) -> SearchHeader:
        """This header with a seed: a fresh one where none was given."""
        seed = self.seed
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1)[0])
        return replace(self, seed=seed)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        cleaned: dict[str, Any] = jsonable(asdict(self))
        return cleaned

    def resumed_from(self, stored: Mapping[str, Any], *, source: Path) -> SearchHeader:
        """The stored header, when this one asks for the same search.

        Raises:
            UsageError: names the first field that differs, with both values.
        """
        unknown = set(stored) ^ set(self.to_dict())
        if unknown:
            raise UsageError(f"{source}: header without or with unknown {sorted(unknown)[0]!r}")
        now, then = _flat(self.to_dict()), _flat(stored)
        for name in sorted({**then, **now}, key=_telling):
            if name == "total" or (name == "seed" and self.seed is None):
                continue
            if now.get(name) != then.get(name):
                raise UsageError(
                    f"{source}: this search was begun with {name} = {then.get(name)!r}, now "
                    f"{now.get(name)!r}; resume with the same settings or choose another folder"
                )
        return SearchHeader(**stored)


@dataclass(frozen=True, kw_only=True)
class Session:
    """A search that has begun: its header with the seed, and what is already evaluated."""

    header: SearchHeader
    evaluations: list[Evaluation]


class TrialJournal:
    """The evaluations of one search in one file; see the module's text.

    `begin` locks the file (against a second run, also in this process) until `close`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: IO[bytes] | None = None

    def begin(self, header: SearchHeader, *, resume: bool = False) -> Session:
        """Start the file, or with `resume` read it and go on; without one, start it.

        A file of an earlier search is kept as ``<name>.previous`` unless resumed.

        Raises:
            UsageError: another run holds the file, it is damaged, or it holds another search.
        """
        self._file = open_log(self.path, resume=resume)
        try:
            lines = read_lines(self.path)
            if lines:
                return self._read(lines, header)
            header = header.begun()
            self._write({"schema_version": SCHEMA_VERSION, "header": header.to_dict()})
            return Session(header=header, evaluations=[])
        except BaseException:
            self.close()
            raise

    def append(self, number: int, evaluation: Evaluation) -> None:
        """Write evaluation `number` (from 0); it is on disk when this returns."""
        self._write({"number": number, "evaluation": evaluation.to_dict()})

    def extend(self, header: SearchHeader) -> None:
        """Note another number of evaluations."""
        self._write({"total": header.total})

    def close(self) -> None:
        """Give the file free; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            raise ValueError(f"{self.path}: the journal is not open; call begin first")
        # One unbuffered write, so that a kill leaves at most one torn line, the last.
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        os.fsync(self._file.fileno())

    def _read(self, lines: list[Any], header: SearchHeader) -> Session:
        stored = lines[0].get("header") if isinstance(lines[0], dict) else None
        if not isinstance(stored, dict):
            raise UsageError(f"{self.path}: line 1 is no header of a search; choose another folder")
        if lines[0].get("schema_version") != SCHEMA_VERSION:
            raise UsageError(
                f"{self.path}: schema_version {lines[0].get('schema_version')!r}, this version "
                f"reads {SCHEMA_VERSION}; start anew without resume"
            )
        resumed = header.resumed_from(stored, source=self.path)
        evaluations: list[Evaluation] = []
        for place, line in enumerate(lines[1:], start=2):
            where, number = f"{self.path}: line {place}", len(evaluations)
            known = line if isinstance(line, dict) else {}
            if set(known) == {"total"}:
                with entries_of(where):
                    resumed = replace(resumed, total=int(known["total"]))
                continue
            if known.get("number") != number or not isinstance(known.get("evaluation"), dict):
                raise UsageError(f"{where} is not evaluation {number}; start anew without resume")
            evaluations.append(Evaluation.from_dict(known["evaluation"], source=where))
        return Session(header=resumed, evaluations=evaluations)


class MemoryStore:
    """The stand-in for a journal when nothing is to be kept."""

    def begin(self, header: SearchHeader, *, resume: bool = False) -> Session:
        """A new search; there is nothing to resume."""
        if resume:
            raise UsageError("resume: needs the journal or folder of the search to go on with")
        return Session(header=header.begun(), evaluations=[])

    def append(self, number: int, evaluation: Evaluation) -> None:
        """Keep nothing: the search holds its evaluations itself."""

    def extend(self, header: SearchHeader) -> None:
        """Keep nothing."""

    def close(self) -> None:
        """Nothing to do."""


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Within it, no other run may search in a results folder; it is made where there is none.

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
            except OSError:
                _LOG.debug("%s: its file system has no locks on folders", folder)
        yield
    finally:
        if handle is not None:
            os.close(handle)
        if made:
            with suppress(OSError):  # results are in it
                folder.rmdir()


def as_store(journal: TrialJournal | str | Path | None) -> TrialJournal | MemoryStore:
    """The journal to use: as given, at a path, or none."""
    if journal is None:
        return MemoryStore()
    return journal if isinstance(journal, TrialJournal) else TrialJournal(journal)


def open_log(path: Path, *, resume: bool) -> IO[bytes]:
    """Open an append-only log, locked until it is closed, with whole lines only.

    Without `resume` an earlier log is set aside as ``<name>.previous``, and with it that of
    another search method in the same folder, so that only one search can be resumed there.

    Raises:
        UsageError: another run holds the log, it cannot be created, or with `resume` the
            folder holds a search by another method.
    """
    check_output_folder(path.parent)
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; expected a file")
    if resume:
        _refuse_other_method(path)
    else:
        for name in _KNOWN_NAMES if path.name in _KNOWN_NAMES else (path.name,):
            _set_aside(path.with_name(name))
    path.parent.mkdir(parents=True, exist_ok=True)
    log = _open_locked(path)
    try:
        _drop_torn_line(path, log)
    except BaseException:
        log.close()
        raise
    return log


def read_lines(path: Path) -> list[Any]:
    """Every line of a log, parsed."""
    lines: list[Any] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            raise UsageError(
                f"{path}: line {number} is damaged; start anew without resume"
            ) from None
    return lines


def _open_locked(path: Path) -> IO[bytes]:
    log = path.open("ab", buffering=0)
    try:
        if fcntl is not None:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.close()
        raise UsageError(
            f"{path}: another run is using it; wait for it or choose another folder"
        ) from None
    return log


def _set_aside(path: Path) -> None:
    if path.is_file() and path.stat().st_size > 0:
        _open_locked(path).close()  # never take a file from under a running search
        path.replace(path.with_name(path.name + ".previous"))


def _refuse_other_method(path: Path) -> None:
    if path.exists() or path.name not in _KNOWN_NAMES:
        return
    for name in _KNOWN_NAMES:
        if path.with_name(name).exists():
            raise UsageError(
                f"{path.with_name(name)}: the search in this folder used another method; "
                f"resume with that method or choose another folder"
            )


def _drop_torn_line(path: Path, log: IO[bytes]) -> None:
    """Cut off a last line that a kill left unfinished, or the next one would be joined to it."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole == content and content:
        last = whole[whole.rfind(b"\n", 0, -1) + 1 :]
        if not _is_json(last):
            whole = whole[: -len(last)]
    if whole != content:
        _LOG.warning("%s: the last line was torn by an interruption and is left out", path)
        log.truncate(len(whole))
        os.fsync(log.fileno())


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _telling(name: str) -> tuple[bool, bool]:
    """What says best how two searches differ comes first: settings, then the names of a space."""
    return (not name.startswith("settings."), name != "space (names)")


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names; the order of the names counts as well."""
    flat: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            flat.update(_flat(item, f"{prefix}{name}."))
            flat[f"{prefix}{name} (names)"] = list(item)
        else:
            flat[prefix + name] = item
    return flat
