"""Which workers are still there: each beats in the log study's attributes, and each watches the others.

Clocks of two machines are never compared: a worker is lost once its count stood still for `STALE_SECONDS` of
the watcher's own time. On the watcher's own machine the process is looked for, so that a killed worker's
work is taken over at once.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

BEAT_SECONDS = 5.0
STALE_SECONDS = 30.0


def new_worker() -> str:
    """A worker's name: the machine as far as processes see each other there, its process, and a random part."""
    return f"{_machine()}/{os.getpid()}/{_birth(os.getpid())}/{uuid.uuid4().hex[:12]}"


def _machine() -> str:
    name = socket.gethostname().replace("/", "-")
    try:  # two containers may share a host name, but not the process ids
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()[:8]
        return f"{name}.{boot}.{Path('/proc/self/ns/pid').readlink().name.strip('pid:[]')}"
    except OSError:
        return name


def _birth(pid: int) -> str:
    """When a process began, in the kernel's own count: a later one with the same id began at another time."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()
    return "dead" if state in "ZX" else fields[18]


def is_gone(worker: str) -> bool:
    """Whether it ran on this machine and its process exists no more; False where that cannot be known."""
    machine, pid, birth, _ = worker.split("/")
    if machine != _machine() or not birth:
        return False
    return _birth(int(pid)) != birth


class Watch:
    """One worker's look at the others."""

    def __init__(self) -> None:
        self._seen: dict[
            str, tuple[object, float]
        ] = {}  # worker -> its count, and since when it stands there
        self._last_look = time.monotonic()

    def lost(self, others: Iterable[str], beats: Mapping[str, object]) -> list[str]:
        """Those whose count did not move for too long.

        Args:
            others: The workers to look for.
            beats: Worker -> its count.
        """
        now = time.monotonic()
        if now - self._last_look > STALE_SECONDS / 2:
            self._seen.clear()  # this process or the storage was away itself: nobody is to blame
        self._last_look = now
        stale = []
        for worker in others:
            count = beats.get(worker)
            known, since = self._seen.get(worker, (None, now))
            if worker not in self._seen or known != count:
                self._seen[worker] = count, now
            elif now - since > STALE_SECONDS:
                stale.append(worker)
        return stale
