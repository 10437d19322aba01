"""The driver: keeps calls in flight while the search has work, until the search, a budget or an error ends it.

Who does a piece of work is `company.py`'s matter, and in which order the search is told `telling.py`'s.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import anyio

from .calls import Calls
from .company import Alone, Together
from .protocols import Executor, SharedStore, Store
from .recording import Recorder
from .search import Search
from .stopping import Budget, Ledger, Usage
from .telling import Telling
from .threads import DaemonThreads
from .trajectory import Outcome
from .waking import Bell
from .work import Answer, Event, Proposal, Work

TICK_SECONDS = 0.5


class Run:
    """One run of a search.

    Args:
        search: What is to be done next.
        executor: Does it.
        store: Remembers it.
        ledger: Counts it.
        budget: Limits in tokens, dollars and seconds; checked before every call.
        num_threads: Calls in flight at most, proposals and examples together.
        shared: The store, where other processes work on the same run.
    """

    def __init__(
        self,
        search: Search,
        executor: Executor,
        store: Store,
        ledger: Ledger,
        budget: Budget,
        num_threads: int,
        shared: SharedStore | None = None,
    ) -> None:
        self.search = search
        self.ledger = ledger
        self.on_event: Callable[[Event], None] = lambda event: None
        """Told what happens, on the loop's thread."""
        self.on_tick: Callable[[], None] = lambda: None
        """Called twice a second while the run goes on, and at its end, on the loop's thread."""
        self.prepare: Callable[[], Awaitable[None]] = _nothing
        """Awaited before the first work is started, within the time limit."""
        self._store = store
        self._budget = budget
        self._bell = Bell()
        self._recorder = Recorder(store.record, store.draw, lambda: self.request_stop("storage_lost"))
        self._calls = Calls(
            executor,
            num_threads,
            may_start=self._may_start,
            on_answer=self._answer,
            on_error=self._fail_unless_done,
            on_free=self._go_on,
            on_complete=self._bell.ring,
            # Where others share the run, more is claimed as soon as less is waiting.
            on_taken=None if shared is None else self._bell.ring,
        )
        self._company: Alone | Together
        if shared is None:
            self._company = Alone(store, self._recorder, self._calls)
        else:
            self._company = Together(shared, self._recorder, self._calls, self._bell, self._learn)
        self.told = Telling(search, store, ledger, self._company, self._emit)
        """What the search knows."""
        self._error: BaseException | None = None
        self._tasks: Any = None  # the group of the calls in flight
        self._threads = DaemonThreads("dspy_opro storage")
        self._started = time.monotonic()

    @property
    def num_in_flight(self) -> int:
        return self._calls.num_in_flight

    def request_stop(self, reason: str) -> None:
        """End the run gracefully, from any thread: calls in flight are waited for, none is started."""
        self._bell.ask_to_stop(reason)

    async def run(self) -> None:
        """Run to the end; the search then has its `stop_reason`.

        Raises:
            BaseException: What the executor raised: an error that more examples would only repeat.
        """
        self._bell.open()
        self._started = time.monotonic()
        try:
            async with anyio.create_task_group() as others:
                others.start_soon(self._tick)
                await self._drive(others)
                others.cancel_scope.cancel()
        except BaseException:  # cancelled, or interrupted for the second time
            self._company.abandon()
            raise
        finally:
            self._bell.close()
            self._recorder.release()
            self._threads.close()
        self.on_tick()
        if self._error is not None:
            raise self._error

    async def _tick(self) -> None:
        while True:
            await anyio.sleep(TICK_SECONDS)
            self.on_tick()
            self._bell.ring()

    async def _drive(self, others: Any) -> None:
        with anyio.move_on_after(self._budget.timeout_seconds) as scope:
            try:
                others.start_soon(self._company.serve)  # it begins once this task waits
                self.told.take_in()
                await self.prepare()
            except Exception as error:
                self._fail(error)
            await self._work()
        if scope.cancelled_caught:
            self.search.stop("timeout_seconds")
        self._keep_leftovers()
        await self._company.part(self.search.stop_reason or "error", self._wind_up, self._close)

    async def _work(self) -> None:
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            while True:
                changed = self._bell.mute()
                self._start_calls()
                if self._error is not None:
                    tasks.cancel_scope.cancel()
                    break
                is_over = self.search.done or not (self._company.is_shared or self._calls.num_waiting)
                if self.num_in_flight == 0 and is_over:
                    break
                await changed.wait()
        if not self.search.done:  # the only way to lose a call: a program that raised CancelledError itself
            self._fail(RuntimeError("A call was cancelled from within, so that its result is missing."))

    # -- calls -----------------------------------------------------------------------------------

    def _go_on(self, is_cancelled: bool) -> None:
        """Start what may follow without a turn of the loop, unless there is more to see to."""
        if not is_cancelled:
            self._start_calls()
        if is_cancelled or self.num_in_flight == 0 or self.search.done:
            self._bell.ring()

    def _start_calls(self) -> None:
        try:
            self._start_open_calls()
        except Exception as error:
            self._fail(error)

    def _start_open_calls(self) -> None:
        self.told.pull()
        if not self.search.done:
            self._company.take_on()
        reason = self._wish()
        while reason is None and not self.search.done and self._calls.can_start:
            reason = self._exhausted()
            if reason is None:
                self._calls.start(self._tasks)
        if reason is not None and self._company.agrees_to_end(reason):
            self.search.stop(reason)
        if self.search.done:
            self._calls.clear()

    def _may_start(self) -> bool:
        """Whether a thread may take another example by itself."""
        return not self.search.done and self._wish() is None and self._exhausted() is None

    def _wish(self) -> str | None:
        return self._bell.wish or ("storage_lost" if self._company.is_lost else None)

    def _exhausted(self) -> str | None:
        return self._budget.exhausted(self.ledger.usage, time.monotonic() - self._started)

    def _answer(
        self, work: Work, content: Proposal | tuple[Outcome, ...], usage: Usage, before: Usage
    ) -> None:
        """A piece of work is done here."""
        answer = Answer(work, content, usage, self._now())
        self._keep(answer)
        if not self._company.is_shared:
            self.told.tell(replace(answer, usage=usage + before))

    def _keep(self, answer: Answer) -> None:
        if self._company.is_shared:
            self.told.expect(answer.work)  # the log will bring it back
        self._company.keep(answer)

    def _now(self) -> float:
        return round(self.told.seconds_before + time.monotonic() - self._started, 3)

    def _emit(self) -> None:
        for event in self.search.events():
            self._store.note(event)
            self._recorder.put()
            try:
                self.on_event(event)
            except Exception as error:
                self._fail(error)

    def _learn(self) -> None:
        """There may be something new in the log."""
        try:
            self.told.learn()
        except Exception as error:  # of a stopper or a pruner
            self._fail(error)
        self._bell.ring()

    # -- the end ---------------------------------------------------------------------------------

    def _keep_leftovers(self) -> None:
        """What was scored of blocks that the end has cut: the next process need not do it again."""
        for block, outcomes, usage in self._calls.leftovers():
            self._keep(Answer(block, outcomes, usage, self._now()))

    def _wind_up(self) -> None:
        self.search.salvage()
        self._emit()

    async def _close(self) -> None:
        reason = self.search.stop_reason or "error"
        await self._threads.run(lambda: self._recorder.close(lambda: self._store.close(reason)))

    def _fail(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
        self.search.stop("error")
        self._bell.ring()

    def _fail_unless_done(self, error: Exception) -> None:
        """What a call still in flight raises after the end changes nothing any more."""
        if not self.search.done:
            self._fail(error)


async def _nothing() -> None:
    pass
