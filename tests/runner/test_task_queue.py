"""Workers and their queue: as many calls in flight as allowed, none idle, none above; whatever ends a run ends it
cleanly, and whatever was recorded is not done again.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import optuna
import pytest

from dspy_opro.programs.failures import FailureLimit, FirstExamples, TimeLimit, TooManyErrors
from dspy_opro.programs.metering import Budget, Ledger
from dspy_opro.runner.interrupts import interrupts
from dspy_opro.runner.task_queue import TaskQueue, WorkerPool
from dspy_opro.search import Search
from dspy_opro.search.pruners import Halving
from dspy_opro.search.tasks import (
    Event,
    Plan,
    Proposal,
    ProposalTask,
    ScoringTask,
    Task,
    TaskResult,
    task_key,
    urgency,
)
from dspy_opro.search.trajectory import Candidate, Outcome, Usage
from dspy_opro.storage import outage
from dspy_opro.storage.run_storage import RunStorage, open_run

STUDENT = Candidate({"p": "student"})
PLAN = Plan(20, num_val=10, num_rounds=4, num_candidates=4)
FAILED = TaskResult(Outcome(0.0, error="TimeoutError"), Usage(metric_calls=1), error=TimeoutError())


def draw(*parts: object) -> float:
    return random.Random(repr(parts)).random()


@dataclass
class World:
    """Performs tasks after a while that differs from call to call, and counts who is there at once."""

    ledger: Ledger
    seconds: float = 0.002
    tokens: int = 10
    on_score: Callable[[ScoringTask], Any] = lambda task: None
    on_propose: Callable[[ProposalTask], Any] = lambda task: None
    tasks: list[Task] = field(default_factory=list)
    num_scored: int = 0
    in_flight: int = 0
    max_in_flight: int = 0
    order: Any = field(default_factory=lambda: random.Random(0))
    lock: Any = field(default_factory=threading.Lock)

    def perform(self, task: Task) -> TaskResult:
        with self.lock:
            self.tasks.append(task)
            self.in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self.in_flight)
            seconds = self.seconds * self.order.random()
        try:
            time.sleep(seconds)
            if isinstance(task, ScoringTask):
                self.on_score(task)
                return self._score(task)
            self.on_propose(task)
            return self._propose(task)
        finally:
            with self.lock:
                self.in_flight -= 1

    def _propose(self, task: ProposalTask) -> TaskResult:
        usage = Usage(proposer_calls=1, prompt_tokens=self.tokens)
        self.ledger.add_calls(usage)
        return TaskResult(Proposal({"p": f"{task.round} {task.slot} {task.wave}"}), usage)

    def _score(self, task: ScoringTask) -> TaskResult:
        usage = Usage(metric_calls=1, scorer_calls=1, prompt_tokens=self.tokens)
        self.ledger.add_calls(usage)
        with self.lock:
            self.num_scored += 1
        score = float(draw(task.candidate.id) > draw(task.split, task.position))
        error = ValueError("bad") if draw(task.position) < 0.1 else None
        return TaskResult(Outcome(score, error=None if error is None else "ValueError"), usage, error=error)


class Case:
    """A run over a made-up world."""

    def __init__(
        self,
        num_threads: int = 8,
        budget: Budget | None = None,
        storage: RunStorage | None = None,
        plan: Plan = PLAN,
        stoppers: Sequence[Any] = (),
        first: FirstExamples | None = None,
        time_limit: float | None = None,
        **world: Any,
    ) -> None:
        self.ledger = Ledger()
        self.search = Search(plan, STUDENT, Halving(first=4), stoppers=stoppers)
        self.world = World(self.ledger, **world)
        self.storage = storage or open_run()
        self.num_threads = num_threads
        self.queue = TaskQueue(
            self.search,
            self.storage,
            self.ledger,
            budget or Budget(),
            FailureLimit(None, 10**6),
            first,
            num_threads,
            None if time_limit is None else TimeLimit(time_limit, FAILED),
        )
        self.events: list[Event] = []
        self.on_event: Callable[[Event], None] = lambda event: None

    def __call__(self) -> Case:
        try:
            self.queue.replay()
            with WorkerPool(self.queue, self.world.perform, self.num_threads) as workers:
                for event in self.queue.events():
                    workers.refill()
                    if event is not None:
                        self.events.append(event)
                        self.on_event(event)
        finally:
            self.storage.close(self.search.stop_reason or "error")
        return self

    @property
    def trials(self) -> Any:
        return self.search.trajectory.trials

    @property
    def failures(self) -> list[str]:
        return sorted(map(repr, self.search.failures))


def kept(storage: Any = None) -> RunStorage:
    """A run that outlives its process, as far as this one goes; or the same one opened again."""
    return open_run(optuna.storages.InMemoryStorage() if storage is None else storage, "run")


def reopened(case: Case) -> RunStorage:
    return kept(case.storage.study._storage)


def truncated(case: Case, count: int) -> RunStorage:
    """Another storage with the first `count` results of a run."""
    storage = optuna.storages.InMemoryStorage()
    records = [record for record in reopened(case).past if "key" in record]
    kept(storage).log.append(*records[:count])
    return kept(storage)


def logged(case: Case) -> dict[str, TaskResult]:
    return dict(reopened(case).results())


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("It does not come about.")


# --- calls in flight -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", [1, 2, 5, 64])
def test_calls_in_flight_are_never_more_than_num_threads_and_never_fewer_than_there_is_work(
    num_threads: int,
) -> None:
    case = Case(num_threads)
    count = min(num_threads, 30)  # examples of the student
    first, barrier = iter(range(count)), threading.Barrier(count, timeout=20)
    # The first ones wait until all are there.
    case.world.on_score = lambda task: next(first, None) is not None and barrier.wait()
    case()
    assert case.search.stop_reason == "num_rounds"
    assert count <= case.world.max_in_flight <= num_threads
    assert case.world.in_flight == 0


def test_no_worker_is_idle_while_there_is_work() -> None:
    """Eight calls at a time, again and again, although each takes its task by itself."""
    case, barrier = Case(8, plan=Plan(80, num_rounds=0)), threading.Barrier(8, timeout=20)
    case.world.on_score = lambda task: barrier.wait()
    case()
    assert (case.world.num_scored, case.world.max_in_flight) == (80, 8)


def test_a_system_with_fewer_threads_gives_the_same_run_and_leaves_no_worker(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected, real, started = Case()(), threading.Thread.start, []

    def start(thread: threading.Thread) -> None:
        if len(started) == 3:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    case = Case(num_threads=64)
    assert case().trials == expected.trials
    assert case.world.max_in_flight == 3
    told = "No further thread starts (can't start new thread). At most 3 calls are in flight."
    assert caplog.messages.count(told) == 1
    for thread in started:
        thread.join(5)
        assert not thread.is_alive()


def test_workers_that_waited_take_what_one_result_brings() -> None:
    """The last proposal of a round makes four candidates, and sixteen examples, at once."""
    case, barrier = Case(8, plan=Plan(16, num_rounds=1, lag=0)), threading.Barrier(8, timeout=20)
    first = iter(range(16))
    case.world.on_score = lambda task: task.round == 1 and next(first, None) is not None and barrier.wait()
    case()
    assert case.search.stop_reason == "num_rounds"


def test_threads_and_arrival_change_neither_trials_nor_failures() -> None:
    cases = [Case(num_threads)() for num_threads in (1, 5, 64)]
    assert cases[0].trials == cases[1].trials == cases[2].trials
    assert cases[0].failures == cases[1].failures == cases[2].failures != []
    assert cases[0].events == cases[1].events == cases[2].events


def test_proposals_come_first_and_then_older_rounds() -> None:
    case, waiting, choices = Case(1), dict[str, Task](), set[int]()
    next_tasks = case.search.next_tasks

    def noted() -> list[Task]:
        tasks = next_tasks()
        waiting.update((task_key(task), task) for task in tasks)
        return tasks

    def check(task: Task) -> None:
        assert urgency(task) == min(map(urgency, waiting.values()))
        choices.add(len({urgency(other) for other in waiting.values()}))
        del waiting[task_key(task)]

    case.search.next_tasks = noted  # type: ignore[method-assign]
    case.world.on_score = case.world.on_propose = check
    case()
    assert max(choices) > 1  # there was something to choose from


def test_every_call_sees_a_copy_of_the_callers_context() -> None:
    mark: contextvars.ContextVar[str] = contextvars.ContextVar("mark", default="default")
    seen: list[str] = []

    def look(task: Task) -> None:
        seen.append(mark.get())
        mark.set("changed by a call")

    case = Case(4)
    case.world.on_score = case.world.on_propose = look
    token = mark.set("the caller's")
    case()
    assert set(seen) == {"the caller's"}
    assert mark.get() == "the caller's"
    mark.reset(token)


def test_stoppers_see_the_callers_context() -> None:
    asked_for = contextvars.ContextVar("asked_for", default="nobody")
    asked_for.set("caller")
    seen: list[str] = []
    Case(stoppers=[lambda state: seen.append(asked_for.get())])()
    assert seen == ["caller"] * 5


def test_the_threads_end_with_the_run() -> None:
    Case(8)()
    wait_until(lambda: not any(thread.name == "dspy_opro worker" for thread in threading.enumerate()))


def test_what_happens_is_seen_in_order_and_none_at_least_twice_a_second() -> None:
    case, seen = Case(1, plan=Plan(2, num_rounds=0), seconds=0.0), list[Any]()
    case.world.on_score = lambda task: time.sleep(0.8)
    case.queue.replay()
    with WorkerPool(case.queue, case.world.perform, 1):
        times = []
        for event in case.queue.events():
            times.append(time.monotonic())
            seen.append(event)
    assert [type(event).__name__ for event in seen if event is not None] == [
        "CandidatesProposed",
        "TrialFinished",
        "RoundDecided",
    ]
    assert all(later - earlier < 0.75 for earlier, later in itertools.pairwise(times))


# --- the log ---------------------------------------------------------------------------------------------


def test_results_are_logged_in_the_order_in_which_the_search_is_told() -> None:
    case, told = Case(storage=kept()), list[str]()
    tell = case.search.tell

    def noted(task: Task, result: TaskResult) -> None:
        told.append(task_key(task))
        tell(task, result)

    case.search.tell = noted  # type: ignore[method-assign]
    case()
    results = list(reopened(case).results())
    assert [key for key, _ in results] == told
    seconds = [result.seconds for _, result in results]
    assert seconds == sorted(seconds)


def test_a_result_is_kept_before_its_worker_takes_another_task() -> None:
    case = Case(1, storage=kept())

    def check(task: Task) -> None:
        done = {task_key(earlier) for earlier in case.world.tasks[:-1]}
        assert done == set(logged(case))

    case.world.on_score = case.world.on_propose = check
    case()


def test_what_is_recorded_is_not_done_again() -> None:
    first = Case(storage=kept())()
    again = Case(storage=reopened(first))()
    assert again.trials == first.trials
    assert again.events == first.events
    assert again.world.tasks == []
    assert again.ledger.usage == first.ledger.usage  # what earlier processes spent counts
    assert again.failures == first.failures
    assert again.search.stop_reason == "num_rounds"


def test_recorded_results_are_told_in_the_order_of_the_log() -> None:
    first = Case(storage=kept())()
    again, told = Case(storage=reopened(first)), list[str]()
    tell = again.search.tell

    def noted(task: Task, result: TaskResult) -> None:
        told.append(task_key(task))
        tell(task, result)

    again.search.tell = noted  # type: ignore[method-assign]
    again()
    assert told == [key for key, _ in reopened(first).results()]


def test_results_that_came_after_the_end_are_known_to_the_next_process_too() -> None:
    enough = lambda state: "enough" if state.round == 1 else None  # noqa: E731
    plan = Plan(20, num_rounds=5, num_candidates=8, lag=2)
    first = Case(64, plan=plan, storage=kept(), stoppers=[enough], seconds=0.02)()
    assert first.search.stop_reason == "enough"
    again = Case(64, plan=plan, storage=reopened(first), stoppers=[enough])()
    assert again.world.tasks == []
    assert again.trials == first.trials
    assert again.failures == first.failures
    assert again.search.usage == first.search.usage == again.ledger.usage


@pytest.mark.parametrize("count", [1, 9, 60, 100])
def test_a_run_goes_on_where_the_log_ends(count: int) -> None:
    first = Case(storage=kept())()
    again = Case(storage=truncated(first, count))()
    assert again.trials == first.trials
    assert len(first.world.tasks) == len(again.world.tasks) + count
    assert set(logged(again)) == set(logged(first))
    assert sum((result.usage for result in logged(again).values()), Usage()) == again.ledger.usage


def test_a_run_with_other_settings_uses_what_is_known() -> None:
    first = Case(storage=kept())()
    known = set(logged(first))
    other = replace(PLAN, num_rounds=5, num_candidates=3)
    fresh, again = Case(plan=other)(), Case(plan=other, storage=reopened(first))()
    assert again.trials == fresh.trials
    paid = set(map(task_key, again.world.tasks))
    assert not paid & known
    assert 0 < len(paid) < len(fresh.world.tasks)


def test_the_clock_of_a_resumed_run_goes_on() -> None:
    first = Case(storage=kept(), plan=replace(PLAN, num_rounds=1))()
    again = Case(storage=reopened(first))()
    times = [result.seconds for result in logged(again).values()]
    assert times == sorted(times)
    assert again.search.seconds > first.search.seconds > 0


def test_a_storage_that_fails_for_a_while_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    case, left = Case(storage=kept()), [3]
    append = case.storage.log.append

    def failing(*records: Any) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError("No space left on device")
        append(*records)

    case.storage.log.append = failing  # type: ignore[method-assign]
    case()
    assert case.search.stop_reason == "num_rounds"
    keys = [key for key, _ in reopened(case).results()]
    assert sorted(keys) == sorted(map(task_key, case.world.tasks))
    assert "The storage fails" in caplog.text
    assert "The storage works again" in caplog.text


def test_a_storage_that_is_lost_ends_the_run_and_the_best_program_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outage, "PATIENCE_SECONDS", 0.5)
    case = Case(4, storage=kept(), plan=Plan(20, num_rounds=10_000, num_candidates=4))

    def failing(*_: Any) -> None:
        raise OSError("No space left on device")

    case.storage.log.append = failing  # type: ignore[method-assign]
    case()
    assert case.search.stop_reason == "storage_lost"
    assert case.trials[0].id == STUDENT.id


# --- budgets and time ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", [1, 7, 64])
def test_a_token_budget_is_exceeded_by_what_was_in_flight_at_most(num_threads: int) -> None:
    case = Case(num_threads, Budget(max_tokens=500))()
    assert case.search.stop_reason == "max_tokens"
    assert 500 <= case.ledger.usage.tokens <= 500 + 10 * (num_threads - 1)


def test_the_time_limit_leaves_calls_behind_that_hang() -> None:
    end = threading.Event()
    case = Case(budget=Budget(timeout_seconds=0.3))
    case.world.on_score = lambda task: end.wait(30)
    started = time.monotonic()
    case()
    assert time.monotonic() - started < 5
    assert case.search.stop_reason == "timeout_seconds"
    assert len(case.trials) == 0
    end.set()


def test_a_worker_that_the_time_limit_left_behind_takes_no_further_task() -> None:
    case, end = Case(2, Budget(timeout_seconds=0.3), kept(), seconds=0.0), threading.Event()
    case.world.on_score = lambda task: end.wait(30)
    case()
    assert case.search.stop_reason == "timeout_seconds"
    assert case.world.num_scored == 0
    end.set()
    wait_until(lambda: case.world.in_flight == 0)
    time.sleep(0.1)
    assert case.world.num_scored == 2  # the two that hung: the result was made before they ended
    assert case.ledger.usage.scorer_calls == case.ledger.usage.metric_calls == 0
    assert not any(key.startswith("score") for key in logged(case))


def test_the_time_limit_holds_for_the_first_example_too() -> None:
    case, end = Case(budget=Budget(timeout_seconds=0.2), first=FirstExamples(20)), threading.Event()
    case.world.on_score = lambda task: end.wait(30)
    started = time.monotonic()
    case()
    assert time.monotonic() - started < 5
    assert case.search.stop_reason == "timeout_seconds"
    assert len(case.world.tasks) == 1
    end.set()


@pytest.mark.parametrize("num_threads", [1, 7])
def test_all_that_was_scored_before_the_end_is_in_the_log(num_threads: int) -> None:
    case = Case(num_threads, Budget(max_tokens=333), kept())()
    results = logged(case)
    assert set(results) == set(map(task_key, case.world.tasks))
    assert sum((result.usage for result in results.values()), Usage()) == case.ledger.usage


# --- a stop ----------------------------------------------------------------------------------------------


def test_a_stop_waits_for_calls_in_flight_keeps_them_and_starts_none() -> None:
    case = Case(num_threads=4, storage=kept(), seconds=0.05)

    def stop(task: ScoringTask) -> None:
        if case.world.num_scored == 9:
            case.queue.stop("interrupted")  # from a worker thread
            time.sleep(0.05)

    case.world.on_score = stop
    case()
    assert case.search.stop_reason == "interrupted"
    assert 10 <= case.world.num_scored <= 14
    assert case.ledger.usage.metric_calls == case.world.num_scored
    assert set(logged(case)) == set(map(task_key, case.world.tasks))


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX has them")
def test_a_stop_may_come_from_a_signal_handler_at_any_time() -> None:
    for number in range(20):
        case, calls = Case(num_threads=4), itertools.count()

        def interrupt(task: Task, calls: Any = calls, last: int = 3 * number) -> None:
            if next(calls) == last:
                os.kill(os.getpid(), signal.SIGINT)

        case.world.on_score = case.world.on_propose = interrupt
        with interrupts(case.queue.stop):
            case()
        assert case.search.stop_reason == "interrupted"
        assert case.world.in_flight == 0


def test_a_stop_takes_no_lock() -> None:
    """A signal handler may run while the main thread, or one that waits for it, holds the queue's lock."""
    case = Case()
    held = threading.Thread(target=case.queue.stop, args=["interrupted"])
    with case.queue._changed:
        held.start()
        held.join(5)
        assert not held.is_alive()
    case()
    assert case.search.stop_reason == "interrupted"


def test_a_stop_before_the_start_ends_at_once() -> None:
    case = Case()
    case.queue.stop("interrupted")
    case()
    assert case.search.stop_reason == "interrupted"
    assert case.world.tasks == []


def test_a_stop_after_the_end_is_too_late() -> None:
    case = Case()()
    case.queue.stop("interrupted")
    assert case.search.stop_reason == "num_rounds"


# --- errors ----------------------------------------------------------------------------------------------


class Broken(Exception):
    pass


def raise_at(number: int) -> Callable[..., Any]:
    left = [number]

    def step(*_: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Broken

    return step


@pytest.mark.parametrize("where", ["score", "propose", "event", "stop_rule"])
def test_an_error_ends_the_run_as_itself(where: str) -> None:
    case = Case(stoppers=[raise_at(1)] if where == "stop_rule" else [])
    if where == "score":
        case.world.on_score = raise_at(50)
    elif where == "propose":
        case.world.on_propose = raise_at(6)
    elif where == "event":
        case.on_event = raise_at(10)
    with pytest.raises(Broken):
        case()
    assert case.search.stop_reason == "error"
    wait_until(lambda: case.world.in_flight == 0)
    scored = case.world.num_scored
    time.sleep(0.05)
    assert case.world.num_scored == scored


def test_an_error_does_not_wait_for_calls_that_hang() -> None:
    case, end = Case(8), threading.Event()

    def work(task: ScoringTask) -> None:
        if task.position == 3:
            raise Broken
        end.wait(30)

    case.world.on_score = work
    started = time.monotonic()
    with pytest.raises(Broken):
        case()
    assert time.monotonic() - started < 5
    end.set()


def test_an_error_in_a_recorded_round_ends_the_run_as_itself() -> None:
    first = Case(storage=kept())()
    with pytest.raises(Broken):
        Case(storage=reopened(first), stoppers=[raise_at(1)])()


def test_an_error_of_a_call_that_outlives_the_run_is_not_the_runs() -> None:
    enough = lambda state: "enough" if state.round == 1 else None  # noqa: E731
    case = Case(64, plan=Plan(20, num_rounds=5, num_candidates=4, lag=2), stoppers=[enough])
    case.world.on_score = lambda task: raise_at(0)() if case.search.done else None
    case()
    assert case.search.stop_reason == "enough"


@pytest.mark.parametrize("kind", [asyncio.CancelledError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_a_call_that_wants_to_end_the_process_ends_the_run_with_an_error(kind: Any) -> None:
    case = Case()

    def leave(task: ScoringTask) -> None:
        if (task.split, task.position) == ("train", 3):
            raise kind("from within")

    case.world.on_score = leave
    with pytest.raises(RuntimeError, match=f"{kind.__name__}: from within"):
        case()


def test_an_error_while_a_result_is_handed_back_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    monkeypatch.setattr(case.storage.log, "write", raise_at(20))
    monkeypatch.setattr(outage, "LAST_PATIENCE_SECONDS", 0.2)
    with pytest.raises(Broken):
        case()


def test_what_is_scored_in_full_survives_an_error() -> None:
    case = Case(num_threads=1, plan=Plan(10, num_rounds=3, num_candidates=3))
    case.world.on_score = raise_at(30)
    with pytest.raises(Broken):
        case()
    assert case.trials[0].id == STUDENT.id
    assert len(case.search.best_scores) >= 1


# --- the first example -----------------------------------------------------------------------------------


def fail_at(*positions: int, error: Exception | None = None) -> Callable[[Case], None]:
    """Have the student fail on these train examples and on no others."""

    def change(case: Case) -> None:
        score = case.world._score

        def changed(task: ScoringTask) -> TaskResult:
            result = score(task)
            if task.round == 0 and task.split == "train" and task.position in positions:
                cause = error or ValueError(f"cause {task.position}")
                return replace(result, content=Outcome(0.0, error=str(cause)), error=cause)
            return replace(result, content=replace(result.content, error=None), error=None)

        case.world._score = changed  # type: ignore[method-assign]

    return change


def test_the_first_example_is_alone_until_it_has_passed() -> None:
    case, seen = Case(8, first=FirstExamples(20)), list[tuple[Task, int]]()
    fail_at(0, 1)(case)

    def look(task: Task) -> None:
        if len(case.world.tasks) <= 3:
            time.sleep(0.05)  # another one would come
        seen.append((task, case.world.in_flight))

    case.world.on_score = case.world.on_propose = look
    case()
    first = seen[:3]
    assert [task.position for task, _ in first if isinstance(task, ScoringTask)] == [0, 1, 2]
    assert [in_flight for _, in_flight in first] == [1, 1, 1]
    assert case.world.max_in_flight > 1
    assert case.search.stop_reason == "num_rounds"


def test_the_first_examples_are_neither_done_nor_told_twice() -> None:
    case = Case(8, first=FirstExamples(20), storage=kept())
    fail_at(0, 1)(case)
    case()
    keys = list(map(task_key, case.world.tasks))
    assert len(keys) == len(set(keys))
    assert list(logged(case))[:3] == keys[:3]
    assert [failure.example for failure in case.search.failures] == [0, 1]
    assert case.ledger.usage == case.search.usage


def test_a_student_that_fails_on_the_first_examples_ends_the_run_and_leaves_no_log() -> None:
    case = Case(8, first=FirstExamples(20), storage=kept())
    fail_at(*range(10))(case)
    with pytest.raises(TooManyErrors, match=r"fails on every example tried\. First cause: .*cause 0"):
        case()
    assert case.world.num_scored == case.ledger.usage.metric_calls == 10
    assert case.search.stop_reason == "error"
    assert reopened(case).has_no_results


def test_a_stop_during_the_first_example_keeps_it() -> None:
    case = Case(8, first=FirstExamples(20), storage=kept())
    fail_at()(case)
    case.world.on_score = lambda task: case.queue.stop("interrupted")
    case()
    assert case.search.stop_reason == "interrupted"
    assert len(logged(case)) == len(case.world.tasks) == 1


# --- the time of one example -----------------------------------------------------------------------------


class Hanging:
    """The student hangs on these train examples until `end` is set."""

    def __init__(self, case: Case, *positions: int) -> None:
        self.end = threading.Event()
        self.positions = positions
        case.world.on_score = self

    def __call__(self, task: ScoringTask) -> None:
        if task.round == 0 and task.split == "train" and task.position in self.positions:
            self.end.wait(60)


def failed_positions(case: Case) -> list[int]:
    return sorted(f.example for f in case.search.failures if f.error == "TimeoutError")


def test_an_example_that_takes_too_long_counts_as_failed_and_its_result_is_late() -> None:
    """It returns in time for its worker to go on."""
    case = Case(1, time_limit=1.0, plan=Plan(4, num_rounds=0), storage=kept())
    case.world.on_score = lambda task: time.sleep(1.4) if task.position == 1 else None
    case()
    assert failed_positions(case) == [1]
    assert case.queue.num_replaced == 0
    assert len(logged(case)) == 4
    assert case.trials[0].scores[1] == 0.0


def test_a_resumed_run_knows_what_examples_cost_that_took_too_long() -> None:
    """One late call returns to its worker, another one after its worker was replaced."""
    case = Case(2, time_limit=0.5, plan=Plan(30, num_rounds=0), storage=kept())
    seconds = {1: 0.8, 2: 1.3}
    case.world.on_score = lambda task: time.sleep(seconds.get(task.position, 0.1))
    case()
    assert failed_positions(case) == [1, 2]
    assert case.queue.num_replaced == 1
    again = Case(storage=reopened(case), plan=Plan(30, num_rounds=0))()
    assert again.ledger.usage == case.ledger.usage == Usage(30, 30, prompt_tokens=300)


def test_a_busy_calling_thread_changes_nothing_about_which_examples_take_too_long() -> None:
    """A callback may take long, and so may the report."""
    case = Case(1, time_limit=0.2, plan=Plan(4, num_rounds=0), storage=kept())
    case.queue.replay()
    for seconds in (0.0, 0.3, 0.0):  # the calling thread does not look meanwhile
        task = case.queue.take()
        assert isinstance(task, ScoringTask)
        time.sleep(seconds)
        assert case.queue.finish(task, case.world.perform(task))
    assert [result.content.error for result in logged(case).values()] == [None, "TimeoutError", None]
    assert {result.usage for result in logged(case).values()} == {
        Usage(metric_calls=1, scorer_calls=1, prompt_tokens=10)
    }


@pytest.mark.parametrize("num_threads", [1, 4])
def test_a_worker_that_hangs_is_replaced_after_twice_the_time(num_threads: int) -> None:
    case = Case(num_threads, time_limit=0.5, plan=Plan(40, num_rounds=0), storage=kept())
    hanging, started = Hanging(case, 2), time.monotonic()
    case()
    assert time.monotonic() - started < 10
    assert failed_positions(case) == [2]
    assert case.queue.num_replaced == (num_threads == 1)  # with others at work the run ends before
    assert case.search.stop_reason == "num_rounds"
    assert len(logged(case)) == 40
    scored = case.world.num_scored
    hanging.end.set()
    wait_until(lambda: case.world.in_flight == 0)
    time.sleep(0.1)
    assert case.world.num_scored == scored + 1  # paid for, told to nobody
    assert case.ledger.usage.metric_calls == 40
    assert len(logged(case)) == 40
    wait_until(lambda: not any(thread.name == "dspy_opro worker" for thread in threading.enumerate()))


def test_workers_that_are_replaced_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    case = Case(4, time_limit=0.3, plan=Plan(400, num_rounds=0), seconds=0.02)
    hanging = Hanging(case, 0, 1, 2)
    case()
    hanging.end.set()
    said = [message for message in caplog.messages if "replaces its thread" in message]
    assert [message.rpartition(". ")[2] for message in said] == [
        "A new thread replaces its thread (1 replaced so far, 1 still blocked)."
    ]


def test_a_worker_that_was_left_behind_ends_when_its_call_returns() -> None:
    """Its place is taken: with one thread there is never more than one call that is not timed out."""
    case = Case(1, time_limit=0.5, plan=Plan(30, num_rounds=0), seconds=0.0)
    hanging, seen = Hanging(case, 2), list[int]()
    hang = case.world.on_score

    def look(task: ScoringTask) -> None:
        if task.position == 10:
            hanging.end.set()
            time.sleep(0.05)
        if task.position > 10:
            seen.append(case.world.in_flight)
            time.sleep(0.005)
        hang(task)

    case.world.on_score = look
    case()
    assert case.queue.num_replaced == 1
    assert len(seen) == 19
    assert set(seen) == {1}


def test_where_all_places_hang_the_run_ends_and_never_more_than_twice_num_threads_are_open() -> None:
    case = Case(3, time_limit=0.5)
    hanging, started = Hanging(case, *range(20)), time.monotonic()
    with pytest.raises(TooManyErrors, match="6 examples hang"):
        case()
    assert time.monotonic() - started < 15
    assert case.world.max_in_flight == 6
    assert case.search.stop_reason == "error"
    hanging.end.set()


def test_a_process_that_stood_still_has_no_hung_examples() -> None:
    """All calls look as if they had begun long ago, when it goes on."""
    case = Case(3, time_limit=0.5, plan=Plan(20, num_rounds=0))
    hanging = Hanging(case, *range(3))
    case.queue.replay()
    with WorkerPool(case.queue, case.world.perform, 3) as workers:
        time.sleep(2.0)  # nobody looks at the clock
        for _ in case.queue.events():
            workers.refill()
            hanging.end.set()
    assert case.search.stop_reason == "num_rounds"


def test_as_many_examples_as_there_are_threads_may_hang() -> None:
    case = Case(3, time_limit=0.5, plan=Plan(20, num_rounds=0))
    hanging = Hanging(case, 0, 1, 2)
    case()
    assert failed_positions(case) == [0, 1, 2]
    assert case.search.stop_reason == "num_rounds"
    assert case.world.max_in_flight <= 6
    hanging.end.set()


def test_a_proposal_may_take_longer_than_an_example() -> None:
    case = Case(1, time_limit=0.5, plan=Plan(8, num_rounds=1, num_candidates=2))
    case.world.on_propose = lambda task: time.sleep(1.8)
    case()
    assert case.search.stop_reason == "num_rounds"
    assert case.queue.num_replaced == 0
    assert failed_positions(case) == []


def test_nobody_watches_the_clock_all_the_time_while_a_proposal_takes_long() -> None:
    case, ticks = Case(1, time_limit=0.5, plan=Plan(8, num_rounds=1, num_candidates=1)), 0
    case.world.on_propose = lambda task: time.sleep(2.5)
    case.queue.replay()
    with WorkerPool(case.queue, case.world.perform, 1):
        for event in case.queue.events():
            ticks += event is None
    assert ticks < 30


def test_a_first_example_that_hangs_is_a_failed_one() -> None:
    case = Case(2, time_limit=0.5, first=FirstExamples(20), plan=Plan(20, num_rounds=0))
    fail_at()(case)
    hanging = Hanging(case, 0)
    case()
    assert failed_positions(case) == [0]
    assert case.search.stop_reason == "num_rounds"
    hanging.end.set()


def test_first_examples_that_all_hang_end_the_run() -> None:
    case = Case(2, time_limit=0.2, plan=Plan(3, num_rounds=0), first=FirstExamples(3))
    hanging = Hanging(case, *range(20))
    with pytest.raises(TooManyErrors, match="fails on every example tried"):
        case()
    assert len(case.world.tasks) == 3
    hanging.end.set()


def test_a_stop_does_not_wait_for_an_example_that_took_too_long() -> None:
    case = Case(2, time_limit=0.5, plan=Plan(20, num_rounds=0))
    hanging = Hanging(case, 0, 1)
    threading.Timer(0.7, case.queue.stop, ["interrupted"]).start()
    started = time.monotonic()
    case()
    assert time.monotonic() - started < 5
    assert case.search.stop_reason == "interrupted"
    hanging.end.set()
