"""Calls in daemon threads: one that hangs holds up neither the run nor the end of the process.

`anyio.to_thread` and `concurrent.futures` join their threads when the interpreter ends, so that a program
that hangs would keep a finished script alive.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
_Job = tuple[contextvars.Context, Callable[[], Any], "asyncio.Future[Any]", asyncio.AbstractEventLoop]


class DaemonThreads:
    """Runs functions in threads of its own; as many as calls are awaited at once, kept for the next ones."""

    def __init__(self, name: str = "dspy_opro") -> None:
        self._name = name
        self._idle: list[SimpleQueue[_Job | None]] = []
        self._lock = threading.Lock()
        self._closed = False

    async def run(self, function: Callable[[], T]) -> T:
        """Await `function()`, called in a thread that sees a copy of this task's context.

        Cancelled, it returns at once and leaves the call to itself; its result is dropped.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        with self._lock:
            queue = self._idle.pop() if self._idle else None
        if queue is None:
            queue = SimpleQueue()
            threading.Thread(target=self._work, args=(queue,), name=self._name, daemon=True).start()
        queue.put((contextvars.copy_context(), function, future, loop))
        result: T = await future
        return result

    def close(self) -> None:
        """Let idle threads end; busy ones end after their call."""
        with self._lock:
            self._closed = True
            for queue in self._idle:
                queue.put(None)
            self._idle.clear()

    def _work(self, queue: SimpleQueue[_Job | None]) -> None:
        while True:
            job = queue.get()
            if job is None:
                return
            context, function, future, loop = job
            result, error = None, None
            try:
                result = context.run(function)
            except BaseException as caught:
                error = caught
            with self._lock:
                closed = self._closed
                if not closed:
                    self._idle.append(queue)
            try:
                loop.call_soon_threadsafe(_settle, future, result, error)
            except RuntimeError:  # the loop is closed: nobody waits any more
                return
            if closed:
                return
            del job, context, function, future, loop, result, error


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():  # cancelled
        return
    if error is None:
        future.set_result(result)
    elif isinstance(error, StopIteration) or not isinstance(error, Exception):
        # A future takes no StopIteration; the others would end the loop's thread, or pass for a cancellation.
        future.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))
    else:
        future.set_exception(error)
