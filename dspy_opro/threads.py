"""Calls in daemon threads: one that hangs holds up neither the run nor the end of the process.

`anyio.to_thread` and `concurrent.futures` join their threads when the interpreter ends, so that a program
that hangs would keep a finished script alive.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass
class _Job:
    """A call that a task awaits."""

    function: Callable[[], Any]
    context: contextvars.Context
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    """What the task awaits."""
    awaiting: Future[Any] | None = None
    """What the call waits for on the loop."""


class DaemonThreads:
    """Runs functions in threads of its own; as many as calls are awaited at once, kept for the next ones."""

    def __init__(self, name: str = "dspy_opro") -> None:
        self._name = name
        self._idle: list[SimpleQueue[_Job | None]] = []
        self._lock = threading.Lock()
        self._closed = False
        self._own = threading.local()  # `job` is the one that this thread is at

    async def run(self, function: Callable[[], T]) -> T:
        """Await `function()`, called in a thread that sees a copy of this task's context.

        Cancelled, it returns at once and leaves the call to itself; its result is dropped.
        """
        loop = asyncio.get_running_loop()
        job = _Job(function, contextvars.copy_context(), loop, loop.create_future())
        with self._lock:
            queue = self._idle.pop() if self._idle else None
        if queue is None:
            queue = SimpleQueue()
            threading.Thread(target=self._work, args=(queue,), name=self._name, daemon=True).start()
        queue.put(job)
        try:
            result: T = await job.future
        finally:
            if job.awaiting is not None:
                job.awaiting.cancel()
        return result

    def resolve(self, value: Awaitable[T] | T) -> T:
        """Within a call: the value, awaited where it can be, on the loop and in this thread's context."""
        if not inspect.isawaitable(value):
            return value
        job: _Job = self._own.job
        job.awaiting = asyncio.run_coroutine_threadsafe(_result_of(value), job.loop)
        if job.future.done():  # cancelled meanwhile
            job.awaiting.cancel()
        result: T = job.awaiting.result()
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
            job = self._own.job = queue.get()
            if job is None:
                return
            result, error = None, None
            try:
                result = job.context.run(job.function)
            except BaseException as caught:
                error = as_exception(caught)
            with self._lock:
                closed = self._closed
                if not closed:
                    self._idle.append(queue)
            try:
                job.loop.call_soon_threadsafe(_settle, job.future, result, error)
            except RuntimeError:  # the loop is closed: nobody waits any more
                return
            if closed:
                return
            self._own.job = None
            del job, result, error


async def _result_of(value: Awaitable[T]) -> T:
    return await value


def as_exception(error: BaseException) -> Exception:
    """What a call raised, as an error like any other.

    SystemExit or KeyboardInterrupt would end the loop's thread there, CancelledError pass for a cancellation, and a
    future takes no StopIteration.
    """
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():  # cancelled
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
