"""The trial log: an Optuna storage with every trial of a search, and who may go on with it.

By default it is a file in the results folder, in the format of Optuna's journal; any other
storage of Optuna is named by its URL. Both can be read by Optuna's own tools.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np

from var_moe.errors import UsageError, VarMoeError
from var_moe.optimization.trials import Trials, is_lost
from var_moe.storage import check_output_folder, entries_of, jsonable

try:
    import fcntl
except ImportError:  # no Unix
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import optuna
    import sqlalchemy

_LOG = logging.getLogger(__name__)

LOG_NAME = "optuna_study.log"
STUDY_NAME = "var_moe"

_HEADER = "header"  # user attribute of a study
_HEADER_SECONDS = 5.0  # from the creation of a study until its header is written, at the most

Storage: TypeAlias = Union[str, Path, "optuna.storages.BaseStorage", None]
"""Where trials are kept: the path of a file, the URL of a database, a storage of Optuna, or None,
which keeps them in memory."""


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

    def check_same(self, stored: SearchHeader, *, source: str) -> None:
        """Refuse to go on with another search than the stored one.

        Raises:
            UsageError: names the first field that differs, with both values.
        """
        now, then = self._facts(), stored._facts()
        for name in {**then, **now}:
            if name == "seed" and self.seed is None:
                continue
            if now.get(name) != then.get(name):
                raise UsageError(
                    f"{source}: this search was begun with {name} = {then.get(name)!r}, now "
                    f"{now.get(name)!r}; resume with the same settings or choose another folder"
                )

    def _facts(self) -> dict[str, Any]:
        """What must be the same, by dotted names; what says best how two differ comes first."""
        facts = {
            "settings": self.settings,
            "space (names)": list(self.space),  # their order counts as well
            "space": self.space,
            "method": self.method,
            "seed": self.seed,
        }
        return dict(_flat(jsonable(facts)))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, item in values.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{name}.")
        else:
            yield prefix + name, item


def read_header(study: optuna.Study) -> SearchHeader | None:
    """What search a study belongs to; None where it does not say."""
    stored = study.user_attrs.get(_HEADER)
    if stored is None:
        return None
    with entries_of(f"study {study.study_name}"):
        return SearchHeader(**stored)


def write_header(study: optuna.Study, header: SearchHeader) -> None:
    """Keep what a study's search is."""
    study.set_user_attr(_HEADER, jsonable(asdict(header)))


@contextmanager
def open_study(
    storage: Storage, header: SearchHeader, *, resume: bool
) -> Iterator[tuple[optuna.Study, SearchHeader]]:
    """The study of a search, new or gone on with, and its header with the seed.

    Without `resume` an earlier file is set aside as ``<name>.previous``.

    Args:
        storage: where the trials are kept.
        header: the search.
        resume: go on with the search in the storage, or begin it where there is none; another
            process may be at work on it.

    Raises:
        UsageError: the storage can't be used, is in use by a search that is not resumed, or holds
            another search.
        VarMoeError: it fails later on.
    """
    import optuna

    if storage is None and resume:
        raise UsageError("resume: needs the storage of the search to go on with")
    where = shown(storage)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # a search tells its own progress
    kept: optuna.storages.BaseStorage | None = None
    try:
        kept = _opened(storage, resume=resume)
        with _one_line(where):
            study, created = _study(kept, where, resume=resume)
            yield study, _begun(study, header, where, created=created)
    finally:
        if kept is not None:
            with suppress(Exception):
                kept.remove_session()
        optuna.logging.set_verbosity(verbosity)


def has_search(storage: Storage) -> bool:
    """Whether there is a search to go on with."""
    path = _path(storage)
    if path is not None:
        return path.is_file() and path.stat().st_size > 0
    if storage is None:
        return False
    import optuna

    return STUDY_NAME in optuna.get_all_study_names(_opened(storage, resume=True))


def check_storage(storage: Storage, *, resume: bool) -> None:
    """Refuse, before any work is done, what can't be searched in.

    Raises:
        UsageError: a file can't be written; a database can't be used, or holds a search that is
            not resumed.
    """
    path = _path(storage)
    if path is not None:
        check_output_folder(path.parent)
    elif has_search(storage) and not resume:
        raise _in_use(shown(storage))


def shown(storage: Storage) -> str:
    """A storage's name, for people and files: without the password of a URL."""
    if isinstance(storage, str) and "://" in storage:
        from sqlalchemy.engine import make_url

        with suppress(Exception):
            return make_url(storage).render_as_string(hide_password=True)
        return storage.partition("://")[0] + "://..."
    return str(storage) if isinstance(storage, str | Path) else type(storage).__name__


def _path(storage: Storage) -> Path | None:
    """The file, where the storage is one."""
    if isinstance(storage, Path) or (isinstance(storage, str) and "://" not in storage):
        return Path(storage)
    return None


def _opened(storage: Storage, *, resume: bool) -> optuna.storages.BaseStorage:
    import optuna

    if storage is None:
        return optuna.storages.InMemoryStorage()
    if isinstance(storage, optuna.storages.BaseStorage):
        return storage
    path = _path(storage)
    return _database(str(storage)) if path is None else _file(path, resume=resume)


def _study(
    storage: optuna.storages.BaseStorage, where: str, *, resume: bool
) -> tuple[optuna.Study, bool]:
    """The study, and whether this process created it."""
    import optuna

    if STUDY_NAME not in optuna.get_all_study_names(storage):
        with suppress(optuna.exceptions.DuplicatedStudyError):  # another process was faster
            made = optuna.create_study(storage=storage, study_name=STUDY_NAME, direction="maximize")
            return made, True
    if not resume:
        raise _in_use(where)
    return optuna.load_study(storage=storage, study_name=STUDY_NAME), False


def _in_use(where: str) -> UsageError:
    return UsageError(
        f"{where}: holds a search already; go on with it, or join it, by resume (--resume), or "
        "choose another storage"
    )


def _begun(study: optuna.Study, header: SearchHeader, where: str, *, created: bool) -> SearchHeader:
    """The header of the search, written by whoever created the study."""
    deadline = time.monotonic() + _HEADER_SECONDS
    while not created and (stored := read_header(study)) is None:
        if study.get_trials(deepcopy=False):
            raise UsageError(f"{where}: holds a study of another program")
        created = time.monotonic() > deadline  # its creator is gone
        time.sleep(0.05)
    if created:
        seed = header.seed
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1)[0])
        write_header(study, replace(header, seed=seed))
        stored = read_header(study)
    assert stored is not None
    header.check_same(stored, source=where)
    return stored


@contextmanager
def _one_line(where: str) -> Iterator[None]:
    """Whatever a storage raises, as one line."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        raise VarMoeError(
            f"{where}: the storage failed ({_reason(error)}); what was finished is in it, and "
            "--resume goes on"
        ) from error


def _reason(error: BaseException) -> str:
    """The first line of what a database's driver said."""
    cause = error
    while (deeper := getattr(cause, "orig", None) or cause.__cause__) is not None:
        cause = deeper
    return " ".join(f"{cause}".split("\n")[0].split()) or type(cause).__name__


def _database(url: str) -> optuna.storages.BaseStorage:
    """A database, by its URL; UsageError where its driver is missing or it can't be reached."""
    from optuna.storages import RDBStorage
    from sqlalchemy import event
    from sqlalchemy.exc import IntegrityError

    options: dict[str, Any] = {"pool_pre_ping": True}  # a connection may end during an evaluation
    sqlite = url.startswith("sqlite")
    if sqlite:  # seconds to wait while others write, and no transactions begun by the driver
        options["connect_args"] = {"timeout": 60, "isolation_level": None}
    for attempt in (1, 2, 3):
        try:
            storage = RDBStorage(url, engine_kwargs=options)
        except Exception as error:
            # Of two that make the tables of a new database at once, one fails.
            raced = isinstance(error, IntegrityError) or "exists" in str(error)
            if attempt < 3 and raced:
                time.sleep(1.0)
                continue
            missing = isinstance(error, ImportError)
            fault = "its driver is not installed" if missing else "can't be used"
            raise UsageError(f"storage {shown(url)}: {fault} ({_reason(error)})") from error
        if sqlite:
            event.listen(storage.engine, "begin", _lock)
        return storage
    raise AssertionError


def _lock(connection: sqlalchemy.Connection) -> None:
    """Begin a transaction of SQLite with the lock for writing.

    The driver begins one at the first write. Optuna has read a trial's state by then, so that two
    processes could take one waiting trial.
    """
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _file(path: Path, *, resume: bool) -> optuna.storages.BaseStorage:
    """A file in the format of Optuna's journal, with whole lines only.

    Raises:
        UsageError: it can't be created, is damaged, or is in use and not resumed.
    """
    check_output_folder(path.parent)
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; expected a file")
    if not resume and has_search(path):
        if _at_work(path):
            raise UsageError(
                f"{path}: another run is using it; join it by resume (--resume), wait for it, or "
                "choose another folder"
            )
        path.replace(path.with_name(path.name + ".previous"))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return _journal(path)
    except OSError:
        raise
    except Exception as error:  # lines of another program or version fail in many ways
        raise UsageError(
            f"{path}: damaged, or not a study of this version ({type(error).__name__}: {error}); "
            "start anew without resume"
        ) from error


def _journal(path: Path) -> optuna.storages.BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    class SystemLock(JournalFileOpenLock):
        """The system's lock on the file itself: it ends with the process that holds it, unlike
        Optuna's lock files. Who takes it cuts off a line that a kill left unfinished."""

        _held: IO[bytes]

        def acquire(self) -> bool:
            self._held = path.open("ab+", buffering=0)
            fcntl.flock(self._held, fcntl.LOCK_EX)
            _cut_torn_line(path, self._held)
            return True

        def release(self) -> None:
            self._held.close()

    lock = (JournalFileOpenLock if fcntl is None else SystemLock)(str(path))
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def _at_work(path: Path) -> bool:
    """Whether a process is at work on the search in a file."""
    import optuna

    try:
        study = optuna.load_study(storage=_journal(path), study_name=STUDY_NAME)
        return any(not is_lost(trial) for trial in Trials.of(study).running)
    except OSError:
        raise
    except Exception:  # a file that can't be read is in nobody's use
        return False


def _cut_torn_line(path: Path, log: IO[bytes]) -> None:
    """Cut off a last line that a kill or a crash left unfinished, or the next would be joined."""
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - 1))
    if log.read(1) in (b"", b"\n"):
        return
    log.seek(0)
    log.truncate(log.read().rfind(b"\n") + 1)
    os.fsync(log.fileno())
    _LOG.warning("%s: the last line was torn by an interruption and is left out", path)
