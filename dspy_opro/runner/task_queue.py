"""The task queue holds all shared state of a run; worker threads pull tasks from it, and one thread sees its events.

A worker takes a task, performs it, and hands the result back: under one lock the result goes into the log, the search
is told, and what follows is queued. Then the worker waits until its result is kept, and takes the next task.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from dspy_opro.programs.awaiting import as_exception
from dspy_opro.programs.errors import in_brief
from dspy_opro.programs.failures import FailureLimit, FirstExamples, TimeLimit, TooManyErrors
from dspy_opro.programs.metering import Budget, Ledger
from dspy_opro.programs.pace import Lane, WaitingTasks
from dspy_opro.programs.provider import Verdict, judge
from dspy_opro.search import Search
from dspy_opro.search.reserve import SHARE
from dspy_opro.search.tasks import Event, ScoringTask, Task, TaskResult, task_key
from dspy_opro.search.trajectory import Usage

if TYPE_CHECKING:
    from dspy_opro.storage.run_storage import RunStorage

logger = logging.getLogger("dspy_opro")

TICK_SECONDS = 0.5


@dataclass
class _InFlight:
    """A task in flight."""

    task: Task
    started: float
    is_timed_out: bool = False  # it counts as failed already, and still occupies its place


class TaskQueue:
    """Tasks in order of urgency, the calls in flight, and the events of the search.

    Args:
        search: Says what is to be done next.
        storage: Remembers results.
        ledger: Counts what is spent.
        budget: Limits that are checked before every call.
        failures: Ends the run when too much fails.
        first: Checks the student's first results; all other tasks wait until one succeeds. None for a resumed run.
        num_threads: Calls in flight at most.
        time_limit: For each example.
        max_outage_seconds: How long a provider may be down before the run ends.
    """

    def __init__(
        self,
        search: Search,
        storage: RunStorage,
        ledger: Ledger,
        budget: Budget,
        failures: FailureLimit,
        first: FirstExamples | None,
        num_threads: int,
        time_limit: TimeLimit | None = None,
        max_outage_seconds: float = 300.0,
    ) -> None:
        self.search = search
        self._storage = storage
        self._ledger = ledger
        self._budget = budget
        self._failures = failures
        self._first = first
        self._num_threads = num_threads
        self._time_limit = time_limit
        self._max_outage_seconds = max_outage_seconds
        self._changed = threading.Condition()
        self.waiting = WaitingTasks(num_threads, max_outage_seconds)
        self._in_flight: dict[str, _InFlight] = {}  # task key -> its call
        self._left_behind: set[str] = set()  # task keys of calls whose worker was replaced, until they return
        self._first_results: list[tuple[Task, TaskResult]] = []  # told once the first example has passed
        self._known: dict[str, TaskResult] = {}  # task key -> recorded result of a task not handed out yet
        self._num_unasked = 0  # examples on record that the search has not asked for
        self._events: SimpleQueue[Event | None] = SimpleQueue()  # None wakes the reader
        self._requested_stop: str | None = None  # why somebody wants the run to end
        self._error: Exception | None = None
        self._is_closed = False
        self._started = time.monotonic()
        self._seconds_before = 0.0  # how long earlier processes were at work
        self.num_replaced = 0
        """Workers that were left behind with a call that hangs."""

    # -- the past --------------------------------------------------------------------------------

    def replay(self) -> None:
        """Tell the search what earlier processes recorded, in the order of the log: it decides as it did then."""
        with self._changed:
            opened = {task_key(task): task for task in self._unanswered()}
            for key, result in self._storage.results_to_replay():
                self._ledger.add(result.usage)
                task = opened.pop(key, None)
                if task is None:
                    self._known[key] = result
                    self._num_unasked += result.usage.metric_calls
                else:
                    self.search.tell(task, result)
                    opened |= {task_key(new): new for new in self._unanswered()}
            self._seconds_before = self.search.seconds
            for task in opened.values():
                self.waiting.push(task)
            self._emit()

    # -- worker threads --------------------------------------------------------------------------

    def take(self) -> Task | None:
        """The most urgent task. Waits for one; None once the run is over."""
        with self._changed:
            while not self._apply_limits():
                now, pause = time.monotonic(), None
                is_first = self._first is not None  # the student's first examples come one after the other
                if not (self._spent() or (is_first and self._num_running())):
                    task = self.waiting.pop(now, only_examples=is_first)
                    if task is not None and self.search.wants(task):
                        self._in_flight[task_key(task)] = _InFlight(task, now)
                        return task
                    if task is not None:
                        self.waiting.ended(task)
                        continue
                    pause = self.waiting.pause(now)
                self._changed.wait(pause)
            return None

    def finish(self, task: Task, result: TaskResult) -> bool:
        """Hand a result back. Returns once it is kept.

        Returns:
            Whether this worker goes on: False where another one has taken its place.
        """
        key, verdict, now = task_key(task), judge(result.error), time.monotonic()
        with self._changed:
            call = self._remove(key)
            self._left_behind.discard(key)
            if self._is_closed:
                return False
            try:
                if call is None or call.is_timed_out:  # its example counts already
                    self._storage.log.add_spent(result.usage)
                elif self._is_late(call, now):
                    self._time_out(call, result.usage)
                else:
                    self._settle(call, result, verdict)
            except Exception as error:
                self._fail(error)
            if self.search.done:
                self._events.put(None)
        self._storage.log.write()
        return call is not None

    def fail(self, error: Exception, task: Task) -> None:
        """A task can't be performed: the run ends with this error."""
        with self._changed:
            self._remove(task_key(task))
            if not self._is_closed:
                self._fail(error)

    # -- the calling thread ----------------------------------------------------------------------

    def stop(self, reason: str) -> bool:
        """End the run gracefully: no call is started any more, running calls are waited for.

        It takes no lock, so that a signal handler may call it. Returns False if somebody has asked for the end before.
        """
        if self._requested_stop is not None:
            return False
        self._requested_stop = reason
        self._events.put(None)
        return True

    def events(self) -> Iterator[Event | None]:
        """What happens, in order, until the run is over; None at least twice a second.

        Raises:
            Exception: The error that ended the run.
        """
        is_over = False
        while not is_over:
            with self._changed:
                self._look_at_the_clock()
                is_over = self._is_over()
                if is_over:
                    self.close()  # what is scored in full counts
                    for event in self.search.events():
                        self._events.put(event)
                pause = self._pause()
            while not self._events.empty():
                yield self._events.get()
            if not is_over:
                if self._storage.outage.is_under_way:
                    self._storage.log.write()
                try:
                    yield self._events.get(timeout=pause)
                except Empty:
                    yield None
        if self._error is not None:
            raise self._error

    def close(self, reason: str = "interrupted") -> None:
        """Results of workers are no longer used. A run that is not over ends for `reason`."""
        with self._changed:
            self._is_closed = True
            self.search.stop(reason)
            self.search.salvage()
            # Calls of examples that have no score, and calls that nobody waits for.
            self._storage.log.add_spent(self._ledger.close() - self._storage.log.usage)
            self._changed.notify_all()

    # -- under the lock --------------------------------------------------------------------------

    def _apply_limits(self) -> bool:
        """End what must end. Whether the run is over."""
        if not self.search.done:
            reason = self._requested_stop or self._budget.exhausted(self._ledger.usage, self._seconds_here())
            if reason is not None:
                self._stop(reason)
            elif (spent := self._spent()) is not None and not self._num_running():
                self.search.conclude(spent)
                self._hand_out()
                self._events.put(None)
                self._changed.notify_all()
        return self.search.done

    def _spent(self) -> str | None:
        """The budget that is used up, except for the share that confirms the result."""
        # A plan keeps its own examples within the budget. Those of an earlier plan count, too.
        num_scored = self.search.usage.metric_calls + self._num_unasked + self._num_running()
        if self._num_unasked and num_scored >= self.search.most_metric_calls:
            return "max_metric_calls"
        if not self.search.is_confirmed_later:
            return None
        return self._budget.exhausted(self._ledger.usage, self._seconds_here(), 1 - SHARE)

    def _stop(self, reason: str) -> None:
        self.search.stop(reason)
        self._events.put(None)
        self._changed.notify_all()

    def _fail(self, error: Exception) -> None:
        if not self.search.done:
            self._error = error
            self._stop("error")

    def _remove(self, key: str) -> _InFlight | None:
        """A call is no longer in flight."""
        call = self._in_flight.pop(key, None)
        if call is not None:
            self.waiting.ended(call.task)
        return call

    def _settle(self, call: _InFlight, result: TaskResult, verdict: Verdict) -> None:
        """A call has ended: its result counts, or the run tries its task again later."""
        task, lane, now = call.task, self.waiting.lane(call.task), time.monotonic()
        if verdict.kind == "account" and self._first is None and result.error is not None:
            raise result.error
        if verdict.kind == "transient":
            if lane.put_off(task, result, verdict, call.started, now):
                if not self.search.done:
                    self._check_outage(lane, result.error, verdict, now)
                return
        elif lane.pace.answered(now):
            self._changed.notify_all()
        self._accept(task, replace(result, usage=lane.settled(task, result.usage), seconds=self._seconds()))

    def _is_late(self, call: _InFlight, now: float) -> bool:
        limit = self._time_limit if isinstance(call.task, ScoringTask) else None
        return limit is not None and now - call.started >= limit.seconds

    def _time_out(self, call: _InFlight, spent: Usage) -> None:
        """An example takes, or took, too long: it has failed."""
        assert self._time_limit is not None
        call.is_timed_out = True
        usage = self.waiting.lane(call.task).settled(call.task, spent)
        self._accept(call.task, replace(self._time_limit.failed, usage=usage, seconds=self._seconds()))

    def _check_outage(self, lane: Lane, error: Exception | None, verdict: Verdict, now: float) -> None:
        """End the run if a provider is down for too long."""
        if lane.is_down_for_too_long(verdict, now):
            rule = f"The provider gives no answer for max_outage_seconds={self._max_outage_seconds:g}"
            if self._first is not None:  # nothing is known of the student
                raise TooManyErrors(f"{rule}. Last cause: {in_brief(error)}") from error
            logger.error("%s, so the run ends: %s", rule, in_brief(error))
            self._stop("max_outage_seconds")

    def _accept(self, task: Task, result: TaskResult) -> None:
        """Take a result. A new run keeps results only after the first example has succeeded."""
        self._ledger.add(Usage(metric_calls=result.usage.metric_calls))
        if self._first is None:
            self._tell(task, result)
            return
        self._first_results.append((task, result))
        if self._first.passes(result):
            self._first = None
            for earlier in self._first_results:
                self._tell(*earlier)
            self._first_results.clear()
        self._changed.notify_all()

    def _tell(self, task: Task, result: TaskResult) -> None:
        """Log, tell the search, queue what follows: in this order for every result, so that a replay decides alike."""
        self._storage.log.add(task, result)
        self._failures.count(task, result)
        self.search.tell(task, result)
        self._hand_out()

    def _hand_out(self) -> None:
        for new in self._unanswered():
            self.waiting.push(new)
            self._changed.notify()
        if self.search.done:
            self._changed.notify_all()
        self._emit()

    def _unanswered(self) -> Iterator[Task]:
        """The search's new tasks. Those whose result is known already are told at once."""
        while tasks := self.search.next_tasks():
            for task in tasks:
                known = self._known.pop(task_key(task), None)
                if known is None:
                    yield task
                else:
                    self._num_unasked -= known.usage.metric_calls
                    self.search.tell(task, known)

    def _emit(self) -> None:
        events = self.search.events()
        for event in events:
            self._events.put(event)
        for event in events:
            self._failures.see(event)

    def _seconds_here(self) -> float:
        return time.monotonic() - self._started

    def _seconds(self) -> float:
        return round(self._seconds_before + self._seconds_here(), 3)

    def _look_at_the_clock(self) -> None:
        if self._storage.outage.is_lost:
            self._requested_stop = self._requested_stop or "storage_lost"
        self._apply_limits()
        if self._time_limit is None:
            return
        now, seconds = time.monotonic(), self._time_limit.seconds
        for key, call in list(self._in_flight.items()):
            if not self._is_late(call, now):
                continue
            if not call.is_timed_out:
                try:
                    self._time_out(call, self._time_limit.failed.usage)
                except Exception as error:
                    self._fail(error)
            elif now - call.started >= 2 * seconds and len(self._left_behind) < self._num_threads:
                self._remove(key)
                self._left_behind.add(key)
                self.num_replaced += 1
                if self.num_replaced == 1 or self.num_replaced % 10 == 0:
                    logger.warning(
                        "A call took longer than twice example_timeout_seconds. A new thread replaces its thread "
                        "(%d replaced so far, %d still blocked).",
                        *(self.num_replaced, len(self._left_behind)),
                    )
        calls = self._in_flight.values()
        num_hung = sum(c.is_timed_out and c.started < now - 3 * seconds for c in calls)
        if min(num_hung, len(self._left_behind)) >= self._num_threads:
            hung = len(calls) + len(self._left_behind)
            self._fail(TooManyErrors(f"{hung} examples hang, and no thread is left for others."))

    def _pause(self) -> float:
        """Seconds until the calling thread should look at the clock again."""
        ends = [self._started + (self._budget.timeout_seconds or float("inf"))]
        if self._time_limit is not None:
            scoring = (c for c in self._in_flight.values() if isinstance(c.task, ScoringTask))
            ends += [c.started + n * self._time_limit.seconds for c in scoring for n in (1, 2, 3)]
        now = time.monotonic()
        # A deadline that has just passed may not have been handled yet.
        return max(0.01, min([TICK_SECONDS, *(end - now for end in ends if end > now - 0.05)]))

    def _is_over(self) -> bool:
        """Whether nothing is waited for any more. A timeout and an error leave running calls behind."""
        if not self.search.done:
            return False
        is_urgent = self._error is not None or self.search.stop_reason == "timeout_seconds"
        timeout = self._budget.timeout_seconds
        is_late = timeout is not None and self._seconds_here() >= timeout
        return is_urgent or is_late or not self._num_running()

    def _num_running(self) -> int:
        """Calls in flight that are waited for."""
        return sum(not call.is_timed_out for call in self._in_flight.values())


class WorkerPool:
    """Worker threads, as many as there may be calls in flight.

    They are daemon threads: a call that hangs holds up neither the run nor the end of the process.
    """

    def __init__(self, queue: TaskQueue, perform: Callable[[Task], TaskResult], num_threads: int) -> None:
        self._queue = queue
        self._perform = perform
        self._num_threads = num_threads
        self._num_started = 0
        self._context = contextvars.copy_context()

    def __enter__(self) -> WorkerPool:
        self.refill()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._queue.close("error" if isinstance(error, Exception) else "interrupted")

    def refill(self) -> None:
        """Start a worker for each place without one: at first for all, later for those that were left behind."""
        while self._num_started < self._num_threads + self._queue.num_replaced:
            try:
                run = self._context.copy().run  # stoppers and pruners see the caller's context, too
                threading.Thread(target=run, args=[self._work], name="dspy_opro worker", daemon=True).start()
                self._num_started += 1
            except RuntimeError as error:  # the system gives no more
                if not self._num_started:
                    raise
                self._num_threads = self._num_started - self._queue.num_replaced
                told = "No further thread starts (%s). At most %d calls are in flight."
                logger.warning(told, error, self._num_threads)

    def _work(self) -> None:
        while (task := self._queue.take()) is not None:
            try:
                # Each call sees a copy of the context that the caller of `compile` had.
                result = self._context.copy().run(self._perform, task)
                if not self._queue.finish(task, result):
                    return
            except BaseException as error:
                self._queue.fail(as_exception(error), task)
                return
