"""How a run scales over processes, and what its storage costs.

    python benchmarks/scaling.py [--postgresql URL] [--parts storage,workers,kills]

One rule: every row runs the same search against the same simulated server, whose answers take long enough
that the machine's cores are not what is measured; more workers do more rounds, so that start and end weigh
alike. Workers are forked from a process that has imported everything, and the clock runs from the moment at
which all of them are ready.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspy_opro.testing import Latency, SimulatedModel, SimulatedServer, VocabularyTask

TASK = VocabularyTask(0)
NUM_TRAIN, NUM_CANDIDATES, NUM_THREADS, BLOCK_SIZE = 16, 16, 4, 4
SCORER, PROPOSER = Latency(2.0, 0.5), Latency(4.0, 0.3)
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["scaling", "dspy", "dspy_opro.teleprompter", "sqlalchemy.orm", "alembic.command"]
)


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    name: str
    num_workers: int
    wall_seconds: float
    num_examples: int
    scored_twice: int
    """Calls beyond one per example, what killed workers had under way included."""
    cpu_seconds: float
    """Processor time of the workers that were not killed."""
    num_kills: int = 0

    @property
    def rate(self) -> float:
        """Scored examples a second."""
        return self.num_examples / self.wall_seconds


def work(api_base: str, ready: Any, answer: str, options: dict[str, Any]) -> None:
    """One worker: wait for the others, compile, leave what was found in the file `answer`."""
    import dspy
    import optuna

    from dspy_opro import OPROTeleprompter

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)

    def lm(name: str) -> dspy.LM:
        return dspy.LM(f"openai/{name}", api_base=api_base, api_key="unused", cache=False)

    teleprompter = OPROTeleprompter(
        metric=TASK.metric, prompt_model=lm("proposer"), task_model=lm("scorer"), auto=None, pruner=None,
        num_candidates=NUM_CANDIDATES, num_threads=NUM_THREADS, block_size=BLOCK_SIZE, lag=3, display_progress=False,
        **options,
    )  # fmt: skip
    if ready is not None:
        ready.wait()
    started, cpu = time.time(), time.process_time()
    result = teleprompter.compile(TASK.student(), trainset=TASK.trainset(NUM_TRAIN)).opro_result
    found = {"best": result.best.id, "examples": sum(t.num_scored for t in result.trajectory.trials)}
    found |= {"started": started, "ended": time.time(), "cpu": time.process_time() - cpu}
    Path(answer).write_text(json.dumps(found), encoding="utf-8")


def scaled(latency: Latency, scale: float) -> Latency:
    return Latency(latency.median_seconds * scale, latency.sigma)


def run(
    name: str, num_workers: int, kill_every: float | None = None, scale: float = 1.0, **options: Any
) -> Row:
    """Let workers share one run; with `kill_every` kill one that often and start another in its place."""
    models = {
        "scorer": SimulatedModel(TASK.scorer, scaled(SCORER, scale)),
        "proposer": SimulatedModel(TASK.proposer, scaled(PROPOSER, scale)),
    }
    with SimulatedServer(models) as server, tempfile.TemporaryDirectory() as directory:
        ready = CONTEXT.Barrier(num_workers) if kill_every is None else None

        def start(number: int) -> Any:
            arguments = (server.api_base, ready, f"{directory}/{number}", options)
            process = CONTEXT.Process(target=work, args=arguments)
            process.start()
            return process

        began, workers = time.time(), [start(number) for number in range(num_workers)]
        num_kills = 0 if kill_every is None else kill_again_and_again(workers, start, kill_every)
        for worker in workers:
            worker.join()
        answers = [json.loads(path.read_text(encoding="utf-8")) for path in Path(directory).iterdir()]
        requests = server.stats()["scorer"].requests
    assert answers and len({answer["best"] for answer in answers}) == 1, answers
    first = min(answer["started"] for answer in answers) if kill_every is None else began
    wall = max(answer["ended"] for answer in answers) - first
    num_examples = answers[0]["examples"]
    cpu = sum(answer["cpu"] for answer in answers)
    return Row(name, num_workers, wall, num_examples, requests - num_examples, cpu, num_kills)


def kill_again_and_again(workers: list[Any], start: Any, seconds: float) -> int:
    """Until one of them has ended by itself: how many were killed."""
    draw, num_kills = random.Random(0), 0
    while True:
        time.sleep(seconds)
        if any(not worker.is_alive() for worker in workers):
            return num_kills
        workers.pop(draw.randrange(len(workers))).kill()
        num_kills += 1
        workers.append(start(100 + num_kills))


def shared(url: str) -> dict[str, Any]:
    return {"storage": url, "study_name": f"scaling-{time.time()}"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--postgresql", default="postgresql://postgres@127.0.0.1:5432/test")
    parser.add_argument("--workers", default="1,4,16")
    parser.add_argument("--rounds", default="1,3,8", help="rounds for each number of workers")
    parser.add_argument("--scale", type=float, default=1.0, help="times the latencies")
    parser.add_argument("--parts", default="storage,workers,kills")
    arguments = parser.parse_args()
    url = arguments.postgresql
    counts, rounds = (list(map(int, text.split(","))) for text in (arguments.workers, arguments.rounds))
    print(
        "| run | workers | wall s | examples | examples/s | times one | CPU ms an example | scored twice | kills |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    one: Row | None = None
    scale = arguments.scale

    def show(row: Row) -> Row:
        ratio = "" if one is None else f"{row.rate / one.rate:.2f}"
        print(
            f"| {row.name} | {row.num_workers} | {row.wall_seconds:.1f} | {row.num_examples} | {row.rate:.2f} "
            f"| {ratio} | {1000 * row.cpu_seconds / row.num_examples:.1f} | {row.scored_twice} | {row.num_kills} |",
            flush=True,
        )
        return row

    if "storage" in arguments.parts:
        one = show(run("in memory", 1, num_rounds=1, scale=scale))
        with tempfile.TemporaryDirectory() as directory:
            show(run("journal file", 1, log_dir=directory, num_rounds=1, scale=scale))
        show(run("PostgreSQL", 1, num_rounds=1, scale=scale, **shared(url)))
    if "workers" in arguments.parts:
        one = None
        for count, num_rounds in zip(counts, rounds, strict=True):
            row = show(run("PostgreSQL", count, num_rounds=num_rounds, scale=scale, **shared(url)))
            one = one or row
    if "kills" in arguments.parts:
        show(run("PostgreSQL, one killed every 5 s", 4, 5.0, num_rounds=2, scale=scale, **shared(url)))


if __name__ == "__main__":
    main()
