"""An append-only log on any Optuna storage: one finished trial per entry, whose number is its position.

Of all that Optuna's storages offer, creating a trial from a template is the one write that is atomic, ordered
and final on each of them; and finished trials are what their caches read only once.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.storages import BaseStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage
from optuna.trial import TrialState, create_trial

from .records import Record

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")

JOURNAL_NAME = "journal.log"
PART_SIZE = 30_000
"""Characters of one attribute. MySQL's TEXT takes 64 KB, and JSON inside JSON at most doubles."""


class JournalLock(JournalFileOpenLock):
    """A lock that dies with its process, and that leaves no torn line behind.

    Optuna's own locks are files: a process killed while it holds one blocks the next for 30 seconds (5.0) or
    for ever (4.0). And a line that a full disk or a killed process left unfinished swallows the next one,
    so that the journal cannot be read any more (seen with 4.0 and 5.0): it is cut off, as its writer never
    learnt that it was written.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._path = path
        self._descriptor = -1

    def acquire(self) -> bool:
        if fcntl is None:
            return super().acquire()
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        cut_torn_line(self._descriptor)
        return True

    def release(self) -> None:
        if fcntl is None:
            super().release()
        else:
            os.close(self._descriptor)  # which unlocks


def cut_torn_line(descriptor: int) -> None:
    """Truncate a journal behind its last complete line."""
    end = size = os.lseek(descriptor, 0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 65536)
        os.lseek(descriptor, start, os.SEEK_SET)
        newline = os.read(descriptor, end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)


def journal_storage(log_dir: str | os.PathLike[str]) -> BaseStorage:
    """The journal file of a run's directory."""
    directory = Path(log_dir)
    directory.mkdir(parents=True, exist_ok=True)
    path = str(directory / JOURNAL_NAME)
    return JournalStorage(JournalFileBackend(path, lock_obj=JournalLock(path)))


def storage_of(study: optuna.Study) -> tuple[BaseStorage, int]:
    """A study's storage and its id there.

    `Study` has no public way to write all attributes at once, to report to a trial of an earlier process, or
    to give a pruned trial a value. `BaseStorage`, which every storage implements alike in Optuna 4.0 to 5.0,
    has.
    """
    return study._storage, study._study_id


def opened(storage: str | BaseStorage | None) -> BaseStorage:
    """A storage, also by its URL.

    Raises:
        ValueError: It can't be opened, however long one waits.
    """
    try:
        if not isinstance(storage, (str, BaseStorage, type(None))):
            raise TypeError(f"it is of type {type(storage).__name__}")
        return optuna.storages.get_storage(storage)
    except Exception as error:
        if not _is_final(error):
            raise
        # The part of a URL with a user and a password, and the one with options, are left out.
        shown: object = storage
        if isinstance(storage, str):
            shown = re.sub(r"://.*@", "://***@", storage).partition("?")[0]
        cause = "" if "@" in str(error) else str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"storage {shown!r} can't be opened: {cause or type(error).__name__}. Write e.g. sqlite:///qa.db, in a "
            "folder that is there, or postgresql://... or mysql+pymysql://..., with the driver that "
            "'dspy-opro[postgresql]' or 'dspy-opro[mysql]' installs; or pass an Optuna storage."
        ) from error


def _is_final(error: Exception) -> bool:
    """Whether no later attempt can succeed: a malformed URL, a missing driver or a missing folder."""
    is_bad_url = any(kind.__name__ == "ArgumentError" for kind in type(error).__mro__)  # SQLAlchemy's
    is_no_folder = "unable to open database file" in str(error)  # SQLite's
    return is_bad_url or is_no_folder or isinstance(error, (ValueError, TypeError, ImportError))


def patiently(open_storage: Callable[[], T], attempts: int = 6) -> T:
    """Open a storage that others may be making at the same moment.

    Workers that start together find a new database half made: Optuna 4.0 to 5.0 looks whether its tables are
    there, then makes them, and fails where another process did so in between.
    """
    for attempt in range(1, attempts):
        try:
            return open_storage()
        except (ValueError, ImportError):
            raise
        except Exception:
            time.sleep(random.uniform(0.0, 0.5) * attempt)
    return open_storage()


class Log:
    """What happened in a run, in one order for every process that reads it."""

    def __init__(self, study: optuna.Study) -> None:
        self._storage, self._study_id = storage_of(study)
        self._num_read = 0
        self._seen: set[str] = set()

    def append(self, entry_id: str, *records: Record) -> None:
        """Write records as one entry: all of them are there, or none.

        Args:
            entry_id: Names the entry. Written again, as after a connection that broke before the answer came,
                it counts once.
            records: What happened.
        """
        text = json.dumps(records)
        if len(text) <= PART_SIZE:
            attrs: dict[str, Any] = {"records": list(records)}
        else:
            parts = [text[i : i + PART_SIZE] for i in range(0, len(text), PART_SIZE)]
            attrs = {f"part{number}": part for number, part in enumerate(parts)}
        attrs["entry"] = entry_id
        # Pruned is the finished state that needs no value.
        entry = create_trial(state=TrialState.PRUNED, user_attrs=attrs)
        self._storage.create_new_trial(self._study_id, template_trial=entry)

    def read(self) -> list[Record]:
        """The records written since the last call, own ones included, in order."""
        entries = self._storage.get_all_trials(self._study_id, deepcopy=False)[self._num_read :]
        self._num_read += len(entries)
        records: list[Record] = []
        for entry in entries:
            if entry.user_attrs["entry"] not in self._seen:
                self._seen.add(entry.user_attrs["entry"])
                records += _records(entry.user_attrs)
        return records

    def beat(self, worker: str, count: int) -> None:
        """Let the others see that a worker is there."""
        self._storage.set_study_user_attr(self._study_id, f"beat {worker}", count)

    def beats(self) -> dict[str, object]:
        """Worker -> its count."""
        attrs = self._storage.get_study_user_attrs(self._study_id)
        return {name[5:]: count for name, count in attrs.items() if name.startswith("beat ")}


def _records(attrs: dict[str, Any]) -> list[Record]:
    if "records" in attrs:
        return list(attrs["records"])
    return list(json.loads("".join(attrs[f"part{number}"] for number in range(len(attrs) - 1))))
