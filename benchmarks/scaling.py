"""What a run's storage costs, and what other processes cost and bring: `python benchmarks/scaling.py --help`.

One rule: within a part all rows do the same work, and workers have imported everything before the clock starts.

- storage: one search against a simulated server whose answers take long enough that the machine's cores are not what
  is measured.
- executor-overhead: a program that answers at once, in worker processes. What counts is the CPU of the coordinator.
- cpu-bound: a program that computes. One Python process can use one core for it.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import dspy

from dspy_opro.testing import Latency, LMCall, ScriptedLM, SimulatedModel, SimulatedServer, VocabularyTask

TASK = VocabularyTask(0)
NUM_TRAIN, NUM_CANDIDATES, NUM_THREADS = 16, 16, 4
SCORER, PROPOSER = Latency(2.0, 0.5), Latency(4.0, 0.3)
NUM_PROCESSES = 2
_numbers = count()
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    ["scaling", "dspy_opro.teleprompter", "dspy_opro.compile", "sqlalchemy.orm", "alembic.command"]
)

# -- storage -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What a run over a storage took."""

    wall_seconds: float
    cpu_seconds: float
    num_examples: int


def run_over(api_base: str, options: dict[str, Any], found: Any) -> None:
    """One run, in a process of its own; what it took goes into the pipe `found`."""
    import optuna

    from dspy_opro import OPROTeleprompter

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)

    def lm(name: str) -> dspy.LM:
        return dspy.LM(f"openai/{name}", api_base=api_base, api_key="unused", cache=False)

    teleprompter = OPROTeleprompter(
        metric=TASK.metric, prompt_model=lm("proposer"), task_model=lm("scorer"), auto=None, pruner=None,
        num_candidates=NUM_CANDIDATES, num_threads=NUM_THREADS, num_rounds=1, lag=3, display_progress=False, **options,
    )  # fmt: skip
    start, cpu_start = time.perf_counter(), time.process_time()
    usage = teleprompter.compile(TASK.student(), trainset=TASK.trainset(NUM_TRAIN)).opro_result.usage
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    found.send(Found(wall, cpu, usage.metric_calls))


def measure(scale: float, **options: Any) -> Found:
    """One run against a fresh server."""

    def scaled(latency: Latency) -> Latency:
        return Latency(latency.median_seconds * scale, latency.sigma)

    scorer = SimulatedModel(TASK.scorer, scaled(SCORER))
    proposer = SimulatedModel(TASK.proposer, scaled(PROPOSER))
    with SimulatedServer({"scorer": scorer, "proposer": proposer}) as server:
        receiver, sender = FORKSERVER.Pipe(duplex=False)
        process = FORKSERVER.Process(target=run_over, args=(server.api_base, options, sender))
        process.start()
        sender.close()
        found: Found = receiver.recv()
        process.join()
    return found


def storage(scale: float, postgresql: str | None) -> None:
    print(f"\nOne round of {NUM_CANDIDATES} candidates, {NUM_TRAIN} examples, {NUM_THREADS} threads\n")
    print("| storage | wall s | examples | examples/s | wall against memory | CPU ms an example |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        places: dict[str, dict[str, Any]] = {"in memory": {}, "journal file": {"log_dir": directory}}
        if postgresql:
            places["PostgreSQL"] = {"storage": postgresql, "study_name": f"scaling-{time.time()}"}
        memory = 0.0
        for name, place in places.items():
            found = measure(scale, **place)
            memory = memory or found.wall_seconds
            print(
                f"| {name} | {found.wall_seconds:.1f} | {found.num_examples} "
                f"| {found.num_examples / found.wall_seconds:.2f} | {100 * (found.wall_seconds / memory - 1):+.1f}% "
                f"| {1000 * found.cpu_seconds / found.num_examples:.1f} |",
                flush=True,
            )


# -- executors -----------------------------------------------------------------------------------


class Computing(dspy.Module):  # type: ignore[misc]
    """Calls no LM, but uses the processor for a while.

    Args:
        seconds: CPU time of one example.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.answer = dspy.Predict("question -> answer")

    def forward(self, question: str) -> dspy.Prediction:
        end = time.thread_time() + self.seconds
        while time.thread_time() < end:
            sum(range(1000))
        return dspy.Prediction(answer="yes" if len(question) % 2 else "no")


def exact(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> float:
    return float(example.answer == prediction.answer)


def never(call: LMCall) -> Mapping[str, str]:
    raise AssertionError("No LM is called in these runs.")


def compile_in(executor: Executor | None, seconds: float, size: int, num_threads: int) -> tuple[float, float]:
    """Score the student on so many examples: seconds of wall time and of this process's CPU for each of them."""
    from dspy_opro import OPROTeleprompter

    examples = [dspy.Example(question=f"{n}?", answer="yes").with_inputs("question") for n in range(size)]
    teleprompter = OPROTeleprompter(
        metric=exact, prompt_model=ScriptedLM(never), task_model=ScriptedLM(never), auto=None,
        max_metric_calls=size, max_train_examples=size, num_threads=num_threads,
        executor=executor, display_progress=False, track_stats=False,
    )  # fmt: skip
    start, cpu_start = time.perf_counter(), time.process_time()
    result = teleprompter.compile(Computing(seconds), trainset=examples).opro_result
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    assert result is None or result.usage.metric_calls == size
    return wall / size, cpu / size


def submit_alone(executor: Executor, size: int, num_threads: int) -> float:
    """Nothing but the executor, with a function that does nothing: seconds of this process's CPU for each call."""
    with ThreadPoolExecutor(num_threads) as threads:
        cpu_start = time.process_time()
        # Dask runs a call whose function and arguments it has in flight already only once.
        list(threads.map(lambda _: executor.submit(int, next(_numbers)).result(), range(size)))
    return (time.process_time() - cpu_start) / size


@contextmanager
def process_pool() -> Iterator[Executor]:
    with ProcessPoolExecutor(NUM_PROCESSES, multiprocessing.get_context("spawn")) as executor:
        yield executor


@contextmanager
def dask_here() -> Iterator[Executor]:
    """Dask's scheduler is a thread of this process, and its CPU counts."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            NUM_PROCESSES, threads_per_worker=1, dashboard_address=None, silence_logs="ERROR"
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client.get_executor()


@contextmanager
def dask_elsewhere() -> Iterator[Executor]:
    """Dask's scheduler is in another process, as on a cluster of machines."""
    from distributed import Client

    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=serve_dask, args=(there,))
    process.start()
    try:
        with Client(here.recv()) as client:
            yield client.get_executor()
    finally:
        here.send("end")
        process.join()


def serve_dask(pipe: Any) -> None:
    """A cluster, until somebody writes into the pipe."""
    from distributed import LocalCluster

    with LocalCluster(
        NUM_PROCESSES, threads_per_worker=1, dashboard_address=None, silence_logs="ERROR"
    ) as cluster:
        pipe.send(cluster.scheduler_address)
        pipe.recv()


def executor_overhead(size: int, repeats: int) -> None:
    executors: dict[str, Callable[[], Any]] = {"ProcessPoolExecutor": process_pool}
    if importlib.util.find_spec("distributed") is not None:
        executors |= {
            "Dask, scheduler elsewhere": dask_elsewhere,
            "Dask, scheduler in this process": dask_here,
        }
    num_threads = 4 * NUM_PROCESSES
    print(f"\n{size} examples that take no time, {NUM_PROCESSES} processes, median of {repeats} turns\n")
    print(
        "| executor | ms of the coordinator's CPU per example | of the executor alone | ours | examples/s |"
    )
    print("|---|---|---|---|---|", flush=True)
    for name, start in executors.items():
        with start() as executor:
            compile_in(executor, 0.0, num_threads, num_threads)
            turns = [
                (*compile_in(executor, 0.0, size, num_threads), submit_alone(executor, size, num_threads))
                for _ in range(repeats)
            ]
        walls, cpus, alone = zip(*turns, strict=True)
        spread = f"{1e3 * min(cpus):.2f} to {1e3 * max(cpus):.2f}"
        own = 1e3 * statistics.median(total - floor for total, floor in zip(cpus, alone, strict=True))
        print(
            f"| {name} | {1e3 * statistics.median(cpus):.2f} ({spread}; aim 1.5) "
            f"| {1e3 * statistics.median(alone):.2f} | {own:.2f} (aim 0.5) | {1 / statistics.median(walls):.0f} |",
            flush=True,
        )


def cpu_bound(size: int, seconds: float, repeats: int) -> None:
    print(f"\n{size} examples of {1e3 * seconds:.0f} ms of CPU each, {repeats} turns\n")
    rates: dict[str, list[float]] = {
        "one process": [],
        f"ProcessPoolExecutor({NUM_PROCESSES})": [],
    }  # name -> per turn
    with process_pool() as executor:
        compile_in(executor, 0.0, 4 * NUM_PROCESSES, 4 * NUM_PROCESSES)
        for _ in range(repeats):  # by turns, so that other work on the machine falls on both
            for values, used in zip(rates.values(), (None, executor), strict=True):
                values.append(1 / compile_in(used, seconds, size, 2 * NUM_PROCESSES)[0])
    print("| | examples/s | times one process, turn by turn |\n|---|---|---|")
    for name, values in rates.items():
        ratios = [rate / one for rate, one in zip(values, rates["one process"], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {statistics.median(values):.1f} | {spread} |")


PARTS = ("storage", "executor-overhead", "cpu-bound")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--scale", type=float, default=0.5, help="times the latencies, in storage")
    parser.add_argument("--postgresql", metavar="URL", help="a database that storage measures too")
    parser.add_argument("--size", type=int, default=2000, help="examples in a turn of executor-overhead")
    parser.add_argument("--computed", type=int, default=200, help="examples in a turn of cpu-bound")
    parser.add_argument("--seconds", type=float, default=0.05, help="CPU of each of them")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    logging.getLogger("dspy").setLevel(logging.ERROR)
    if "storage" in args.parts:
        storage(args.scale, args.postgresql)
    if "executor-overhead" in args.parts:
        executor_overhead(args.size, args.repeats)
    if "cpu-bound" in args.parts:
        cpu_bound(args.computed, args.seconds, args.repeats)


if __name__ == "__main__":
    main()
