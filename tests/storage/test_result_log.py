"""The log of results: what was added is there after a write, once and in order, whatever the storage does meanwhile."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.storages import InMemoryStorage
from replay import STUDENT, expected, known, perform, record, scoring

from dspy_opro.search.tasks import Proposal, ProposalTask, ScoringTask, Task, TaskResult, View, task_key
from dspy_opro.search.trajectory import Outcome, Trajectory, Usage
from dspy_opro.storage import result_log
from dspy_opro.storage.outage import Outage
from dspy_opro.storage.result_log import PART_SIZE, TEXT_LIMIT, ResultLog, encode_usage
from dspy_opro.storage.run_storage import open_run


class Flaky(InMemoryStorage):
    """A storage whose writes fail where a test says so, before or after the storage took them in."""

    def __init__(self) -> None:
        super().__init__()
        self.failing: list[str] = []
        """How the next writes fail, "before" or "after"; "" lets one pass."""
        self.before_write: Callable[[], None] = lambda: None
        self.num_writes = 0

    def create_new_trial(self, study_id: int, template_trial: Any = None) -> int:
        self.num_writes += 1
        self.before_write()
        how = self.failing.pop(0) if self.failing else ""
        if how == "before":
            raise ConnectionError("the storage is away")
        trial_id = super().create_new_trial(study_id, template_trial)
        if how == "after":
            raise ConnectionError("the answer was lost")
        return trial_id


@pytest.fixture
def storage() -> Flaky:
    return Flaky()


def open_log(storage: Flaky) -> tuple[ResultLog, Outage]:
    outage = Outage()
    return ResultLog(
        optuna.create_study(study_name="log", storage=storage, load_if_exists=True), outage
    ), outage


def hold(storage: Flaky) -> tuple[threading.Event, threading.Event]:
    """Let every write wait for the second event. The first one says that a write has begun."""
    is_writing, goes_on = threading.Event(), threading.Event()

    def slowly() -> None:
        is_writing.set()
        assert goes_on.wait(10)

    storage.before_write = slowly
    return is_writing, goes_on


def add(log: ResultLog, *tasks: Task) -> None:
    for task in tasks:
        log.add(task, perform(task))


def keys(storage: Flaky) -> list[str]:
    """What the next process finds."""
    return [each["key"] for each in open_log(storage)[0].read()]


def names(tasks: list[ScoringTask]) -> list[str]:
    return [task_key(task) for task in tasks]


def ask(slot: int = 0) -> ProposalTask:
    return ProposalTask(1, slot, 0, ("answer",), View(Trajectory(), STUDENT, ()))


# -- what goes in comes out --------------------------------------------------------------------------


def test_results_come_back_equal(tmp_path: Path) -> None:
    proposal = Proposal(
        {"answer": "x" * 3 * PART_SIZE, "other": '"\\\u2028\x00 字'}, ("too long",), "Timeout: 3"
    )
    spent = Usage(metric_calls=3, cost=0.1 + 0.2)
    outcomes = [
        Outcome(0.1 + 0.2, "a", "b", None, {"f1": 1 / 3}),
        Outcome(float("-inf")),
        Outcome(1, error="E"),
    ]
    results = {task_key(ask()): TaskResult(proposal, spent, 1.5)}
    run = open_run(log_dir=tmp_path)
    run.log.add(ask(), results[task_key(ask())])
    for position, outcome in enumerate(outcomes):
        task = ScoringTask(STUDENT, 0, "val", position)
        results[task_key(task)] = TaskResult(outcome, spent, 2.5)
        run.log.add(task, results[task_key(task)])
    run.log.write()
    assert known(open_run(log_dir=tmp_path)) == results


@pytest.mark.parametrize("number", [0, 3])
def test_calls_without_a_price_come_back_and_old_records_have_none(number: int) -> None:
    record = encode_usage(Usage(scorer_calls=4, unpriced_calls=number))
    assert ("unpriced_calls" in record) == bool(number)
    assert Usage(**json.loads(json.dumps(record))).unpriced_calls == number


@pytest.mark.parametrize("size", [PART_SIZE // 2, PART_SIZE, 3 * PART_SIZE])
def test_an_entry_larger_than_one_attribute_comes_back(tmp_path: Path, size: int) -> None:
    result = TaskResult(Proposal({"answer": '"' * size}))
    run = open_run(log_dir=tmp_path)
    run.log.add(ask(), result)
    run.log.write()
    record(run, *scoring(2))
    assert known(open_run(log_dir=tmp_path)) == {task_key(ask()): result, **expected(*scoring(2))}


def test_no_attribute_outgrows_a_database_column(tmp_path: Path) -> None:
    run = open_run(log_dir=tmp_path)
    for task in scoring(64):
        run.log.add(task, TaskResult(Outcome(0.0, "😀" * 5000, '"' * 5000, "\\" * 5000)))
    run.log.write()
    entries = optuna.load_study(study_name="opro/log", storage=run.study._storage).get_trials()
    sizes = [len(json.dumps(value)) for entry in entries for value in entry.user_attrs.values()]
    assert max(sizes) < 65_535
    results = known(open_run(log_dir=tmp_path))
    assert list(results) == names(scoring(64))
    for result in results.values():
        assert isinstance(result.content, Outcome)
        assert len(result.content.output) == len(result.content.error or "") == TEXT_LIMIT


def test_no_entry_outgrows_a_message_of_grpc(storage: Flaky) -> None:
    log, outage = open_log(storage)
    storage.failing = ["after"]
    texts = {"self": "x" * (result_log.ENTRY_SIZE // 3)}
    for slot in range(8):
        log.add(ask(slot), TaskResult(Proposal(texts)))
    log.write()
    assert outage.is_under_way
    log.write()
    entries = optuna.load_study(study_name="log", storage=storage).get_trials()
    assert max(len(json.dumps(entry.user_attrs)) for entry in entries) < 1.1 * result_log.ENTRY_SIZE
    assert keys(storage) == [task_key(ask(slot)) for slot in range(8)]


def test_nothing_is_kept_without_a_storage() -> None:
    run = open_run()
    record(run, *scoring(2))
    assert run.log.read() == []


# -- several threads ---------------------------------------------------------------------------------


def test_what_a_thread_added_is_kept_once_its_write_returns(storage: Flaky) -> None:
    log, _ = open_log(storage)
    lost: list[str] = []

    def work(number: int) -> None:
        for task in scoring(10 * number + 10, 10 * number):
            add(log, task)
            log.write()
            if task_key(task) not in keys(storage):
                lost.append(task_key(task))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert lost == []
    assert sorted(keys(storage)) == sorted(names(scoring(80)))


def test_batches_lose_nothing_and_keep_the_order_in_which_results_were_added(storage: Flaky) -> None:
    log, _ = open_log(storage)
    added: list[str] = []
    lock = threading.Lock()  # as that of the task queue, under which results are added

    def work(number: int) -> None:
        for task in scoring(100 * number + 100, 100 * number):
            with lock:
                add(log, task)
                added.append(task_key(task))
            log.write()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert keys(storage) == added
    assert len(added) == 800


def test_one_write_takes_along_what_others_added_meanwhile(storage: Flaky) -> None:
    """While the first write is slow, nine threads add their results: they are one entry more, not nine."""
    log, _ = open_log(storage)
    is_writing, goes_on = hold(storage)
    first, *others = scoring(10)
    with ThreadPoolExecutor(10) as pool:
        add(log, first)
        writes = [pool.submit(log.write)]
        assert is_writing.wait(10)
        add(log, *others)
        writes += [pool.submit(log.write) for _ in others]
        goes_on.set()
        for write in writes:
            write.result(10)
    assert keys(storage) == names(scoring(10))
    assert storage.num_writes == 2


def test_threads_that_add_all_the_time_share_their_writes(storage: Flaky) -> None:
    """While one thread writes, 15 others add a result each: the next write takes most of them."""
    log, _ = open_log(storage)
    storage.before_write = lambda: time.sleep(0.01)
    lock = threading.Lock()

    def work(number: int) -> None:
        for task in scoring(20 * number + 20, 20 * number):
            with lock:
                add(log, task)
            log.write()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))
    assert len(keys(storage)) == 320
    assert storage.num_writes < 100


# -- storages that fail ------------------------------------------------------------------------------


def test_a_write_that_must_work_says_so_if_another_one_takes_long(
    storage: Flaky, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result_log, "PATIENCE_FOR_ONE_WRITE_SECONDS", 0.1)
    log, _ = open_log(storage)
    is_writing, goes_on = hold(storage)
    with ThreadPoolExecutor(1) as pool:
        add(log, *scoring(1))
        write = pool.submit(log.write)
        assert is_writing.wait(10)
        add(log, *scoring(2, 1))
        with pytest.raises(TimeoutError, match="takes long"):
            log.write(must_work=True)
        goes_on.set()
        write.result(10)
    log.write(must_work=True)
    assert keys(storage) == names(scoring(2))


def test_a_storage_that_fails_keeps_the_results_for_the_next_write(storage: Flaky) -> None:
    log, outage = open_log(storage)
    storage.failing = ["before", "before"]
    for count in (1, 2):
        add(log, *scoring(count, count - 1))
        log.write()
        assert outage.is_under_way
        assert keys(storage) == []
    add(log, *scoring(3, 2))
    log.write()
    assert not outage.is_under_way
    assert keys(storage) == names(scoring(3))


def test_a_write_that_must_work_raises_and_may_be_repeated(storage: Flaky) -> None:
    log, _ = open_log(storage)
    storage.failing = ["before"]
    add(log, *scoring(2))
    with pytest.raises(ConnectionError, match="the storage is away"):
        log.write(must_work=True)
    log.write(must_work=True)
    assert keys(storage) == names(scoring(2))


@pytest.mark.parametrize("num_more", [0, 1, 5])
def test_a_write_repeated_after_a_lost_answer_counts_once(storage: Flaky, num_more: int) -> None:
    """The storage took the entry in and the connection broke. What was added since is not part of that entry."""
    log, _ = open_log(storage)
    storage.failing = ["after"]
    add(log, *scoring(3))
    log.write()
    add(log, *scoring(3 + num_more, 3))
    log.write()
    assert keys(storage) == names(scoring(3 + num_more))


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["", "", "before", "after"])), max_size=12))
def test_whatever_fails_in_between_all_results_are_kept_once_and_in_order(
    writes: list[tuple[int, str]],
) -> None:
    storage = Flaky()
    log, _ = open_log(storage)
    num_added = 0
    for size, how in writes:
        add(log, *scoring(num_added + size, num_added))
        num_added += size
        storage.failing = [how]
        log.write()
        assert keys(storage) == names(scoring(num_added))[: len(keys(storage))]
    storage.failing = []
    log.write()
    assert keys(storage) == names(scoring(num_added))
