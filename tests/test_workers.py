"""Several processes on one run: each piece of work is done once, and all of them return the same program."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from workers import MOST_IN_FLIGHT, NUM_TRAIN, NUM_VAL, OPTIONS, TASK, Worker, serve

from dspy_opro import OPROTeleprompter
from dspy_opro.study import SharedStore
from dspy_opro.testing import ScriptedLM, SimulatedServer

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[SimulatedServer]:
    with serve() as started:
        yield started


@pytest.fixture(scope="module")
def expected(server: SimulatedServer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one process finds, and its calls: result, scorer calls, proposer calls."""
    server.reset()
    found = Worker(server, tmp_path_factory.mktemp("alone")).result()
    stats = server.stats()
    return found, stats["scorer"].requests, stats["proposer"].requests


def new_name() -> str:
    return f"shared-{time.time()}-{next(NUMBERS)}"


# -- the storages ------------------------------------------------------------------------------------


def open_journal(path: str) -> Any:
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    return JournalStorage(JournalFileBackend(path))


def open_redis(url: str) -> Any:
    from optuna.storages.journal import JournalRedisBackend, JournalStorage

    return JournalStorage(JournalRedisBackend(url))


def open_proxy(port: int) -> Any:
    from optuna.storages import GrpcStorageProxy

    return GrpcStorageProxy(host="127.0.0.1", port=port)


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Arguments of the teleprompter that name the storage."""
    where = request.param
    if where == "sqlite":
        return {"storage": f"sqlite:///{tmp_path}/run.db"}
    if where == "journal":
        return {"make_storage": functools.partial(open_journal, f"{tmp_path}/run.log")}
    if where == "redis":
        return {"make_storage": functools.partial(open_redis, request.getfixturevalue("redis"))}
    if where == "grpc":
        return {"make_storage": functools.partial(open_proxy, request.getfixturevalue("grpc_proxy"))}
    return {"storage": request.getfixturevalue(where)}


SERVERS = ["postgresql", "journal", "redis", "mysql", "grpc"]
ALL = ["sqlite", *(pytest.param(name, marks=pytest.mark.slow) for name in SERVERS)]


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("place", ALL, indirect=True)
def test_workers_share_a_run(
    server: SimulatedServer, expected: Any, tmp_path: Path, place: dict[str, Any]
) -> None:
    server.reset()
    name = new_name()
    workers = [Worker(server, tmp_path, study_name=name, **place) for _ in range(3)]
    assert [worker.result() for worker in workers] == [expected[0]] * 3
    stats = server.stats()
    assert stats["scorer"].requests == expected[1]  # nothing was scored twice
    assert stats["proposer"].requests == expected[2]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["postgresql"], indirect=True)
def test_the_visible_study_is_that_of_a_single_process(
    server: SimulatedServer, expected: Any, tmp_path: Path, place: dict[str, Any]
) -> None:
    import optuna

    name = new_name()
    for worker in [Worker(server, tmp_path, study_name=name, **place) for _ in range(2)]:
        worker.result()
    study = optuna.load_study(study_name=name, **place)
    shown = [[t.user_attrs["candidate_id"], t.value, t.state.name.lower()] for t in study.get_trials()]
    assert shown == [trial[:3] for trial in expected[0]["trials"]]
    assert study.user_attrs["stop_reason"] == "num_rounds"


# -- workers that come and go ------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["postgresql"], indirect=True)
def test_a_killed_workers_work_is_taken_over(
    server: SimulatedServer, expected: Any, tmp_path: Path, place: dict[str, Any]
) -> None:
    server.reset()
    draw, name = random.Random(1), new_name()
    survivor = Worker(server, tmp_path, study_name=name, **place)
    num_kills = 0
    while num_kills < 3:
        other = Worker(server, tmp_path, study_name=name, **place)
        if other.is_over(draw.uniform(0.6, 1.5)):
            break
        other.kill()
        num_kills += 1
    assert num_kills > 0
    assert survivor.result() == expected[0]
    stats = server.stats()
    assert stats["scorer"].requests - expected[1] <= num_kills * 2 * MOST_IN_FLIGHT


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("place", ["sqlite", "journal", "postgresql", "redis", "mysql"], indirect=True)
def test_whoever_is_killed_nothing_is_lost(
    server: SimulatedServer, expected: Any, tmp_path: Path, place: dict[str, Any]
) -> None:
    """Each of three workers is killed at random, the first to join among them, and another one comes instead."""
    server.reset()
    draw, name = random.Random(2), new_name()
    workers = [Worker(server, tmp_path, study_name=name, **place) for _ in range(3)]
    num_kills = 0
    while num_kills < 6 and not any(worker.is_over(0.0) for worker in workers):
        time.sleep(draw.uniform(0.2, 1.2))
        victim = workers.pop(0)
        victim.kill()
        num_kills += 1
        workers.append(Worker(server, tmp_path, study_name=name, **place))
    assert [worker.result() for worker in workers] == [expected[0]] * 3
    stats = server.stats()
    assert stats["scorer"].requests - expected[1] <= num_kills * 2 * MOST_IN_FLIGHT


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
def test_an_interrupted_worker_leaves_its_work_to_the_others(
    server: SimulatedServer, expected: Any, tmp_path: Path, place: dict[str, Any]
) -> None:
    server.reset()
    name = new_name()
    first, second = (Worker(server, tmp_path, study_name=name, **place) for _ in range(2))
    while server.stats()["scorer"].requests < expected[1] // 2:
        assert not first.is_over(0.02)
    first.signal(signal.SIGINT)
    assert first.result()["stop_reason"] == "interrupted"
    assert second.result() == expected[0]
    assert server.stats()["scorer"].requests == expected[1]


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
def test_who_comes_late_gets_the_result_without_a_call(
    server: SimulatedServer, expected: Any, tmp_path: Path, place: dict[str, Any]
) -> None:
    name = new_name()
    Worker(server, tmp_path, study_name=name, **place).result()
    server.reset()
    assert Worker(server, tmp_path, study_name=name, **place).result() == expected[0]
    assert server.stats().requests == 0


# -- ends that are shared ----------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ({"max_tokens": 9000}, "max_tokens"),
        pytest.param({"stop_at_score": 0.3}, "stop_at_score", marks=pytest.mark.slow),
        pytest.param({"patience": 1}, "patience", marks=pytest.mark.slow),
    ],
)
def test_one_workers_end_is_everybodys(
    server: SimulatedServer, tmp_path: Path, place: dict[str, Any], limit: dict[str, Any], reason: str
) -> None:
    name = new_name()
    workers = [Worker(server, tmp_path, study_name=name, num_rounds=30, **limit, **place) for _ in range(3)]
    found = [worker.result() for worker in workers]
    assert found[0]["stop_reason"] == reason
    assert found[1:] == found[:1] * 2


@pytest.mark.slow
@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
def test_a_budget_counts_what_all_of_them_spend(
    server: SimulatedServer, tmp_path: Path, place: dict[str, Any]
) -> None:
    server.reset()
    workers = [
        Worker(server, tmp_path, study_name="x", num_rounds=30, max_tokens=9000, **place) for _ in range(3)
    ]
    for worker in workers:
        worker.result()
    stats = server.stats()
    tokens = sum(stats[m].prompt_tokens + stats[m].completion_tokens for m in ("scorer", "proposer"))
    calls = sum(stats[m].requests for m in ("scorer", "proposer"))
    # What others have under way is known once a block is recorded.
    assert 9000 <= tokens <= 9000 + 3 * MOST_IN_FLIGHT * 3 * tokens / calls


@pytest.mark.slow
@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
def test_the_next_process_goes_on_with_a_larger_budget(
    server: SimulatedServer, expected: Any, tmp_path: Path, place: dict[str, Any]
) -> None:
    name = new_name()
    short = Worker(server, tmp_path, study_name=name, max_tokens=9000, **place).result()
    assert short["stop_reason"] == "max_tokens"
    assert Worker(server, tmp_path, study_name=name, **place).result() == expected[0]


def has_decided(worker: Worker, log_dir: Path) -> bool:
    """Whether a worker has got past its first round."""
    log = log_dir / "run.log"
    return log.exists() and f" {worker.process.pid} INFO round 0 decided" in log.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
def test_a_stop_file_ends_all_and_all_return_the_same(
    server: SimulatedServer, tmp_path: Path, place: dict[str, Any]
) -> None:
    log_dir = tmp_path / "run"
    workers = [
        Worker(server, tmp_path, study_name="x", log_dir=str(log_dir), num_rounds=50, **place)
        for _ in range(3)
    ]
    # A worker that came only after the others have ended would go on with the run.
    while not all(has_decided(worker, log_dir) for worker in workers):
        assert not workers[0].is_over(0.05)
    (log_dir / "stop").touch()
    found = [worker.result() for worker in workers]
    assert found[0]["stop_reason"] == "stop_file"
    assert found[1:] == found[:1] * 2
    best = json.loads((log_dir / "best.json").read_text())["signature"]["instructions"]
    assert best == found[0]["best"]["self"]


# -- workers that do not fit -------------------------------------------------------------------------


def compile_in(store: dict[str, Any], **options: Any) -> Any:
    models = {"prompt_model": ScriptedLM(TASK.proposer), "task_model": ScriptedLM(TASK.scorer)}
    data = {"trainset": TASK.trainset(NUM_TRAIN), "valset": TASK.valset(NUM_VAL)}
    arguments = {"metric": TASK.metric, **models, **data, **OPTIONS, **store, **options}
    return OPROTeleprompter(**arguments).compile(TASK.student())


def test_other_settings_beside_a_worker_are_an_error_that_names_them(tmp_path: Path) -> None:
    place = {"storage": f"sqlite:///{tmp_path}/run.db", "study_name": "x"}
    with serve(median_seconds=5.0) as slow:  # so that the worker is still there
        worker = Worker(slow, tmp_path, **place)
        while not slow.stats().requests:
            assert not worker.is_over(0.05)
        with pytest.raises(ValueError, match="num_candidates is 4 there and 5 here"):
            compile_in(place, num_candidates=5, task_model=slow.lm("scorer"))
        worker.kill()


def test_threads_of_one_process_share_an_object_in_memory() -> None:
    """The storage may be any object: here two threads of this process are the workers."""
    import concurrent.futures

    import optuna

    place = {"storage": optuna.storages.InMemoryStorage(), "study_name": "x"}
    scored: list[str] = []

    def score(call: Any) -> Any:
        scored.append(call.prompt)
        time.sleep(0.01)
        return TASK.scorer(call)

    lms = {"task_model": ScriptedLM(score), "prompt_model": ScriptedLM(TASK.proposer)}
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        both = [threads.submit(compile_in, place, **lms) for _ in range(2)]
        first, second = (future.result(60).opro_result for future in both)
    assert first.trajectory == second.trajectory
    assert first.usage.metric_calls == second.usage.metric_calls == len(scored) == len(set(scored))


def in_memory() -> dict[str, Any]:
    import optuna

    return {"storage": optuna.storages.InMemoryStorage(), "study_name": "x"}


def kinds(place: dict[str, Any]) -> list[str]:
    """Of the records of a run's log."""
    import optuna

    log = optuna.load_study(study_name="x/log", storage=place["storage"])
    return [record["kind"] for trial in log.get_trials() for record in trial.user_attrs["records"]]


def test_an_error_of_a_stopper_comes_as_it_is_and_the_worker_leaves() -> None:
    def stopper(state: Any) -> None:
        if state.round == 1:
            raise ZeroDivisionError("mine")

    place = in_memory()
    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        compile_in(place, stoppers=[stopper])
    assert caught.value.program is not None  # type: ignore[attr-defined]
    assert kinds(place)[-1] == "left"
    assert "left" not in kinds(place)[:-1]
    with pytest.raises(ZeroDivisionError, match="mine"):  # now while the past is taken in
        compile_in(place, stoppers=[stopper])
    assert kinds(place)[-1] == "left"


async def test_a_cancelled_worker_leaves_room_for_another_one() -> None:
    place, begun = in_memory(), asyncio.Event()

    async def score(call: Any) -> Any:
        begun.set()
        await asyncio.sleep(30)
        return TASK.scorer(call)

    models = {"prompt_model": ScriptedLM(TASK.proposer), "task_model": ScriptedLM(score)}
    data = {"trainset": TASK.trainset(NUM_TRAIN), "valset": TASK.valset(NUM_VAL)}
    teleprompter = OPROTeleprompter(metric=TASK.metric, **models, **OPTIONS, **place)
    task = asyncio.create_task(teleprompter.acompile(TASK.student(), **data))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    while kinds(place)[-1] != "left":
        await asyncio.sleep(0.05)
    found = await asyncio.to_thread(compile_in, place, num_candidates=5)
    assert found.opro_result.stop_reason == "num_rounds"


# -- a worker that only seems dead -------------------------------------------------------------------


def join_two(make: Callable[[], SharedStore]) -> tuple[SharedStore, SharedStore]:
    from dspy_opro.trajectory import Candidate
    from dspy_opro.work import Block

    first = Block(Candidate({"self": "x"}), 0, "train", 0, 4)
    stores = make(), make()
    for store in stores:
        store.join({}, first)
    for store in stores:
        store.exchange()
        while store.load_next() is not None:
            pass
    return stores


def test_a_worker_without_a_heartbeat_is_lost_and_may_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import optuna

    from dspy_opro.study import liveness, sharing
    from dspy_opro.trajectory import Candidate
    from dspy_opro.work import Block

    monkeypatch.setattr(liveness, "STALE_SECONDS", 0.4)
    monkeypatch.setattr(sharing, "BEAT_SECONDS", 0.05)
    storage = optuna.storages.InMemoryStorage()
    sleeper, watcher = join_two(lambda: SharedStore(storage, "x"))
    held = Block(Candidate({"self": "x"}), 0, "train", 0, 4)
    assert sleeper.is_mine(held)
    assert watcher.place == (1, 2)
    deadline = time.monotonic() + 5
    while not watcher.is_free(held):
        assert time.monotonic() < deadline
        time.sleep(0.06)
        watcher.exchange()
        while watcher.load_next() is not None:
            pass
    assert watcher.leads
    sleeper.exchange()
    while sleeper.load_next() is not None:
        pass
    assert not sleeper.is_member
    sleeper.rejoin([held])
    sleeper.exchange()
    while sleeper.load_next() is not None:
        pass
    assert sleeper.is_member
    assert sleeper.is_mine(held)
