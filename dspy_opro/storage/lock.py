"""A lock on a file. It ends with its holder, even if the holder has forked children that live longer."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

IS_AVAILABLE = fcntl is not None

_descriptors: set[int] = set()  # of all locks of this process, held or waited for
_opening = threading.Lock()  # held while a descriptor is made or closed, so that no fork comes in between


class FileLock:
    """An exclusive lock on a file, between processes and between threads. It needs `fcntl`.

    A forked child has a copy of the descriptor, and the system frees the lock only when the last copy is closed. So
    a child closes its copies at once, and `release` unlocks explicitly.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self.descriptor = -1

    def acquire(self, seconds: float) -> None:
        """Take the lock. Wait for it at most this long.

        Raises:
            TimeoutError: Another holder still has it.
            OSError: The file can't be opened.
        """
        with _opening:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            _descriptors.add(descriptor)
        deadline, pause = time.monotonic() + seconds, 0.001
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    _close(descriptor)
                    raise TimeoutError(f"{self._path} has been locked for {seconds:g} seconds") from None
            except BaseException:
                _close(descriptor)
                raise
            else:
                self.descriptor = descriptor
                return
            time.sleep(pause)
            pause = min(2 * pause, 0.05)

    def release(self) -> None:
        """Free the lock. In a forked child, which does not have it, nothing happens."""
        if self.descriptor in _descriptors:
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            _close(self.descriptor)
        self.descriptor = -1


def is_locked(path: str | os.PathLike[str]) -> bool | None:
    """Whether someone holds the lock; None where the file can't tell. No right to write is needed, only to read."""
    try:
        with _opening:  # the lock of the probe ends with its only descriptor
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            finally:
                os.close(descriptor)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def _close(descriptor: int) -> None:
    with _opening:
        _descriptors.discard(descriptor)
        os.close(descriptor)


def _after_fork_in_child() -> None:
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()
    _opening.release()


if IS_AVAILABLE:
    os.register_at_fork(
        before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_after_fork_in_child
    )
