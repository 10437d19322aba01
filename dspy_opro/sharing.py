"""One worker's dealings with the others: what it takes on, and when it writes to the storage and reads it.

A busy worker comes by seldom and claims ahead; an idle one comes often. The storage's own speed sets the pace.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import anyio

from . import recording
from .protocols import SharedStore
from .threads import DaemonThreads
from .work import Ask, Work, work_key

logger = logging.getLogger("dspy_opro")

LONGEST_SECONDS = 2.0
"""Between two visits to the storage, at most."""
GRACE_SECONDS = 0.5
"""How long work is left to the worker whose turn it is."""


@dataclass
class _Open:
    """Work that was handed out and has no answer yet."""

    work: Work
    turn: int
    """Its number among the asks or among the blocks: the same for all workers, so that each has its own."""
    since: float
    is_asked_for: bool = False
    """Whether the next visit claims it."""
    is_taken: bool = False
    """Whether this worker has it in hand."""

    @property
    def size(self) -> int:
        return 1 if isinstance(self.work, Ask) else self.work.stop - self.work.start


class Desk:
    """Open work and the visits to the storage.

    Args:
        store: The storage.
        num_threads: Calls that this worker has in flight at most.
        learn: Takes in what a visit brought; called on the loop's thread.
    """

    def __init__(self, store: SharedStore, num_threads: int, learn: Callable[[], None]) -> None:
        self._store = store
        self._num_threads = num_threads
        self._learn = learn
        self._open: dict[str, _Open] = {}  # work key -> work
        self._threads = DaemonThreads("dspy_opro desk")
        self._wake: anyio.Event | None = None  # of the wait for the next visit
        self._stock = max(1, num_threads // 2)  # calls to have waiting for a thread
        self._ran_dry = False  # whether threads waited for an answer to a claim
        self._cost = 0.01  # seconds that a visit takes, smoothed
        self._last_visit = 0.0
        self._quiet_since = time.monotonic()
        self.is_idle = True
        """Whether threads have nothing to do."""
        self.is_lost = False
        """Whether the storage failed for too long."""
        self.is_leaving = False

    # -- work ------------------------------------------------------------------------------------

    def offer(self, work: Work, turn: int) -> None:
        """The search has handed it out, and nobody has answered it."""
        self._open[work_key(work)] = _Open(work, turn, time.monotonic())

    def answered(self, key: str) -> Work | None:
        """Somebody has answered it: the work, where it was open."""
        entry = self._open.pop(key, None)
        if key:
            self._quiet_since = time.monotonic()
        return None if entry is None else entry.work

    def take(self) -> list[Work]:
        """What this worker holds by now and has not in hand yet."""
        taken = []
        for entry in self._open.values():
            if not entry.is_taken and self._store.is_mine(entry.work):
                entry.is_taken = True
                taken.append(entry.work)
        return taken

    def claim(self, num_busy: int) -> None:
        """Ask for work: of its own turn ahead of need, of the others' only for idle threads.

        Args:
            num_busy: Calls in flight and waiting for a thread.
        """
        asked = sum(entry.size for entry in self._open.values() if entry.is_asked_for)
        room = self._num_threads - num_busy - asked
        self.is_idle = num_busy < self._num_threads
        self._ran_dry = self._ran_dry or (self.is_idle and asked > 0)
        chosen, ahead = [], room + self._stock
        for entry, is_own in self._by_turn() if ahead > 0 else ():
            if (ahead if is_own else room) <= 0:
                break
            chosen.append(entry.work)
            entry.is_asked_for = True
            ahead, room = ahead - entry.size, room - entry.size
        if chosen:
            self._store.claim(chosen)
            self.hurry()

    def _by_turn(self) -> list[tuple[_Open, bool]]:
        """Free work with whether it is this worker's turn: own first, then what others leave lying."""
        place, count = self._store.place
        free = [
            entry for entry in self._open.values()
            if not (entry.is_taken or entry.is_asked_for) and self._store.is_free(entry.work)
        ]  # fmt: skip
        own = [(entry, True) for entry in free if (entry.turn - 1) % count == place]
        latest = time.monotonic() - GRACE_SECONDS
        left = [
            (entry, False) for entry in free if (entry.turn - 1) % count != place and entry.since < latest
        ]
        first = len(left) * place // count  # each begins elsewhere, so that few want the same
        return own + left[first:] + left[:first]

    # -- visits ----------------------------------------------------------------------------------

    def hurry(self) -> None:
        """Something changed that may need a visit."""
        if self._wake is not None:
            self._wake.set()

    async def serve(self) -> None:
        """Visit the storage again and again, until cancelled."""
        failing_since, was_failing = 0.0, False
        while True:
            await self._until_due()
            started = time.monotonic()
            try:
                await self._threads.run(self._store.exchange)
            except Exception as error:
                if not was_failing:
                    failing_since, was_failing = started, True
                    words = recording.in_words(error)
                    logger.warning("The storage fails; calls under way go on, it is tried again: %s", words)
                if not self.is_lost and started - failing_since > recording.PATIENCE_SECONDS:
                    self.is_lost = True
                    logger.error("The storage is lost: %s", recording.in_words(error))
                    self._learn()
                await anyio.sleep(1.0)
                continue
            if was_failing:
                was_failing = False
                logger.warning("The storage is back; nothing is missing.")
            self._came_back(started)

    def _came_back(self, started: float) -> None:
        self._last_visit = time.monotonic()
        self._cost += 0.2 * (self._last_visit - started - self._cost)
        if self._ran_dry:
            self._stock, self._ran_dry = min(2 * self._stock, 4 * self._num_threads), False
        self._learn()
        for entry in self._open.values():
            entry.is_asked_for = False
        if not (self._store.is_member or self.is_leaving):
            self._store.rejoin([entry.work for entry in self._open.values() if entry.is_taken])

    async def _until_due(self) -> None:
        while (wait := self._last_visit + self._pause() - time.monotonic()) > 0:
            self._wake = anyio.Event()
            with anyio.move_on_after(wait):
                await self._wake.wait()

    def _pause(self) -> float:
        """Seconds between the last visit and the next: a busy worker spends 5% of its time there."""
        if self._store.has_post:
            return 0.0 if self.is_idle else min(20 * self._cost, LONGEST_SECONDS)
        if not self.is_idle:
            return LONGEST_SECONDS
        waited = self._last_visit - self._quiet_since
        return min(max(0.05, 10 * self._cost, 0.1 * waited), LONGEST_SECONDS)

    def close(self) -> None:
        self._threads.close()
