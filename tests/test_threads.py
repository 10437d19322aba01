"""Calls in daemon threads: a context of their own, results and errors as they are, and nothing waits for a hung one."""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys
import threading
import time
from typing import Any

import anyio
import pytest

from dspy_opro import threads as threads_module
from dspy_opro.threads import DaemonThreads

VALUE: contextvars.ContextVar[str] = contextvars.ContextVar("value", default="default")


async def test_results_and_errors_come_back_as_they_are() -> None:
    threads = DaemonThreads()
    assert await threads.run(lambda: 1 + 1) == 2
    with pytest.raises(ZeroDivisionError):
        await threads.run(lambda: 1 // 0)
    threads.close()


async def test_a_call_sees_a_copy_of_its_tasks_context() -> None:
    threads = DaemonThreads()

    def work() -> str:
        before = VALUE.get()
        VALUE.set("changed")
        return before

    VALUE.set("mine")
    assert [await threads.run(work) for _ in range(3)] == ["mine"] * 3
    assert VALUE.get() == "mine"
    threads.close()


async def test_a_thread_serves_one_call_after_the_other() -> None:
    threads = DaemonThreads()
    used = {await threads.run(threading.get_ident) for _ in range(50)}
    assert len(used) <= 2  # it is free again before its result is there
    assert threading.get_ident() not in used
    threads.close()


async def test_as_many_threads_as_calls_at_once() -> None:
    threads = DaemonThreads("many")
    barrier = threading.Barrier(20, timeout=20)
    await asyncio.gather(*(threads.run(barrier.wait) for _ in range(20)))
    assert sum(thread.name == "many" for thread in threading.enumerate()) == 20
    threads.close()


async def test_a_cancelled_call_is_left_to_itself() -> None:
    threads, end, done = DaemonThreads("left"), threading.Event(), threading.Event()

    def hang() -> None:
        end.wait(20)
        done.set()

    started = time.monotonic()
    with anyio.move_on_after(0.1) as scope:
        await threads.run(hang)
    assert scope.cancelled_caught
    assert time.monotonic() - started < 5
    assert await threads.run(lambda: 7) == 7  # another thread is there
    end.set()
    assert done.wait(5)
    threads.close()


@pytest.mark.parametrize(
    "error", [StopIteration, KeyboardInterrupt, SystemExit, asyncio.CancelledError, GeneratorExit]
)
async def test_errors_that_would_end_the_loop_or_the_task_are_ordinary_ones(error: Any) -> None:
    """A program that raises one of these fails on its example; it neither stops nor stalls the run."""
    threads = DaemonThreads()

    def work() -> None:
        raise error("why")

    with pytest.raises(RuntimeError, match=f"{error.__name__}: why"):
        await threads.run(work)
    threads.close()


async def test_a_call_has_an_awaitable_resolved_on_the_loop_in_its_own_context() -> None:
    threads, here = DaemonThreads(), threading.get_ident()

    async def answer() -> tuple[bool, str]:
        await asyncio.sleep(0)
        return threading.get_ident() == here, VALUE.get()

    def work() -> Any:
        VALUE.set("the call's")
        return threads.resolve(answer()), threads.resolve(7)

    assert await threads.run(work) == ((True, "the call's"), 7)
    threads.close()


async def test_what_a_cancelled_call_waits_for_is_cancelled_too() -> None:
    threads, seen = DaemonThreads(), asyncio.Event()

    async def hang() -> None:
        try:
            await asyncio.sleep(20)
        except asyncio.CancelledError:
            seen.set()
            raise

    with anyio.move_on_after(0.1):
        await threads.run(lambda: threads.resolve(hang()))
    await asyncio.wait_for(seen.wait(), 5)
    threads.close()


async def test_closing_ends_idle_and_busy_threads() -> None:
    threads, end = DaemonThreads("closing"), threading.Event()
    busy = asyncio.ensure_future(threads.run(lambda: end.wait(20)))
    await threads.run(lambda: None)
    threads.close()
    end.set()
    assert await busy is True
    for _ in range(200):
        if not any(thread.name == "closing" for thread in threading.enumerate()):
            return
        await asyncio.sleep(0.01)
    pytest.fail("A closed thread lives on.")


def test_a_hung_call_does_not_keep_the_process() -> None:
    code = """
import asyncio, runpy, sys, threading

DaemonThreads = runpy.run_path(sys.argv[1])["DaemonThreads"]  # without the second that DSPy takes to be imported

async def main():
    threads = DaemonThreads()
    try:
        await asyncio.wait_for(threads.run(threading.Event().wait), 0.1)
    except asyncio.TimeoutError:
        print("left")

asyncio.run(main())
"""
    command = [sys.executable, "-c", code, threads_module.__file__]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == "left\n"


def test_a_call_that_ends_after_its_loop_does_no_harm() -> None:
    threads, end = DaemonThreads("late"), threading.Event()

    async def main() -> None:
        with anyio.move_on_after(0.05):
            await threads.run(lambda: end.wait(20))

    asyncio.run(main())
    end.set()
    for _ in range(200):
        if not any(thread.name == "late" for thread in threading.enumerate()):
            return
        time.sleep(0.01)
    pytest.fail("The thread lives on.")
