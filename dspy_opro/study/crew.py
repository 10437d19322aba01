"""Who works on a run and who has taken what: a function of the log alone, so that all agree on it.

Every worker reads the same records in the same order. Of several claims to one piece of work the first
counts, until its answer is there or its holder has left or was found lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .records import Record, record_key

Settings = Mapping[str, str]
"""Setting -> its value: what workers must agree on to take the same decisions."""


def joined(worker: str, settings: Settings) -> Record:
    return {"kind": "joined", "worker": worker, "settings": dict(settings)}


def claimed(worker: str, keys: Iterable[str]) -> Record:
    return {"kind": "claimed", "worker": worker, "keys": list(keys)}


def parted(kind: str, worker: str) -> Record:
    """`left`: it went itself; `lost`: another one found it gone; `drained`: it has told all that it will tell."""
    return {"kind": kind, "worker": worker}


def ended(worker: str, reason: str) -> Record:
    return {"kind": "ended", "worker": worker, "reason": reason}


def shown(worker: str) -> Record:
    """The visible study is complete."""
    return {"kind": "shown", "worker": worker}


class Crew:
    """The workers at a point of the log."""

    def __init__(self) -> None:
        self.members: dict[str, Settings] = {}  # worker -> its settings, in the order of joining
        self.end: str | None = None
        """Why the run ends for all of them; void as soon as somebody joins after all have left."""
        self.is_shown = False
        self._drained: set[str] = set()
        self._answered: set[str] = set()  # keys of answered work
        self._holders: dict[str, str] = {}  # key of claimed work -> worker

    def load(self, record: Record) -> None:
        """Go on by one record."""
        kind, worker = record["kind"], record.get("worker", "")
        if kind == "joined":
            if not self.members:
                self.end, self.is_shown = None, False
            self.members[worker] = record["settings"]
        elif kind in ("left", "lost"):
            self._remove(worker)
        elif kind == "claimed":
            self._claim(worker, record["keys"])
        elif kind == "ended":
            self.end = self.end or record["reason"]
        elif kind == "drained":
            self._drained.add(worker)
        elif kind == "shown":
            self.is_shown = True
        elif (key := record_key(record)) is not None:
            self._answered.add(key)
            self._holders.pop(key, None)

    def _claim(self, worker: str, keys: Iterable[str]) -> None:
        if worker in self.members:
            for key in keys:
                if key not in self._answered:
                    self._holders.setdefault(key, worker)

    def _remove(self, worker: str) -> None:
        self.members.pop(worker, None)
        self._drained.discard(worker)
        self._holders = {key: holder for key, holder in self._holders.items() if holder != worker}

    def holder(self, key: str) -> str | None:
        return self._holders.get(key)

    @property
    def leader(self) -> str | None:
        """The member that joined first: it keeps the visible study."""
        return next(iter(self.members), None)

    @property
    def is_drained(self) -> bool:
        """Whether no answer comes any more."""
        return self._drained.issuperset(self.members)

    def place(self, worker: str) -> tuple[int, int]:
        """The worker's place among the members, and how many there are."""
        order = list(self.members)
        return (order.index(worker) if worker in self.members else 0), max(1, len(order))


def differences(mine: Settings, theirs: Settings) -> list[str]:
    """What two workers do not agree on, in words."""
    names: dict[str, Any] = {**theirs, **mine}
    return [
        f"{name} is {theirs.get(name)} there and {mine.get(name)} here"
        for name in names
        if theirs.get(name) != mine.get(name)
    ]
