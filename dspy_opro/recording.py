"""The recorder: writes what happened, in order, on a thread of its own, so that no call waits for a storage.

A storage that fails is tried again while the run goes on; what queued up meanwhile is written at once.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence

from .work import Answer

logger = logging.getLogger("dspy_opro")

PATIENCE_SECONDS = 300.0
"""How long a storage may fail before the run ends."""
LAST_PATIENCE_SECONDS = 20.0
"""How long it may fail at the end of a run."""


class Recorder:
    """Calls `record` and `draw` until they work.

    Args:
        record: Writes answers.
        draw: Shows what was noted.
        on_lost: Called once, where the storage failed for longer than `PATIENCE_SECONDS`.
    """

    def __init__(
        self,
        record: Callable[[Sequence[Answer]], None],
        draw: Callable[[], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._record = record
        self._draw = draw
        self._on_lost = on_lost
        self._queue: list[Answer] = []
        self._due = False
        self._closing = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self.is_lost = False

    def put(self, *answers: Answer) -> None:
        """Have answers recorded, and whatever was noted drawn; from the loop's thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="dspy_opro recorder", daemon=True)
            self._thread.start()
        with self._changed:
            self._queue.extend(answers)
            self._due = True
            self._changed.notify()

    def release(self) -> None:
        """Let the thread end once all is written; nobody waits for it."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def close(self, last: Callable[[], None]) -> None:
        """Wait until all is written, then do the last step; gives up after `LAST_PATIENCE_SECONDS`."""
        self.release()
        if self._thread is not None:
            self._thread.join()
        if not self.is_lost:
            self._until_it_works(last)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._due or self._closing)
                if not self._due:
                    return
                answers, self._queue, self._due = self._queue, [], False
            if answers and not self.is_lost:
                self._until_it_works(functools.partial(self._record, answers))
            if not self.is_lost:
                self._until_it_works(self._draw)

    def _until_it_works(self, step: Callable[[], None]) -> None:
        started, delay = time.monotonic(), 0.1
        while True:
            try:
                step()
            except Exception as error:
                if delay == 0.1:
                    logger.warning("The storage fails; the run goes on and tries again: %s", in_words(error))
                patience = LAST_PATIENCE_SECONDS if self._closing else PATIENCE_SECONDS
                if time.monotonic() - started > patience:
                    self._give_up(error)
                    return
                time.sleep(delay)
                delay = min(2 * delay, 2.0)
            else:
                if delay > 0.1:
                    logger.warning("The storage is back; nothing is missing.")
                return

    def _give_up(self, error: Exception) -> None:
        self.is_lost = True
        logger.error(
            "The storage is lost; what was measured since it failed is not kept: %s", in_words(error)
        )
        self._on_lost()


def in_words(error: BaseException) -> str:
    """An error with its cause, in which databases say what is wrong."""
    cause = error.__cause__
    return f"{type(error).__name__}: {error}" + (f" ({cause})" if cause is not None else "")
