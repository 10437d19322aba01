"""Ctrl-C and SIGTERM: the first one ends the run gracefully, the second one at once."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

logger = logging.getLogger("dspy_opro")


@contextmanager
def interrupts(request_stop: Callable[[str], None]) -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into `request_stop("interrupted")`; a second one is handled as before.

    Signals reach the main thread only; elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}

    def handler(number: int, frame: FrameType | None) -> None:
        for known, previous in before.items():
            signal.signal(known, previous)
        # First: the log may raise an error if the signal came during a write to it.
        request_stop("interrupted")
        logger.warning("Finishing running calls. Press Ctrl-C again to stop now.")

    for stop in (signal.SIGINT, signal.SIGTERM):
        previous = signal.getsignal(stop)
        # A handler that is not Python's, or an ignored signal, stays as it is.
        if previous is not None and previous is not signal.SIG_IGN:
            before[stop] = previous
            signal.signal(stop, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
