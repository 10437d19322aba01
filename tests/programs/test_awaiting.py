"""Awaitables from worker threads, on one loop: results and errors as they are, a time limit, and an end."""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from dspy_opro.programs import awaiting
from dspy_opro.programs.awaiting import CallCancelled, EventLoop, as_exception
from dspy_opro.programs.provider import judge

VALUE: contextvars.ContextVar[str] = contextvars.ContextVar("value", default="default")


@pytest.fixture
def own() -> Iterator[EventLoop]:
    """A loop in a thread of its own."""
    loop = EventLoop()
    yield loop
    loop.close()


def loop_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "dspy_opro loop"]


def wait_until(condition: Any) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("It does not come about.")


async def answer(value: Any, seconds: float = 0.0) -> Any:
    await asyncio.sleep(seconds)
    return value


async def hang(seen: list[str]) -> None:
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        seen.append("cancelled")
        raise


def test_what_is_no_awaitable_is_the_result_and_needs_no_loop(own: EventLoop) -> None:
    assert own.resolve(7) == 7
    assert loop_threads() == []


def test_results_and_errors_come_back_as_they_are(own: EventLoop) -> None:
    async def divide() -> float:
        return 1 / 0

    assert own.resolve(answer(2)) == 2
    with pytest.raises(ZeroDivisionError):
        own.resolve(divide())
    assert len(loop_threads()) == 1


def test_all_threads_share_one_loop(own: EventLoop) -> None:
    seen: list[Any] = []

    async def look() -> None:
        seen.append(asyncio.get_running_loop())
        while len(seen) < 8:  # all of them are awaited at once
            await asyncio.sleep(0.005)

    threads = [threading.Thread(target=own.resolve, args=[look()]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(seen) == 8
    assert len(set(seen)) == 1
    assert len(loop_threads()) == 1


async def test_it_is_awaited_on_the_callers_loop_in_the_context_of_the_calling_thread() -> None:
    loop, here = EventLoop(asyncio.get_running_loop()), threading.get_ident()

    async def look() -> tuple[bool, str]:
        await asyncio.sleep(0)
        return threading.get_ident() == here, VALUE.get()

    def work() -> Any:
        VALUE.set("the call's")
        return loop.resolve(look())

    assert await asyncio.to_thread(work) == (True, "the call's")
    assert VALUE.get() == "default"
    loop.close()


def test_what_takes_too_long_is_cancelled(own: EventLoop) -> None:
    seen: list[str] = []
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no score within example_timeout_seconds=0\.1"):
        own.resolve(hang(seen), 0.1)
    assert time.monotonic() - started < 5
    wait_until(lambda: seen == ["cancelled"])
    assert own.resolve(answer(7), 20) == 7


def test_a_timeout_of_the_awaitable_itself_keeps_its_words(own: EventLoop) -> None:
    async def fail() -> None:
        raise TimeoutError("the database")

    with pytest.raises(TimeoutError, match="the database"):
        own.resolve(fail(), 20)


@pytest.mark.parametrize("error", [StopIteration, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_errors_that_would_end_the_loop_are_ordinary_ones_and_the_loop_lives_on(
    error: Any, own: EventLoop
) -> None:
    async def leave() -> None:
        await asyncio.sleep(0)
        raise error("why")

    with pytest.raises(RuntimeError, match=error.__name__):
        own.resolve(leave())
    assert own.resolve(answer(7)) == 7


def test_a_call_that_cancels_itself_has_failed_and_the_loop_lives_on(own: EventLoop) -> None:
    async def leave() -> None:
        raise asyncio.CancelledError("why")

    with pytest.raises(RuntimeError, match="CancelledError: the call was cancelled from within"):
        own.resolve(leave())
    assert own.resolve(answer(7)) == 7


@pytest.mark.skipif(sys.version_info < (3, 11), reason="a task does not say that it was cancelled")
async def test_a_call_that_a_loop_cancels_at_its_end_says_nothing_about_the_program() -> None:
    loop = EventLoop(asyncio.get_running_loop())
    before = asyncio.all_tasks()
    run = asyncio.ensure_future(asyncio.to_thread(loop.resolve, hang([])))
    await asyncio.sleep(0.1)
    (call,) = asyncio.all_tasks() - before - {run}
    call.cancel()
    with pytest.raises(CallCancelled) as caught:
        await run
    assert judge(caught.value).kind == "transient"


def test_closing_cancels_what_is_awaited_and_ends_the_loops_own_thread() -> None:
    loop, seen, errors = EventLoop(), list[str](), list[BaseException]()

    def work() -> None:
        try:
            loop.resolve(hang(seen))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_until(loop_threads)
    time.sleep(0.05)
    loop.close()
    thread.join(5)
    assert not thread.is_alive()
    wait_until(lambda: seen == ["cancelled"])
    assert [type(error) for error in errors] == [CallCancelled]
    wait_until(lambda: not loop_threads())


async def test_closing_leaves_the_callers_loop_alone() -> None:
    loop, seen = EventLoop(asyncio.get_running_loop()), list[str]()
    task = asyncio.ensure_future(asyncio.to_thread(loop.resolve, hang(seen)))
    await asyncio.sleep(0.1)
    loop.close()
    with pytest.raises(CallCancelled, match="CancelledError"):
        await asyncio.wait_for(task, 5)
    await asyncio.sleep(0)
    assert seen == ["cancelled"]
    assert asyncio.get_running_loop().is_running()


@pytest.mark.parametrize("is_used", [False, True])
def test_nothing_is_awaited_after_the_end(is_used: bool) -> None:
    """A worker that was left behind may come back then."""
    loop, seen = EventLoop(), list[str]()
    if is_used:
        loop.resolve(answer(1))
    loop.close()
    wait_until(lambda: not loop_threads())
    with pytest.raises(RuntimeError):
        loop.resolve(hang(seen))
    assert loop_threads() == []
    loop.close()  # once more does no harm


def test_nothing_is_awaited_after_the_callers_loop_is_gone() -> None:
    async def main() -> EventLoop:
        return EventLoop(asyncio.get_running_loop())

    loop = asyncio.run(main())
    loop.close()
    with pytest.raises(RuntimeError):
        loop.resolve(answer(1))


def test_a_hung_call_does_not_keep_the_process() -> None:
    code = """
import asyncio, runpy, sys

# Without the second that DSPy takes to be imported.
loop = runpy.run_path(sys.argv[1])["EventLoop"]()
try:
    loop.resolve(asyncio.sleep(60), 0.1)
except TimeoutError:
    print("left")
import threading
threading.Thread(target=lambda: loop.resolve(asyncio.sleep(60)), daemon=True).start()
"""
    command = [sys.executable, "-c", code, awaiting.__file__]
    run = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert run.stdout == "left\n"


def test_what_a_call_raised_is_an_error_like_any_other() -> None:
    error = ValueError("why")
    assert as_exception(error) is error
    assert str(as_exception(SystemExit("why"))) == "SystemExit: why"
