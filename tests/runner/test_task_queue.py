"""The driver: as many calls in flight as allowed, none idle, none above; whatever ends a run ends it cleanly."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from dspy_opro import recording
from dspy_opro.evaluation import Run
from dspy_opro.protocols import Then, Unit
from dspy_opro.search.pruners import Halving
from dspy_opro.search import Search
from dspy_opro.runner.budget import Budget, Ledger
from dspy_opro.search.trajectory import Usage
from dspy_opro.threads import DaemonThreads
from dspy_opro.search.trajectory import Candidate, Outcome
from dspy_opro.search.tasks import TaskResult, ProposalTask, ScoringTask, Event, Plan, Proposal, Task, task_key

STUDENT = Candidate({"p": "student"})


def draw(*parts: object) -> float:
    return random.Random(repr(parts)).random()


@dataclass
class FakeExecutor:
    """Answers after a while that differs from call to call, and counts who is there at once."""

    ledger: Ledger
    seconds: float = 0.002
    tokens: int = 10
    on_score: Callable[[ScoringTask, int], None] = lambda block, position: None
    on_propose: Callable[[ProposalTask], None] = lambda ask: None
    in_flight: int = 0
    max_in_flight: int = 0
    num_scored: int = 0
    order: Any = field(default_factory=lambda: random.Random(0))

    async def _busy(self) -> None:
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.seconds * self.order.random())
        finally:
            self.in_flight -= 1

    async def propose(self, ask: ProposalTask) -> tuple[Proposal, Usage]:
        await self._busy()
        self.on_propose(ask)
        usage = Usage(proposer_calls=1, prompt_tokens=self.tokens)
        self.ledger.add(usage)
        return Proposal({"p": f"{ask.round} {ask.slot} {ask.wave}"}), usage

    async def score(self, unit: Unit, then: Then) -> None:
        following: Unit | None = unit
        while following is not None:
            following = then(following, *await self._score(*following))

    async def _score(self, block: ScoringTask, position: int) -> tuple[Outcome, Usage]:
        await self._busy()
        self.on_score(block, position)
        return self._outcome(block, position)

    def _outcome(self, block: ScoringTask, position: int) -> tuple[Outcome, Usage]:
        self.num_scored += 1
        usage = Usage(metric_calls=1, scorer_calls=1, prompt_tokens=self.tokens)
        self.ledger.add(usage)
        score = float(draw(block.candidate.id) > draw(block.split, position))
        return Outcome(score, error="ValueError" if draw(position) < 0.1 else None), usage


@dataclass
class ThreadedExecutor(FakeExecutor):
    """The same in threads, which go from one example to the next by themselves."""

    threads: DaemonThreads = field(default_factory=DaemonThreads)
    lock: Any = field(default_factory=threading.Lock)

    async def score(self, unit: Unit, then: Then) -> None:
        await self.threads.run(lambda: self._score_here(unit, then))

    def _score_here(self, unit: Unit, then: Then) -> None:
        following: Unit | None = unit
        while following is not None:
            with self.lock:
                self.in_flight += 1
                self.max_in_flight = max(self.max_in_flight, self.in_flight)
                seconds = self.seconds * self.order.random()
            time.sleep(seconds)
            try:
                self.on_score(*following)
            finally:
                with self.lock:
                    self.in_flight -= 1
            following = then(following, *self._outcome(*following))


class FakeStore:
    """Keeps in order what it is told and can fail."""

    def __init__(self) -> None:
        self.log: list[TaskResult] = []
        self.told_keys: list[str] = []
        self.events: list[Event] = []
        self.threads: set[int] = set()
        self.num_fails = 0.0
        self.closed_with: str | None = None
        self._answers: dict[str, TaskResult] = {}
        self._num_loaded = 0

    def load_next(self) -> tuple[str, Usage] | None:
        if self._num_loaded == len(self.log):
            return None
        answer = self.log[self._num_loaded]
        self._num_loaded += 1
        self._answers[task_key(answer.work)] = answer
        return task_key(answer.work), answer.usage

    def recall(self, work: Task) -> TaskResult | None:
        return self._answers.get(task_key(work))

    def parts(self, work: Task) -> Mapping[int, tuple[Outcome, Usage]]:
        return {}

    def told(self, answer: TaskResult) -> None:
        self.told_keys.append(task_key(answer.work))

    def note(self, event: Event) -> None:
        self.events.append(event)

    def record(self, answers: Sequence[TaskResult]) -> None:
        self.threads.add(threading.get_ident())
        if self.num_fails > 0:
            self.num_fails -= 1
            raise OSError("No space left on device")
        self.log.extend(answers)

    def draw(self) -> None:
        pass

    def close(self, stop_reason: str) -> None:
        self.closed_with = stop_reason


class Case:
    """A run over the fakes."""

    def __init__(
        self,
        num_threads: int = 8,
        budget: Budget | None = None,
        store: FakeStore | None = None,
        plan: Plan | None = None,
        kind: type[FakeExecutor] = FakeExecutor,
        **executor: Any,
    ) -> None:
        self.ledger = Ledger()
        self.search = Search(
            plan or Plan(20, num_val=10, num_rounds=4, num_candidates=4), STUDENT, Halving(first=4)
        )
        self.executor = kind(self.ledger, **executor)
        self.store = store or FakeStore()
        self.run = Run(self.search, self.executor, self.store, self.ledger, budget or Budget(), num_threads)

    async def __call__(self) -> Case:
        try:
            await asyncio.wait_for(self.run.run(), 30)
        finally:
            if isinstance(self.executor, ThreadedExecutor):
                self.executor.threads.close()
        return self

    @property
    def trials(self) -> Any:
        return self.search.trajectory.trials


@pytest.mark.parametrize("kind", [FakeExecutor, ThreadedExecutor])
@pytest.mark.parametrize("num_threads", [1, 2, 5, 64])
async def test_calls_in_flight_are_never_more_than_num_threads_and_never_fewer_than_there_is_work(
    num_threads: int, kind: type[FakeExecutor]
) -> None:
    case = Case(num_threads, kind=kind)
    if kind is ThreadedExecutor:  # the first ones wait until all are there
        first, barrier = (
            iter(range(min(num_threads, 30))),
            threading.Barrier(min(num_threads, 30), timeout=20),
        )
        case.executor.on_score = lambda block, position: next(first, None) is not None and barrier.wait()
    await case()
    assert case.search.stop_reason == "num_rounds"
    assert min(num_threads, 30) <= case.executor.max_in_flight <= num_threads
    assert case.run.num_in_flight == case.executor.in_flight == 0


@pytest.mark.parametrize("kind", [FakeExecutor, ThreadedExecutor])
async def test_threads_and_arrival_change_neither_trials_nor_failures(kind: type[FakeExecutor]) -> None:
    cases = [await Case(num_threads, kind=kind)() for num_threads in (1, 5, 64)]
    assert cases[0].trials == cases[1].trials == cases[2].trials
    failures = [sorted(map(repr, case.run.told.failures)) for case in cases]
    assert failures[0] == failures[1] == failures[2] != []
    assert cases[0].store.events == cases[1].store.events == cases[2].store.events


async def test_answers_are_recorded_in_the_order_of_the_search_by_one_thread() -> None:
    case = Case()
    seen: list[Event] = []
    case.run.on_event = seen.append
    await case()
    assert case.store.events == seen
    assert [task_key(answer.work) for answer in case.store.log] == case.store.told_keys
    assert case.store.closed_with == "num_rounds"
    assert len(case.store.threads) == 1
    assert threading.get_ident() not in case.store.threads


async def test_what_is_recorded_is_not_done_again() -> None:
    first, store = await Case()(), FakeStore()
    store.log = first.store.log
    again = await Case(store=store)()
    assert again.trials == first.trials
    assert again.executor.num_scored == 0
    assert again.ledger.usage == first.ledger.usage  # what earlier processes spent counts
    assert sorted(map(repr, again.run.told.failures)) == sorted(map(repr, first.run.told.failures))


async def test_a_run_goes_on_where_the_log_ends() -> None:
    first, store = await Case()(), FakeStore()
    store.log = first.store.log[:9]
    again = await Case(store=store)()
    assert again.trials == first.trials
    assert 0 < again.executor.num_scored < first.executor.num_scored


# --- budgets and time ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FakeExecutor, ThreadedExecutor])
@pytest.mark.parametrize("num_threads", [1, 7, 64])
async def test_a_token_budget_is_exceeded_by_what_was_in_flight_at_most(
    num_threads: int, kind: type[FakeExecutor]
) -> None:
    case = await Case(num_threads, Budget(max_tokens=500), kind=kind)()
    assert case.search.stop_reason == "max_tokens"
    assert 500 <= case.ledger.usage.tokens <= 500 + 10 * (num_threads - 1)


async def test_the_time_limit_cuts_calls_that_hang() -> None:
    async def hang(*_: Any) -> Any:
        await asyncio.sleep(1000)

    case = Case(budget=Budget(timeout_seconds=0.3))
    case.executor.score = hang  # type: ignore[method-assign]
    started = time.monotonic()
    await case()
    assert time.monotonic() - started < 5
    assert case.search.stop_reason == "timeout_seconds"
    assert case.run.num_in_flight == 0
    assert len(case.trials) == 0


async def test_a_thread_that_the_time_limit_has_cut_takes_no_further_example() -> None:
    case = Case(budget=Budget(timeout_seconds=0.3), num_threads=2, kind=ThreadedExecutor, seconds=0.0)
    end = threading.Event()
    case.executor.on_score = lambda block, position: end.wait(20) and None
    await case()
    assert case.search.stop_reason == "timeout_seconds"
    assert case.executor.num_scored == 0
    end.set()
    while case.executor.in_flight:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    assert case.executor.num_scored == 2  # the two that hung: paid for, and not in the log any more
    assert not any(isinstance(answer.work, ScoringTask) for answer in case.store.log)


async def test_the_time_limit_holds_for_the_preparation_too() -> None:
    case = Case(budget=Budget(timeout_seconds=0.2))
    case.run.prepare = lambda: asyncio.sleep(1000)  # type: ignore[assignment, return-value]
    await case()
    assert case.search.stop_reason == "timeout_seconds"
    assert case.executor.num_scored == 0


@pytest.mark.parametrize("kind", [FakeExecutor, ThreadedExecutor])
async def test_a_stop_waits_for_calls_in_flight_and_starts_none(kind: type[FakeExecutor]) -> None:
    case = Case(num_threads=4, seconds=0.05, kind=kind)

    def stop(block: ScoringTask, position: int) -> None:
        if case.executor.num_scored == 9:
            threading.Thread(target=case.run.request_stop, args=["interrupted"]).start()
            time.sleep(0.05)

    case.executor.on_score = stop
    await case()
    assert case.search.stop_reason == "interrupted"
    assert 10 <= case.executor.num_scored <= 14
    assert case.ledger.usage.metric_calls == case.executor.num_scored


async def test_a_stop_before_the_start_ends_at_once() -> None:
    case = Case()
    case.run.request_stop("interrupted")
    await case()
    assert case.search.stop_reason == "interrupted"
    assert case.executor.num_scored == 0


async def test_a_stop_after_the_end_is_too_late() -> None:
    case = await Case()()
    case.run.request_stop("interrupted")
    assert case.search.stop_reason == "num_rounds"


def test_a_stop_after_the_loop_is_gone_does_no_harm() -> None:
    case = asyncio.run(Case()())
    case.run.request_stop("interrupted")


@pytest.mark.parametrize("kind", [FakeExecutor, ThreadedExecutor])
@pytest.mark.parametrize("num_threads", [1, 7])
async def test_what_was_scored_of_a_block_that_the_end_cut_is_recorded_too(
    num_threads: int, kind: type[FakeExecutor]
) -> None:
    case = await Case(num_threads, Budget(max_tokens=333), kind=kind)()
    blocks = [answer for answer in case.store.log if isinstance(answer.work, ScoringTask)]
    assert sum(len(answer.content) for answer in blocks) == case.executor.num_scored  # type: ignore[arg-type]
    assert sum(answer.usage.metric_calls for answer in blocks) == case.ledger.usage.metric_calls


# --- errors ----------------------------------------------------------------------------------------------


class Broken(Exception):
    pass


def raise_at(number: int) -> Callable[..., None]:
    left = [number]

    def step(*_: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Broken

    return step


@pytest.mark.parametrize("where", ["score", "propose", "event", "stop_rule", "prepare"])
async def test_an_error_ends_the_run_as_itself(where: str) -> None:
    """No group of exceptions around it, no task left behind."""
    case = Case()
    if where == "score":
        case.executor.on_score = raise_at(50)
    elif where == "propose":
        case.executor.on_propose = raise_at(6)
    elif where == "event":
        case.run.on_event = raise_at(10)
    elif where == "stop_rule":
        case.search.stop_rule = raise_at(1)  # type: ignore[assignment]
    else:

        async def prepare() -> None:
            raise Broken

        case.run.prepare = prepare
    with pytest.raises(Broken):
        await case()
    assert case.search.stop_reason == "error"
    assert case.run.num_in_flight == case.executor.in_flight == 0
    assert len(asyncio.all_tasks()) == 1
    if where == "prepare":
        assert case.executor.num_scored == 0


async def test_an_error_in_a_recalled_round_ends_the_run_as_itself() -> None:
    first, store = await Case()(), FakeStore()
    store.log = first.store.log
    again = Case(store=store)
    again.search.stop_rule = raise_at(1)  # type: ignore[assignment]
    with pytest.raises(Broken):
        await again()


async def test_an_error_of_a_call_that_outlives_the_run_is_not_the_runs() -> None:
    case = Case(num_threads=64, plan=Plan(20, num_rounds=5, num_candidates=4, lag=2))
    case.search.stop_rule = lambda state: "enough" if state.round == 1 else None
    case.executor.on_score = lambda block, position: raise_at(0)() if case.search.done else None
    await case()
    assert case.search.stop_reason == "enough"


async def test_a_call_that_cancels_itself_ends_the_run_with_an_error() -> None:
    case = Case()

    def cancel(block: ScoringTask, position: int) -> None:
        if (block.split, position) == ("train", 3):
            raise asyncio.CancelledError

    case.executor.on_score = cancel
    with pytest.raises(RuntimeError, match="cancelled from within"):
        await case()


async def test_a_storage_that_fails_for_a_while_costs_nothing() -> None:
    case = Case()
    case.store.num_fails = 3
    await case()
    assert case.search.stop_reason == "num_rounds"
    assert [task_key(answer.work) for answer in case.store.log] == case.store.told_keys


async def test_a_storage_that_is_lost_ends_the_run_and_the_best_program_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recording, "PATIENCE_SECONDS", 1.0)
    case = Case(num_threads=4, plan=Plan(20, num_rounds=10_000, num_candidates=4))
    case.store.num_fails = float("inf")
    await case()
    assert case.search.stop_reason == "storage_lost"
    assert case.trials[0].id == STUDENT.id


async def test_what_is_scored_in_full_survives_an_error() -> None:
    case = Case(num_threads=1, plan=Plan(10, num_rounds=3, num_candidates=3))
    case.executor.on_score = raise_at(30)
    with pytest.raises(Broken):
        await case()
    assert case.trials[0].id == STUDENT.id
    assert len(case.search.best_scores) >= 1
