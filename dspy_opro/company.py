"""Who else works at a run: nobody, or workers that meet in the storage. The driver treats both alike."""

from __future__ import annotations

import logging
import threading
from collections.abc import Awaitable, Callable

import anyio

from .calls import Calls
from .protocols import SharedStore, Store
from .recording import LAST_PATIENCE_SECONDS, Recorder, in_words
from .sharing import Desk
from .waking import Bell
from .work import Answer, Work

logger = logging.getLogger("dspy_opro")

ONLY_HERE = frozenset({"interrupted", "timeout_seconds", "error", "storage_lost"})
"""Reasons that end one worker of a shared run; every other one ends the run for all."""


class Alone:
    """The only worker: all work is its own, and the search need not wait for the log."""

    is_shared = False
    is_lost = False
    end: str | None = None

    def __init__(self, store: Store, recorder: Recorder, calls: Calls) -> None:
        self._store = store
        self._recorder = recorder
        self._calls = calls

    def put(self, work: Work, turn: int) -> None:
        self._calls.put(work, self._store.parts(work))

    def take_on(self) -> None:
        pass

    def answered(self, key: str) -> Work | None:
        return None

    def learned(self) -> None:
        pass

    def keep(self, answer: Answer) -> None:
        self._recorder.put(answer)

    def agrees_to_end(self, reason: str) -> bool:
        return True

    async def serve(self) -> None:
        pass

    async def part(
        self, reason: str, wind_up: Callable[[], None], close: Callable[[], Awaitable[None]]
    ) -> None:
        wind_up()
        await close()

    def abandon(self) -> None:
        pass


class Together:
    """One of several workers, which do each other's work and decide alike, as all read the same log.

    Args:
        store: Where they meet.
        recorder: Shows the run, on the worker that leads.
        calls: This worker's.
        bell: Wakes this worker.
        learn: Takes in what is new in the log.
    """

    is_shared = True

    def __init__(
        self, store: SharedStore, recorder: Recorder, calls: Calls, bell: Bell, learn: Callable[[], None]
    ) -> None:
        self._store = store
        self._recorder = recorder
        self._calls = calls
        self._bell = bell
        self._desk = Desk(store, calls.limit, learn)
        self._has_asked = False

    @property
    def is_lost(self) -> bool:
        """Whether the storage failed for too long."""
        return self._desk.is_lost

    @property
    def end(self) -> str | None:
        """The reason that ends the run for all."""
        return self._store.end

    def put(self, work: Work, turn: int) -> None:
        """Nobody has answered it: see who does."""
        self._desk.offer(work, turn)

    def take_on(self) -> None:
        """Start what this worker holds by now, and ask for more."""
        for work in self._desk.take():
            self._calls.put(work, self._store.parts(work))
        self._desk.claim(self._calls.num_in_flight + self._calls.num_waiting)

    def answered(self, key: str) -> Work | None:
        """The log has an answer to it: the work, where it was open."""
        return self._desk.answered(key)

    def learned(self) -> None:
        """The log was read to its end."""
        if self._store.leads:
            self._recorder.put()  # this worker may keep the visible study only now

    def keep(self, answer: Answer) -> None:
        """Have an answer written down; the log will bring it back."""
        self._store.post(answer)
        self._desk.hurry()

    def agrees_to_end(self, reason: str) -> bool:
        """Whether this worker may end by itself; otherwise all do, once they read so at the same place of the log."""
        if reason in ONLY_HERE:
            return True
        if not self._has_asked:
            self._has_asked = True
            self._store.ask_to_end(reason)
            self._desk.hurry()
        return False

    async def serve(self) -> None:
        """Exchange what is new, until cancelled."""
        try:
            await self._desk.serve()
        finally:
            self._desk.close()

    async def part(
        self, reason: str, wind_up: Callable[[], None], close: Callable[[], Awaitable[None]]
    ) -> None:
        """Leave the others. All return the same best program, so what is under way anywhere is waited for."""
        store, goes_alone = self._store, reason in ONLY_HERE
        self._desk.is_idle = True
        if store.end is not None and not goes_alone:
            store.drain()
            await self._until(lambda: store.is_drained)
        wind_up()
        if not goes_alone:
            await self._until(lambda: store.is_shown or store.leads)
            if store.leads and not store.is_shown:
                await close()
                store.conclude()
        self._desk.is_leaving = True
        store.leave()
        self._bell.wish = None  # that wish is fulfilled; another one cuts the farewell short
        with anyio.move_on_after(LAST_PATIENCE_SECONDS):
            await self._until(lambda: not (store.has_post or store.is_member))

    def abandon(self) -> None:
        """Leave without waiting for anything; what was scored is still told, if the process lives long enough."""
        self._store.leave()
        threading.Thread(target=self._farewell, name="dspy_opro farewell", daemon=True).start()

    def _farewell(self) -> None:
        try:
            self._store.exchange()
        except Exception as error:
            logger.warning("The others are not told that this worker has left: %s", in_words(error))

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait for the others, as long as the storage is there and nobody interrupts."""
        while not (condition() or self.is_lost or self._bell.wish == "interrupted"):
            changed = self._bell.mute()
            self._desk.hurry()
            await changed.wait()
