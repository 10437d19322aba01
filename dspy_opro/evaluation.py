"""The driver: keeps calls in flight while the search has work, and tells it, in one order, what comes back.

The order of the log is the order in which the search is told. So a decision that reads what was spent comes
out the same in a resumed run and, where several workers share a run, in each of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import anyio

from .calls import Calls
from .protocols import Executor, SharedStore, Store
from .recording import LAST_PATIENCE_SECONDS, Recorder
from .search import Search
from .sharing import Desk
from .stopping import Budget, Ledger, Usage
from .threads import DaemonThreads
from .trajectory import Outcome
from .work import Answer, Ask, Event, Failure, Proposal, Work, work_key

ALONE = frozenset({"interrupted", "timeout_seconds", "error", "storage_lost"})
"""Reasons that end one worker of a shared run; every other one ends the run for all."""

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
        self.told = Usage()
        """What the answers that the search knows cost."""
        self.seconds = 0.0
        """How long the run had been at work when the search was told the last answer, over all its processes."""
        self.is_live = False
        """Whether what was recorded earlier is taken in."""
        self.failures: list[Failure] = []
        """Failed examples, by position; in no fixed order."""
        self._store = store
        self._shared = shared
        self._desk: Desk | None = None
        self._budget = budget
        self._calls = Calls(executor, num_threads, self._answer, self._fail_unless_done, self._go_on)
        self._open: dict[str, tuple[Work, int]] = {}  # handed out in the past: work key -> work and its turn
        self._turns = {True: 0, False: 0}  # asks and blocks handed out
        self._counted: set[str] = set()  # keys of own answers that the log will bring back
        self._error: BaseException | None = None
        self._requested: str | None = None
        self._has_asked = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed: anyio.Event | None = None
        self._tasks: Any = None  # the group of the calls in flight
        self._threads = DaemonThreads("dspy_opro storage")
        self._recorder = Recorder(store.record, store.draw, lambda: self.request_stop("storage_lost"))
        self._started = time.monotonic()
        self._seconds_before = 0.0  # what earlier processes took

    @property
    def num_in_flight(self) -> int:
        return self._calls.num_in_flight

    def request_stop(self, reason: str) -> None:
        """End the run gracefully, from any thread: calls in flight are waited for, none is started."""
        self._requested = reason
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake)

    async def run(self) -> None:
        """Run to the end; the search then has its `stop_reason`.

        Raises:
            BaseException: What the executor raised: an error that more examples would only repeat.
        """
        self._loop = asyncio.get_running_loop()
        self._started = time.monotonic()
        if self._shared is not None:
            self._desk = Desk(self._shared, self._calls.limit, self._learn)
        try:
            async with anyio.create_task_group() as others:
                others.start_soon(self._tick)
                await self._drive(others)
                others.cancel_scope.cancel()
        finally:
            self._loop = None
            self._recorder.release()
            self._threads.close()
        self.on_tick()
        if self._error is not None:
            raise self._error

    async def _tick(self) -> None:
        while True:
            await anyio.sleep(TICK_SECONDS)
            self.on_tick()
            self._wake()

    async def _drive(self, others: Any) -> None:
        with anyio.move_on_after(self._budget.timeout_seconds) as scope:
            try:
                self._take_in()
                if self._desk is not None:
                    others.start_soon(self._desk.serve)
                await self.prepare()
            except Exception as error:
                self._fail(error)
            await self._work()
        if scope.cancelled_caught:
            self.search.stop("timeout_seconds")
        self._keep_leftovers()
        if self._shared is not None and self._desk is not None:
            await self._part(self._shared, self._desk)
        else:
            self._wind_up()
            await self._close()

    async def _work(self) -> None:
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            while True:
                self._changed = anyio.Event()
                self._start_calls()
                if self._error is not None:
                    tasks.cancel_scope.cancel()
                    break
                is_over = self.search.done or (self._desk is None and not self._calls.num_waiting)
                if self.num_in_flight == 0 and is_over:
                    break
                await self._changed.wait()
        if not self.search.done:  # the only way to lose a call: a program that raised CancelledError itself
            self._fail(RuntimeError("A call was cancelled from within, so that its result is missing."))

    # -- work ------------------------------------------------------------------------------------

    def _go_on(self, is_cancelled: bool) -> None:
        """A call has ended: start what follows without a turn of the loop, unless there is more to see to."""
        if not is_cancelled:
            self._start_calls()
        if is_cancelled or self.num_in_flight == 0 or self.search.done:
            self._wake()

    def _start_calls(self) -> None:
        try:
            self._start_open_calls()
        except Exception as error:
            self._fail(error)

    def _start_open_calls(self) -> None:
        self._pull()
        reason = self._requested
        if self._desk is not None and not self.search.done:
            for work in self._desk.take():
                self._calls.put(work, self._store.parts(work))
            self._desk.claim(self.num_in_flight + self._calls.num_waiting)
            reason = reason or ("storage_lost" if self._desk.is_lost else None)
        while reason is None and not self.search.done and self._calls.can_start:
            reason = self._budget.exhausted(self.ledger.usage, time.monotonic() - self._started)
            if reason is None:
                self._calls.start(self._tasks)
        if reason is not None:
            self._stop(reason)
        if self.search.done:
            self._calls.clear()

    def _stop(self, reason: str) -> None:
        """Stop; where others work on the run too, all of them once they read so at the same place of the log."""
        if self._shared is None or self._desk is None or reason in ALONE:
            self.search.stop(reason)
        elif not self._has_asked:
            self._has_asked = True
            self._shared.ask_to_end(reason)
            self._desk.hurry()

    def _pull(self) -> None:
        """Take everything that the search has to do; what was recorded earlier is answered on the spot."""
        while not self.search.done:
            self._emit()
            work = self.search.next()
            if work is None:
                break
            is_ask = isinstance(work, Ask)
            self._turns[is_ask] += 1
            answer = self._store.recall(work)
            if answer is not None:
                self._tell(answer)
            elif self.is_live:
                self._put(work, self._turns[is_ask])
            else:
                self._open[work_key(work)] = work, self._turns[is_ask]
        self._emit()

    def _put(self, work: Work, turn: int) -> None:
        """Nobody has answered it: do it, or where there are others see who does."""
        if self._desk is None:
            self._calls.put(work, self._store.parts(work))
        else:
            self._desk.offer(work, turn)

    def _answer(
        self, work: Work, content: Proposal | tuple[Outcome, ...], usage: Usage, before: Usage
    ) -> None:
        """A piece of work is done here."""
        answer = Answer(work, content, usage, self._now())
        if self._shared is None:
            self._keep(answer)
            self._tell(replace(answer, usage=usage + before))
        else:
            self._counted.add(work_key(work))
            self._keep(answer)  # the log will bring it back

    def _keep(self, answer: Answer) -> None:
        if self._shared is not None and self._desk is not None:
            self._shared.post(answer)
            self._desk.hurry()
        else:
            self._recorder.put(answer)

    def _now(self) -> float:
        return round(self._seconds_before + time.monotonic() - self._started, 3)

    def _keep_leftovers(self) -> None:
        """What was scored of blocks that the end has cut: the next process need not do it again."""
        for block, outcomes, usage in self._calls.leftovers():
            self._counted.add(work_key(block))
            self._keep(Answer(block, outcomes, usage, self._now()))

    def _tell(self, answer: Answer) -> None:
        work, content = answer.work, answer.content
        self.told += answer.usage
        self.seconds = max(self.seconds, answer.seconds)
        self._store.told(answer)
        if isinstance(work, Ask):
            assert isinstance(content, Proposal)
            self.search.tell_proposal(work, content)
            return
        assert isinstance(content, tuple)
        for position, outcome in enumerate(content, work.start):
            if outcome.error is not None:
                self.failures.append(Failure(work.candidate.id, work.split, position, outcome.error))
        self.search.tell_block(work, content)

    def _emit(self) -> None:
        for event in self.search.events():
            self._store.note(event)
            self._recorder.put()
            try:
                self.on_event(event)
            except Exception as error:
                self._fail(error)

    # -- the past, and the others ----------------------------------------------------------------

    def _take_in(self) -> None:
        """Tell the search all that was recorded, in the order in which it was: it decides as it did then."""
        self._pull()
        self._learn()
        for key, (work, _) in list(self._open.items()):
            answer = self._store.recall(work)
            if answer is not None:  # it was recorded in blocks of another size
                del self._open[key]
                self._tell(answer)
        self.is_live = True
        self._seconds_before = self.seconds
        for work, turn in self._open.values():
            self._put(work, turn)
        self._pull()
        self._end_with_others()

    def _learn(self) -> None:
        """Take in what is new in the log, record by record."""
        while (logged := self._store.load_next()) is not None:
            key, usage = logged
            if key in self._counted:
                self._counted.remove(key)
            else:
                self.ledger.add(usage)
            work = self._find(key)
            answer = None if work is None else self._store.recall(work)
            if answer is not None:
                self._tell(answer)
                self._pull()
            if self.is_live:
                self._end_with_others()
        if self._shared is not None and self._shared.leads:
            self._recorder.put()  # this worker may keep the visible study only now
        self._wake()

    def _find(self, key: str) -> Work | None:
        """The open work of this key; it is open no more."""
        if self._desk is not None and self.is_live:
            return self._desk.answered(key)
        work, _ = self._open.pop(key, (None, 0))
        return work

    def _end_with_others(self) -> None:
        if self._shared is not None and self._shared.end is not None:
            self.search.stop(self._shared.end)

    # -- the end ---------------------------------------------------------------------------------

    def _wind_up(self) -> None:
        self.search.salvage()
        self._emit()

    async def _close(self) -> None:
        reason = self.search.stop_reason or "error"
        await self._threads.run(lambda: self._recorder.close(lambda: self._store.close(reason)))

    async def _part(self, store: SharedStore, desk: Desk) -> None:
        """Leave the others. All return the same best program, so what is under way anywhere is waited for."""
        desk.is_idle = True
        is_alone = self.search.stop_reason in ALONE
        if store.end is not None and not is_alone:
            store.drain()
            await self._until(lambda: store.is_drained)
        self._wind_up()
        if not is_alone:
            await self._until(lambda: store.is_shown or store.leads)
            if store.leads and not store.is_shown:
                await self._close()
                store.conclude()
        desk.is_leaving = True
        store.leave()
        self._requested = None  # that wish is fulfilled; another one cuts the farewell short
        with anyio.move_on_after(LAST_PATIENCE_SECONDS):
            await self._until(lambda: not store.is_member)

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait for the others, as long as the storage is there and nobody interrupts."""
        desk = self._desk
        while desk is not None and not (condition() or desk.is_lost or self._requested == "interrupted"):
            self._changed = anyio.Event()
            desk.hurry()
            await self._changed.wait()

    # -- errors and wake-ups ---------------------------------------------------------------------

    def _fail(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
        self.search.stop("error")
        self._wake()

    def _fail_unless_done(self, error: Exception) -> None:
        """What a call still in flight raises after the end changes nothing any more."""
        if not self.search.done:
            self._fail(error)

    def _wake(self) -> None:
        if self._changed is not None:
            self._changed.set()


async def _nothing() -> None:
    pass
