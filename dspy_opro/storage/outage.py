"""A storage that fails for a while: the run goes on and every later write tries again."""

from __future__ import annotations

import logging
import threading
import time

from dspy_opro.programs.errors import in_brief

logger = logging.getLogger("dspy_opro")

PATIENCE_SECONDS = 300.0
"""How long a storage may fail before the run ends."""
LAST_PATIENCE_SECONDS = 20.0
"""How long it may fail at the end of a run."""


class Outage:
    """Since when a storage fails, over all writers of a run. It is over when all of them can write again."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}  # what can't be written -> since when
        self._lock = threading.Lock()
        self.is_lost = False
        """Whether it failed for longer than `PATIENCE_SECONDS`. That is final."""

    @property
    def is_under_way(self) -> bool:
        return bool(self._since)

    def failed(self, error: BaseException, what: str = "results") -> None:
        """A write of this kind has failed. The run needs no trials: a later process makes them from the results."""
        now = time.monotonic()
        with self._lock:
            is_first, since = not self._since, self._since.setdefault(what, now)
        if is_first:
            logger.warning("The storage fails; the run goes on and tries again: %s", _in_words(error))
        elif what == "results" and now - since > PATIENCE_SECONDS:
            self.lose(error)

    def worked(self, what: str = "results") -> None:
        """A write of this kind has worked."""
        with self._lock:
            has_failed = self._since.pop(what, None) is not None
            is_over = has_failed and not self._since
        if is_over:
            logger.warning("The storage works again. No result was lost.")

    def lose(self, error: BaseException) -> None:
        """The last attempt has failed."""
        with self._lock:
            was_lost, self.is_lost = self.is_lost, True
        if not was_lost:
            words = _in_words(error)
            logger.error("The storage is lost. What it has refused since its failure is not kept: %s", words)


def _in_words(error: BaseException) -> str:
    """An error with its cause, in which databases say what is wrong."""
    cause = error.__cause__
    return in_brief(error) + (f" ({in_brief(cause)})" if cause is not None else "")
