"""Worker threads await here what async programs, metrics and proposers return. A run has one event loop for them."""

from __future__ import annotations

import asyncio
import inspect
import threading
import traceback
from collections.abc import Awaitable
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar

T = TypeVar("T")

LAST_PATIENCE_SECONDS = 5.0
"""How long cancelled coroutines may clean up after the end of a run. The run does not wait for them."""


class ExampleTimeout(TimeoutError):
    """An example took longer than `example_timeout_seconds`. Trying again would take as long."""


class CallCancelled(RuntimeError):
    """A call was cancelled from outside, as by a loop that ends. Its example says nothing about the program."""


class EventLoop:
    """One event loop for all awaitables of a run: the caller's `loop`, or without one our own in a daemon thread.

    A provider's client belongs to the loop that first used it, so a run needs a single loop. Our own loop starts when
    the run first awaits something.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._loop = loop
        self._is_own = loop is None
        self._lock = threading.Lock()
        self._waiting: set[Future[Any]] = set()
        self._is_closed = False

    @property
    def is_callers(self) -> bool:
        """Whether it is the caller's loop, as in `acompile`."""
        return not self._is_own

    def resolve(self, value: Awaitable[T] | T, timeout_seconds: float | None = None) -> T:
        """The value. The loop awaits an awaitable, in the context of the calling thread.

        Raises:
            ExampleTimeout: The awaitable took longer than `timeout_seconds`. It is cancelled.
            CallCancelled: `close` has cancelled the awaitable, or somebody else has cancelled its task, e.g.
                `asyncio.run` at its end (Python 3.11 and later; earlier versions can't tell).
            RuntimeError: The awaitable was cancelled from within, or the run has ended.
        """
        if not inspect.isawaitable(value):
            return value
        cancels: list[BaseException] = []
        future = self._start(value, cancels)
        try:
            result: T = future.result(timeout_seconds)
        except FutureTimeoutError:
            if future.done():  # the awaitable itself raised this error
                raise
            future.cancel()
            raise ExampleTimeout(f"no score within example_timeout_seconds={timeout_seconds:g}") from None
        except CancelledError as error:
            if cancels or self._is_closed:
                raise CallCancelled("CancelledError: the call was cancelled from outside.") from error
            raise RuntimeError("CancelledError: the call was cancelled from within.") from error
        finally:
            self._waiting.discard(future)
        return result

    def _start(self, value: Awaitable[T], cancels: list[BaseException]) -> Future[T]:
        with self._lock:
            if self._is_closed:
                if inspect.iscoroutine(value):
                    value.close()
                raise RuntimeError("the run has ended.")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_run, args=[self._loop], name="dspy_opro loop", daemon=True).start()
            future = asyncio.run_coroutine_threadsafe(_guarded(value, cancels), self._loop)
            self._waiting.add(future)
        return future

    def close(self) -> None:
        """Cancel what the loop still awaits, and end a loop of our own."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            for future in tuple(self._waiting):
                future.cancel()
            if self._is_own and self._loop is not None:
                self._loop.call_soon_threadsafe(self._loop.stop)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Run our own loop until its end. Cancelled coroutines may then clean up for a moment."""
    loop.run_forever()
    tasks = asyncio.all_tasks(loop)
    for task in tasks:  # also those that a library has started: LiteLLM's logging worker in DSPy 3.0
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=LAST_PATIENCE_SECONDS))
    loop.close()


async def _guarded(value: Awaitable[T], cancels: list[BaseException]) -> T:
    """A KeyboardInterrupt or SystemExit of a program must not end the loop. `cancels` gets what came from outside."""
    try:
        return await value
    except asyncio.CancelledError as error:
        if getattr(asyncio.current_task(), "cancelling", int)():  # new in Python 3.11
            cancels.append(error)
        raise
    except (KeyboardInterrupt, SystemExit, GeneratorExit) as error:
        raise as_exception(error) from error


def as_exception(error: BaseException) -> Exception:
    """An error that the run handles like any other. KeyboardInterrupt and its like become a RuntimeError."""
    if isinstance(error, Exception):
        return error
    return RuntimeError(traceback.format_exception_only(error)[-1].strip())  # an error's own text may raise
