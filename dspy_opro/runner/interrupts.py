"""Ctrl-C and SIGTERM: the first one ends the run gracefully, the second one at once."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

logger = logging.getLogger("dspy_opro")

_runs: list[Callable[[str], object]] = []
"""`request_stop` of the runs that no signal has ended yet. Those of one event loop may end in any order."""
_before: dict[int, Any] = {}
"""Signal -> its handler before these runs."""


@contextmanager
def interrupts(request_stop: Callable[[str], object]) -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into `request_stop("interrupted")`; a second one is handled as before.

    Of several runs each signal ends the last one. Signals reach the main thread only; elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _runs.append(request_stop)
    for number in (signal.SIGINT, signal.SIGTERM) if len(_runs) == 1 else ():
        # A handler that is not Python's, or an ignored signal, stays as it is.
        if (previous := signal.getsignal(number)) not in (None, signal.SIG_IGN):
            _before[number] = previous
            signal.signal(number, _handle)
    try:
        yield
    finally:
        _remove(request_stop)


def _handle(*_: object) -> None:
    request_stop = _runs[-1]
    _remove(request_stop)
    # First: the log may raise an error if the signal came during a write to it.
    request_stop("interrupted")
    logger.warning("Finishing running calls. Press Ctrl-C again to stop now.")


def _remove(request_stop: Callable[[str], object]) -> None:
    while _runs == [request_stop] and _before:  # before the list is empty: a signal may come at any time
        signal.signal(*_before.popitem())
    with suppress(ValueError):  # a signal has removed it
        _runs.remove(request_stop)
