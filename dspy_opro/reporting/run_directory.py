"""The directory of a run: best program so far, report, result, settings, log, and a file named `stop` to end the run.

A file is complete or does not exist. If a file cannot be written, the run logs it once and goes on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dspy_opro.programs.errors import in_brief
from dspy_opro.storage.lock import IS_AVAILABLE, FileLock, is_locked

logger = logging.getLogger("dspy_opro")

BEST, CONFIG, LOG, STOP, LOCK = "best.json", "config.json", "run.log", "stop", "lock"
REPORT, RESULT = "report.html", "result.json"


class RunDirectory:
    """The files in `log_dir`. The directory is made if it does not exist.

    Raises:
        ValueError: The directory can't be made or written.
        RuntimeError: Another process uses the directory.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()  # the program may change the working directory
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"log_dir {str(self.path)!r} can't be made: {error}.") from error
        foreign = [name for name in (BEST, CONFIG, REPORT, RESULT) if (self.path / name).exists()]
        if foreign and not any((self.path / name).exists() for name in (LOCK, LOG)):
            raise ValueError(
                f"log_dir {str(self.path)!r} has {', '.join(foreign)}, and no run wrote that: a run would replace it. "
                "Use a directory of its own."
            )
        self._lock = self._take_lock()
        self._handler = _LogFile(self.path / LOG, encoding="utf-8", delay=True)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
        logger.addHandler(self._handler)
        self.log(
            "process %d started, dspy_opro %s, dspy %s", os.getpid(), version("dspy_opro"), version("dspy")
        )
        self._complaints: set[str] = set()

    def _take_lock(self) -> FileLock:
        path = self.path / LOCK
        lock = FileLock(path)
        try:
            if IS_AVAILABLE:
                lock.acquire(seconds=0.0)
            path.write_text(f"{os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        except TimeoutError:
            rule = f"log_dir {str(self.path)!r} is in use by process {path.read_text(encoding='utf-8') or 'unknown'}."
            raise RuntimeError(f"{rule} Wait for it, or use another log_dir.") from None
        except OSError as error:
            rule = f"log_dir {str(self.path)!r} can't be written: {error}."
            raise ValueError(f"{rule} Use a directory that can be written.") from error
        return lock

    def write_config(self, config: Mapping[str, Any]) -> None:
        """`config.json`: the settings of the latest process. The result and the `stop` of an earlier one go."""
        for name in RESULT, STOP:
            with contextlib.suppress(OSError):
                (self.path / name).unlink()
        text = json.dumps(config, indent=2, default=repr) + "\n"
        self.write(CONFIG, lambda path: path.write_text(text, encoding="utf-8"))

    def write(self, name: str, save: Callable[[Path], object]) -> bool:
        """Write a file of the directory whole: `save` writes it to a path. Whether that worked."""
        part = self.path / f".{name}"  # one name, so that a killed process leaves no more than one such file
        try:
            save(part)
            part.replace(self.path / name)
        except Exception as error:
            part.unlink(missing_ok=True)
            if name not in self._complaints:
                self._complaints.add(name)
                path = self.path / name
                logger.warning("%s cannot be written; the run goes on: %s", path, in_brief(error))
            return False
        return True

    def take_stop(self) -> bool:
        """Whether there is a file `stop`. It is removed, so that the next process does not stop."""
        stop = self.path / STOP
        try:
            stop.unlink()
        except FileNotFoundError:
            return False
        except OSError:
            return stop.exists()
        return True

    def log(self, message: str, *values: object) -> None:
        """Write a line to `run.log`."""
        record = logging.LogRecord(logger.name, logging.INFO, __file__, 0, message, values, None)
        self._handler.handle(record)

    def close(self) -> None:
        logger.removeHandler(self._handler)
        self._handler.close()
        self._lock.release()


def is_in_use(path: Path) -> bool | None:
    """Whether a process runs in the directory. None on Windows, and where the lock can't be read: nobody knows."""
    if not IS_AVAILABLE:
        return None
    return is_locked(path / LOCK) if (path / LOCK).is_file() else False


class _LogFile(logging.FileHandler):
    """A log file without a traceback for every line that a full disk refuses."""

    belongs_to_run = True

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        pass
