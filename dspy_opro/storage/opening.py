"""Opens Optuna's storages: the journal file of a run's directory, a URL, or a storage that the user made."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage

from dspy_opro.programs.secrets import without_password

from .lock import IS_AVAILABLE, FileLock

JOURNAL_NAME = "journal.log"

LOCK_SECONDS = 30.0
"""How long a write waits for another process that writes to the same journal."""


class JournalLock(JournalFileOpenLock):
    """A lock that dies with its process, and that leaves no torn line behind.

    Optuna's own locks are files: a process killed while it holds one blocks the next for 30 seconds (5.0) or
    for ever (4.0). And a line that a full disk or a killed process left unfinished swallows the next one,
    so that the journal cannot be read any more (seen with 4.0 and 5.0): it is cut off, as its writer never
    learnt that it was written.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._lock = FileLock(path)

    def acquire(self) -> bool:
        self._lock.acquire(LOCK_SECONDS)
        cut_torn_line(self._lock.descriptor)
        return True

    def release(self) -> None:
        self._lock.release()


def cut_torn_line(descriptor: int) -> None:
    """Truncate a journal behind its last complete line."""
    end = size = os.lseek(descriptor, 0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 65536)
        os.lseek(descriptor, start, os.SEEK_SET)
        end = start + os.read(descriptor, end - start).rfind(b"\n") + 1
        if end > start:
            break
    if end < size:
        os.ftruncate(descriptor, end)


def journal_storage(log_dir: str | os.PathLike[str]) -> BaseStorage:
    """The journal file of a run's directory.

    Raises:
        ValueError: The file can't be written, or a line of it is damaged.
    """
    path = Path(log_dir).absolute() / JOURNAL_NAME  # the program may change the working directory
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = JournalLock(str(path)) if IS_AVAILABLE else JournalFileOpenLock(str(path))
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    except OSError as error:
        raise ValueError(f"{path} can't be written: {error}. Use a log_dir that can be written.") from error
    except Exception as error:
        number = _damaged_line(path)
        if number is None:
            raise
        raise ValueError(
            f"{path} is damaged: line {number} is not a JSON object. Restore the file from a copy, or keep its first "
            f"{number - 1} lines (head -n {number - 1}), and compile again: the run goes on from there."
        ) from error


def _damaged_line(path: Path) -> int | None:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                is_object = isinstance(json.loads(line), dict)
            except ValueError:
                is_object = False
            if not is_object:
                return number
    return None


def storage_of(study: optuna.Study) -> tuple[BaseStorage, int]:
    """A study's storage and its id there.

    `Study` has no public way to write all attributes at once, to report to a trial of an earlier process, or
    to give a pruned trial a value. `BaseStorage`, which every storage implements alike in Optuna 4.0 to 5.0,
    has.
    """
    return study._storage, study._study_id


def opened(storage: str | BaseStorage | None, makes_tables: bool = True) -> BaseStorage:
    """A storage, also by its URL. With `makes_tables=False` a database stays as it is.

    Raises:
        ValueError: It can't be opened, however long one waits.
    """
    try:
        if not isinstance(storage, (str, BaseStorage, type(None))):
            raise TypeError(f"it is of type {type(storage).__name__}")
        if isinstance(storage, str) and re.fullmatch(r"sqlite[+\w]*:///?(:memory:)?", storage):
            raise ValueError(
                "every thread would have a database of its own. To keep nothing, leave storage out"
            )
        if isinstance(storage, str) and not makes_tables:
            storage = RDBStorage(storage, skip_table_creation=True)
        return optuna.storages.get_storage(storage)
    except Exception as error:
        if not _is_final(error):
            raise
        shown = without_password(storage)
        cause = "" if "@" in str(error) else str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"storage {shown!r} can't be opened: {cause or type(error).__name__}. Write e.g. sqlite:///qa.db, in a "
            "folder that exists, or postgresql://... or mysql+pymysql://..., with the driver that "
            "'dspy-opro[postgresql]' or 'dspy-opro[mysql]' installs; or pass an Optuna storage."
        ) from error


def _is_final(error: Exception) -> bool:
    """Whether no later attempt can succeed: a malformed URL, a missing driver or a missing folder."""
    is_bad_url = any(kind.__name__ == "ArgumentError" for kind in type(error).__mro__)  # SQLAlchemy's
    is_no_folder = "unable to open database file" in str(error)  # SQLite's
    return is_bad_url or is_no_folder or isinstance(error, (ValueError, TypeError, ImportError))


_quiet_lock = threading.Lock()
_verbosities: list[int] = []
"""What each `quiet_optuna` that is under way found."""


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keep Optuna from announcing auxiliary studies on stderr. Several threads may do so at once."""
    with _quiet_lock:
        verbosity = optuna.logging.get_verbosity()
        _verbosities.append(verbosity)
        optuna.logging.set_verbosity(max(verbosity, optuna.logging.WARNING))
    try:
        yield
    finally:
        with _quiet_lock:
            first = _verbosities[0]
            _verbosities.pop()
            if not _verbosities:  # the last one to leave brings back what the first one found
                optuna.logging.set_verbosity(first)
