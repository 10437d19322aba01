"""The simulated setting in which optimizers are compared.

One rule: every optimizer meets the same server, data, metric, threads and caches, and is judged by the
server's own counters and by the hidden quality of its result.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import dspy

from dspy_opro.testing import Latency, SimulatedModel, SimulatedServer, VocabularyTask

SCORER_LATENCY = Latency(median_seconds=0.4, sigma=0.6)
PROPOSER_LATENCY = Latency(median_seconds=3.0, sigma=0.4)

SIGNALS: dict[str, dict[str, float]] = {"strong": {}, "real": {"signal": 0.3, "noise": 0.15}}
"""How far the task's instructions differ -> arguments of `VocabularyTask`: its defaults, and what real prompts show."""


@dataclass(frozen=True)
class Setting:
    """What an optimizer is given."""

    task: VocabularyTask
    scorer: dspy.LM
    proposer: dspy.LM
    num_threads: int
    seed: int
    trainset: list[dspy.Example]
    valset: list[dspy.Example]


@dataclass(frozen=True)
class Run:
    """One row of the tables."""

    optimizer: str
    seed: int
    num_threads: int
    wall_seconds: float
    scorer_calls: int
    proposer_calls: int
    busy_seconds: float
    utilization: float
    """Server busy seconds over threads times wall seconds."""
    quality: float
    """The true probability of a right answer under the result's instruction; `gain` says what it gained."""
    gain: float
    """The quality less that of the student's instruction."""
    cpu_share: float
    """This process's CPU seconds over the wall seconds; the server has a process of its own."""


Optimize = Callable[[Setting], dspy.Module]


def measure(
    optimizer: str,
    optimize: Optimize,
    *,
    seed: int = 0,
    num_threads: int = 16,
    time_scale: float = 1.0,
    scorer_latency: Latency = SCORER_LATENCY,
    proposer_latency: Latency = PROPOSER_LATENCY,
    num_examples: int = 60,
    signal: str = "strong",
) -> dict[str, str | int | float]:
    """Run one optimizer once.

    Args:
        optimizer: Its name in the table.
        optimize: Optimizes `setting.task.student()`; runs with the scorer as DSPy's LM.
        seed: Seeds the task, the server and the optimizer.
        num_threads: What the optimizer may have in flight.
        time_scale: Multiplies the latencies; 0 measures calls and quality only.
        scorer_latency: Of one scorer call.
        proposer_latency: Of one proposer call.
        num_examples: In the trainset, and again in the valset.
        signal: A name in `SIGNALS`.

    Returns:
        The fields of `Run`.
    """
    task = VocabularyTask(seed, **SIGNALS[signal])
    # As a user has it: DSPy's cache is on. In memory and new for each run, as its key leaves the server out.
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)
    with SimulatedServer(_models(task, time_scale, scorer_latency, proposer_latency), seed=seed) as server:
        scorer, proposer = server.lm("scorer", cache=True), server.lm("proposer", cache=True, temperature=1.0)
        data = task.trainset(num_examples), task.valset(num_examples)
        setting = Setting(task, scorer, proposer, num_threads, seed, *data)
        start, cpu_start = time.perf_counter(), time.process_time()
        with dspy.context(lm=scorer):
            program = optimize(setting)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        stats = server.stats()
    instruction = program.predictors()[0].signature.instructions
    run = Run(
        optimizer=optimizer,
        seed=seed,
        num_threads=num_threads,
        wall_seconds=wall,
        scorer_calls=stats["scorer"].requests,
        proposer_calls=stats["proposer"].requests,
        busy_seconds=stats.busy_seconds,
        utilization=stats.busy_seconds / (num_threads * wall),
        quality=task.true_quality(instruction),
        gain=task.true_quality(instruction) - task.true_quality(task.student().signature.instructions),
        cpu_share=cpu / wall,
    )
    return asdict(run)


def _models(
    task: VocabularyTask, time_scale: float, scorer: Latency, proposer: Latency
) -> dict[str, SimulatedModel]:
    def scaled(latency: Latency) -> Latency:
        return Latency(latency.median_seconds * time_scale, latency.sigma)

    return {
        "scorer": SimulatedModel(task.scorer, scaled(scorer)),
        "proposer": SimulatedModel(task.proposer, scaled(proposer)),
    }
