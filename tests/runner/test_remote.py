"""Examples in other processes: the same run as in one, counted alike, and errors before anything is spent."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dspy
import optuna
import pytest

from dspy_opro import TooManyErrors, Usage
from dspy_opro.programs.metric import MetricError
from dspy_opro.storage.outage import Outage
from dspy_opro.storage.result_log import ResultLog, results_in
from dspy_opro.testing import Fault, Latency, SimulatedModel, SimulatedServer
from tests.runner import remote_programs as programs
from tests.runs import TASK, TRAINSET, VALSET, decisions, metric, optimize, propose, teleprompter

MODELS: dict[str, Any] = {
    "scorer": TASK.scorer,
    "slow": SimulatedModel(TASK.scorer, Latency(0.05, 0.4)),
    "gpt-4o-mini": TASK.scorer,  # litellm's list of prices, as it is installed, knows the name
    "proposer": propose,
}


@pytest.fixture(scope="module")
def shared() -> Iterator[SimulatedServer]:
    with SimulatedServer(MODELS) as server:
        yield server


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    """Two processes that have imported everything."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert (
            len({future.result(60) for future in [pool.submit(programs.process_id) for _ in range(6)]}) == 2
        )
        yield pool


@pytest.fixture(scope="module")
def dask() -> Iterator[Any]:
    """A client of two worker processes with two threads each."""
    distributed = pytest.importorskip("distributed", reason="Dask is not installed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=2, processes=True, dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        client.wait_for_workers(2)
        client.run(programs.process_id)
        yield client


@pytest.fixture
def executor(request: pytest.FixtureRequest) -> Executor:
    """The kind of executor that the test is parametrized with."""
    made: Executor
    if request.param == "dask":
        made = request.getfixturevalue("dask").get_executor()
    else:
        made = request.getfixturevalue("processes")
    return made


every_executor = pytest.mark.parametrize(
    "executor", ["processes", pytest.param("dask", marks=pytest.mark.slow)], indirect=True
)


class Recording(Executor):
    """Counts what is submitted."""

    def __init__(self, inner: Executor) -> None:
        self.inner = inner
        self.num_submitted = 0
        self.max_in_flight = 0
        self.futures: list[Any] = []
        self.payloads = 0
        self.lock = threading.Lock()

    def submit(self, function: Any, /, *arguments: Any, **keywords: Any) -> Any:
        with self.lock:
            self.num_submitted += 1
            self.payloads += any(isinstance(value, bytes) for value in arguments)
            # A future is done before its waiters wake. Its callbacks may run after that.
            self.futures = [future for future in self.futures if not future.done()]
            self.futures.append(self.inner.submit(function, *arguments, **keywords))
            self.max_in_flight = max(self.max_in_flight, len(self.futures))
            return self.futures[-1]


def settle(server: SimulatedServer) -> Any:
    """The server's counters once nothing is in flight any more."""
    for _ in range(500):
        stats = server.stats()
        if stats.in_flight == 0:
            return stats
        time.sleep(0.01)
    return stats


# --- the same run ----------------------------------------------------------------------------------------


@every_executor
@pytest.mark.parametrize("student", [programs.Step, programs.AsyncStep, lambda: programs.FailsOn("train-3?")])
def test_the_trajectory_is_that_of_a_run_in_one_process(
    server: SimulatedServer, executor: Executor, student: Callable[[], Any]
) -> None:
    here = optimize(server, student()).opro_result
    there = optimize(server, student(), executor=executor).opro_result
    assert {trial.id: trial.scores for trial in there.trajectory.trials} == {
        trial.id: trial.scores for trial in here.trajectory.trials
    }
    assert there.curve == here.curve
    assert there.trajectory.best.candidate == here.trajectory.best.candidate
    assert decisions(there) == decisions(here)


@every_executor
def test_an_async_metric_is_awaited_there(server: SimulatedServer, executor: Executor) -> None:
    here = optimize(server, programs.AsyncStep(), metric=metric).opro_result
    there = optimize(
        server, programs.AsyncStep(), metric=programs.async_metric, executor=executor
    ).opro_result
    assert decisions(there) == decisions(here)


async def test_acompile_scores_there_too(server: SimulatedServer, processes: Executor) -> None:
    here = optimize(server, programs.Step()).opro_result
    given = {"trainset": TRAINSET, "valset": VALSET}
    program = await teleprompter(server, executor=processes).acompile(programs.Step(), **given)
    assert decisions(program.opro_result) == decisions(here)


def test_what_is_made_in_a_function_travels_by_value(server: SimulatedServer, processes: Executor) -> None:
    class Local(programs.Step):
        def forward(self, question: str) -> Any:
            return self.inner(question=question)

    limit = 0.5
    here = optimize(server, programs.Step()).opro_result
    there = optimize(
        server, Local(), metric=lambda e, p: float(metric(e, p)) if limit else None, executor=processes
    ).opro_result
    assert there.curve == here.curve


def test_examples_are_scored_in_several_processes_with_the_settings_of_the_caller(
    server: SimulatedServer, processes: Executor
) -> None:
    """`task_model` is not given: the LM of `dspy.context` travels too."""
    seen: set[str] = set()

    class Looking(dspy.Module):  # type: ignore[misc]
        def forward(self, request: Any) -> Any:
            seen.update(exemplar.outcome.feedback for exemplar in request.exemplars if exemplar.outcome)
            return dspy.Prediction(instruction=f"variant {request.slot} of round {request.round}")

    with dspy.context(mark="the caller's", lm=server.lm("scorer")):
        optimize(
            server,
            programs.Settings(),
            metric=programs.says_where,
            task_model=None,
            proposer=Looking(),
            executor=processes,
            lag=0,
            num_exemplars=12,
        )
    assert {text.rpartition(" ")[0] for text in seen} == {"the caller's"}
    pids = {int(text.rpartition(" ")[2]) for text in seen}
    assert len(pids) == 2
    assert os.getpid() not in pids


@pytest.mark.parametrize("num_threads", [1, 5])
def test_calls_in_flight_there_are_never_more_than_num_threads_and_the_program_travels_rarely(
    server: SimulatedServer, num_threads: int
) -> None:
    with ThreadPoolExecutor(16) as threads:
        executor = Recording(threads)
        here = optimize(server, programs.Step()).opro_result
        there = optimize(server, programs.Step(), executor=executor, num_threads=num_threads).opro_result
    assert decisions(there) == decisions(here)
    assert 1 <= executor.max_in_flight <= num_threads
    assert 1 <= executor.payloads <= num_threads
    assert executor.num_submitted == there.usage.metric_calls + executor.payloads


def test_the_history_of_an_lm_does_not_travel(server: SimulatedServer) -> None:
    student, sizes = programs.Step(), list[int]()
    student.set_lm(server.lm("scorer"))

    class Weighing(Recording):
        def submit(self, function: Any, /, *arguments: Any, **keywords: Any) -> Any:
            sizes.extend(len(value) for value in arguments if isinstance(value, bytes))
            return super().submit(function, *arguments, **keywords)

    for text in ("", "x" * 100_000):
        if text:
            student.inner.lm(text)
        with ThreadPoolExecutor(1) as threads:
            optimize(server, student, task_model=None, executor=Weighing(threads), num_rounds=1)
    assert max(sizes) < min(sizes) + 1000


# --- what is counted -------------------------------------------------------------------------------------


@every_executor
def test_usage_cost_and_failures_reach_the_result(server: SimulatedServer, executor: Executor) -> None:
    result = optimize(
        server,
        programs.FailsOn("train-3?", "val-2?"),
        executor=executor,
        task_model=server.lm("gpt-4o-mini"),
        num_rounds=1,
        confirm=False,  # the valset selects
    ).opro_result
    stats = settle(server)
    scorer, proposer = stats["gpt-4o-mini"], stats["proposer"]
    assert result.usage.scorer_calls == scorer.completions == scorer.requests > 0
    assert result.usage.prompt_tokens == scorer.prompt_tokens + proposer.prompt_tokens
    assert result.usage.completion_tokens == scorer.completion_tokens + proposer.completion_tokens
    expected = 0.15e-6 * scorer.prompt_tokens + 0.60e-6 * scorer.completion_tokens
    assert result.usage.cost == pytest.approx(expected)
    assert result.num_failures == result.usage.metric_calls - result.usage.scorer_calls > 0
    failures = {(failure.split, failure.example) for failure in result.failures}
    assert failures == {("train", 3), ("val", 2)}
    assert all("ValueError: can't do" in failure.error for failure in result.failures)


def test_a_token_budget_holds_there(server: SimulatedServer, processes: Executor) -> None:
    result = optimize(
        server, auto=None, num_rounds=None, max_tokens=6000, num_threads=4, executor=processes, confirm=False
    ).opro_result
    assert result.stop_reason == "max_tokens"
    assert 6000 <= result.usage.tokens <= 6000 + 1000 * 4
    stats = settle(server)
    assert result.usage.tokens == sum(m.prompt_tokens + m.completion_tokens for m in stats.models.values())


def test_a_run_that_was_scored_there_is_resumed_here_at_no_cost(
    server: SimulatedServer, processes: Executor, tmp_path: Path
) -> None:
    first = optimize(server, programs.Step(), executor=processes, log_dir=tmp_path).opro_result
    server.reset()
    again = optimize(server, programs.Step(), log_dir=tmp_path).opro_result
    assert decisions(again) == decisions(first)
    assert again.usage == first.usage
    assert server.stats().requests == 0


# --- errors ----------------------------------------------------------------------------------------------


@every_executor
def test_a_metric_that_returns_no_score_ends_the_run(server: SimulatedServer, executor: Executor) -> None:
    with pytest.raises(MetricError, match="metric must return a number") as caught:
        optimize(server, programs.Step(), metric=programs.no_score, executor=executor)
    program = caught.value.program  # type: ignore[attr-defined]
    assert program.inner.signature.instructions == TASK.student().signature.instructions
    assert program.opro_result.stop_reason == "error"
    assert settle(server).requests == 1


def test_a_metric_that_raises_on_the_first_example_ends_the_run(
    server: SimulatedServer, processes: Executor
) -> None:
    with pytest.raises(MetricError, match="metric raised KeyError: 'missing'") as caught:
        optimize(server, programs.Step(), metric=programs.raises, executor=processes)
    assert caught.value.program.opro_result.stop_reason == "error"  # type: ignore[attr-defined]
    assert settle(server).requests == 1


def test_max_errors_ends_the_run_with_the_first_cause(server: SimulatedServer, processes: Executor) -> None:
    student = programs.FailsOn("train-1?", "train-2?", "train-3?")
    with pytest.raises(TooManyErrors, match=r"on 3 examples \(max_errors=3\)\. First cause: .*can't do"):
        optimize(server, student, max_errors=3, executor=processes)


def test_a_provider_that_is_down_is_a_failure_there(server: SimulatedServer, processes: Executor) -> None:
    server.inject(Fault("status", status=400), model="scorer")
    lm = server.lm("scorer", num_retries=0)
    with pytest.raises(TooManyErrors, match="fails on every example tried"):
        optimize(server, programs.Step(), task_model=lm, executor=processes)


@pytest.mark.slow
def test_a_rate_limit_there_is_no_failure(server: SimulatedServer, processes: Executor) -> None:
    lm = server.lm("scorer", num_retries=0)
    here = optimize(server, task_model=lm).opro_result
    server.reset()
    server.inject(Fault("status", status=429, count=12, retry_after_seconds=0.1), model="scorer")
    there = optimize(server, task_model=lm, executor=processes).opro_result
    assert server.stats()["scorer"].faults["status"] == 12
    assert decisions(there) == decisions(here)
    assert there.usage.metric_calls == here.usage.metric_calls


def test_examples_that_have_not_begun_are_taken_back_at_the_end(server: SimulatedServer) -> None:
    def slow(example: Any, prediction: Any) -> float:
        time.sleep(0.5)
        return metric(example, prediction)

    with ThreadPoolExecutor(1) as pool:
        recording = Recording(pool)
        settings = {"metric": slow, "num_threads": 8, "timeout_seconds": 2.0}
        optimize(server, executor=recording, **settings)
        assert recording.num_submitted > 5
        assert sum(not future.done() for future in recording.futures) <= 1


def test_an_executor_that_is_shut_down_ends_the_run(server: SimulatedServer) -> None:
    with ThreadPoolExecutor(1) as executor:
        pass
    with pytest.raises(RuntimeError, match="after shutdown") as caught:
        optimize(server, programs.Step(), executor=executor)
    assert caught.value.program.opro_result.stop_reason == "error"  # type: ignore[attr-defined]


def program_with_a_lock() -> dict[str, Any]:
    student = programs.Step()
    student.lock = threading.Lock()
    return {"student": student}


def metric_over_a_lock() -> dict[str, Any]:
    lock = threading.Lock()

    def locked(example: Any, prediction: Any) -> Any:
        with lock:
            return metric(example, prediction)

    return {"metric": locked}


def lm_with_a_socket(server: SimulatedServer) -> Any:
    lm = server.lm("scorer")
    lm.connection = socket.socket()
    return lm


@pytest.mark.parametrize(
    ("part", "make"),
    [
        ("the program", lambda server: program_with_a_lock()),
        ("the metric", lambda server: metric_over_a_lock()),
        ("task_model", lambda server: {"task_model": lm_with_a_socket(server)}),
        ("dspy.settings.lm", lambda server: {"task_model": None, "lm": lm_with_a_socket(server)}),
        ("dspy.settings.mark", lambda server: {"mark": threading.Lock()}),
        (
            "the examples",
            lambda server: {
                "trainset": [*TRAINSET, TRAINSET[0].copy(lock=threading.Lock()).with_inputs("question")]
            },
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_can_not_be_pickled_is_named_before_anything_is_spent(
    server: SimulatedServer, part: str, make: Any
) -> None:
    given = make(server)
    settings = {name: given.pop(name) for name in ("lm", "mark") if name in given}
    student = given.pop("student", None) or programs.Step()
    with ThreadPoolExecutor(1) as threads:
        executor = Recording(threads)
        with (
            dspy.context(**settings),
            pytest.raises(ValueError, match=f"picklable, but {part} is not: TypeError: "),
        ):
            optimize(server, student, executor=executor, **given)
    assert executor.num_submitted == 0
    assert server.stats().requests == 0
    for lm in (given.get("task_model"), settings.get("lm")):
        if lm is not None:
            lm.connection.close()


# --- what hangs, dies and is interrupted -----------------------------------------------------------------


def test_an_example_that_hangs_there_is_a_failure(server: SimulatedServer, processes: Executor) -> None:
    started = time.monotonic()
    result = optimize(
        server,
        programs.HangsAtFirst("train-3?"),
        executor=processes,
        example_timeout_seconds=2.0,
        num_threads=2,
        lag=0,
    ).opro_result
    assert time.monotonic() - started < 7
    assert result.stop_reason == "num_rounds"
    (failure,) = result.failures
    assert (failure.candidate, failure.split, failure.example) == (result.baseline.id, "train", 3)
    assert "example_timeout_seconds=2" in failure.error
    assert result.usage.metric_calls == result.usage.scorer_calls + 1


def test_a_process_that_dies_ends_a_run_in_a_pool_with_the_best_program(server: SimulatedServer) -> None:
    """`ProcessPoolExecutor` does not start another one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pid = pool.submit(programs.process_id).result(60)

        def kill(state: Any) -> None:
            if state.round == 1:
                os.kill(pid, signal.SIGKILL)

        with pytest.raises(Exception, match="terminated abruptly") as caught:
            optimize(server, programs.Step(), executor=pool, stoppers=[kill], num_rounds=4, lag=0)
    program = caught.value.program  # type: ignore[attr-defined]
    assert program.opro_result.stop_reason == "error"
    assert len(program.opro_result.curve) >= 2


@pytest.mark.slow
def test_a_dask_worker_that_is_killed_changes_nothing(server: SimulatedServer, dask: Any) -> None:
    """Its examples are scored again by another worker."""
    student, changes = programs.Step(), dict[str, Any](num_rounds=4, num_threads=4)
    here = optimize(server, student, **changes).opro_result
    server.reset()
    pids = dask.run(os.getpid)
    killed = []

    def kill() -> None:
        while server.stats().requests < 40:
            time.sleep(0.02)
        killed.append(pids.popitem()[1])
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    storage = optuna.storages.InMemoryStorage()
    changes |= {"task_model": server.lm("slow"), "storage": storage, "study_name": "run"}
    there = optimize(server, student, executor=dask.get_executor(), **changes).opro_result
    thread.join()
    assert killed
    assert killed[0] not in dask.run(os.getpid).values()
    assert decisions(there) == decisions(here)
    log = ResultLog(optuna.load_study(storage=storage, study_name="run/log"), Outage())
    results = [(key, result.usage) for key, result in results_in(log.read())]
    assert len({key for key, _ in results}) == len(results)
    assert sum((usage for _, usage in results), Usage()) == there.usage
    assert there.usage.metric_calls == sum(key.startswith("score") for key, _ in results)


SCRIPT = """
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor

from dspy_opro.testing import VocabularyTask

if __name__ == "__main__":
    import dspy
    from dspy_opro import OPRO

    task = VocabularyTask(seed=1)
    lm, other = (
        dspy.LM(f"openai/{name}", api_base=sys.argv[1], api_key="unused", cache=False)
        for name in ("slow", "proposer")
    )
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        optimizer = OPRO(task.metric, prompt_model=other, task_model=lm, auto=None, num_rounds=100000, num_threads=4,
                         display_progress=False, executor=pool,
                         stoppers=[lambda state: print("under way", flush=True) if state.round == 2 else None])
        result = optimizer.compile(task.student(), trainset=task.trainset(12)).opro_result
    print(result.stop_reason, result.num_failures, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX has them")
def test_ctrl_c_in_a_terminal_fails_no_example(server: SimulatedServer, tmp_path: Path) -> None:
    """It reaches the worker processes, too."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), server.api_base]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "under way\n", process.communicate()
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out == "interrupted 0\n"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
