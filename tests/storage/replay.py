"""A search over made-up answers, driven step by step, so that it can be killed between any two of them.

The queue is the one of every run, without its threads: replay, log and study are used as in a real one.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any

import optuna

from dspy_opro.programs.failures import FailureLimit
from dspy_opro.programs.metering import Budget, Ledger
from dspy_opro.runner.task_queue import TaskQueue
from dspy_opro.search import Search
from dspy_opro.search.pruners import Halving, Pruner
from dspy_opro.search.tasks import Plan, Proposal, ProposalTask, ScoringTask, Task, TaskResult, task_key
from dspy_opro.search.trajectory import Candidate, Outcome, Usage
from dspy_opro.storage.recombination import recombine
from dspy_opro.storage.run_storage import RunStorage, open_run

PLAN = Plan(num_train=40, num_val=10, num_rounds=3, num_candidates=5)
STUDENT = Candidate({"retrieve": "Find it.", "answer": "Say it."})


class Killed(Exception):
    """The process is gone."""


@dataclass(frozen=True)
class Driven:
    """What one process of a run saw."""

    search: Search
    num_paid: int
    """Results that were not in the log."""
    usage: Usage
    """Of all processes of the run so far."""


def chance(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts alone."""
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:8], 16) / 2**32


def perform(task: Task) -> TaskResult:
    """The made-up answer to a task."""
    if isinstance(task, ProposalTask):
        known = len(task.view.trajectory)
        texts = {n: f"{n}: {task.round}.{task.slot}.{task.wave} after {known}" for n in task.predictors}
        return TaskResult(Proposal(texts), Usage(proposer_calls=1, prompt_tokens=100))
    luck = chance(task.candidate.id, task.split, task.position)
    error = "ValueError: no answer" if luck > 0.9 else None
    outcome = Outcome(float(luck < 0.5), "out" * 9, "fe\x00d\ud800", error, {"length": luck})
    cost = round(1024 * luck) / 1024  # sums of these are exact in every order
    return TaskResult(outcome, Usage(metric_calls=1, scorer_calls=1, cost=cost))


def drive(
    run: RunStorage,
    *,
    plan: Plan = PLAN,
    pruner: Pruner | None = None,
    order: int = 0,
    steps: int | None = None,
) -> Driven:
    """Drive a run to its end, or into `Killed` before the result after so many; results arrive in a seeded order."""
    search = Search(plan, STUDENT, pruner or Halving(), recombine=recombine)
    ledger, failures = Ledger(), FailureLimit(None, 10**9)
    queue = TaskQueue(search, run, ledger, Budget(), failures, None, num_threads=10**9)
    shuffle, num_paid = random.Random(order), 0
    in_flight: list[Task] = []
    queue.replay()
    show(run, queue)
    while not search.done:
        while any(lane._waiting for lane in queue.waiting.lanes):
            task = queue.take()
            assert task is not None
            in_flight.append(task)
        if num_paid == steps:
            raise Killed
        num_paid += 1
        task = in_flight.pop(shuffle.randrange(len(in_flight)))
        result = perform(task)
        ledger.add_calls(result.usage)
        assert queue.finish(task, result)
        show(run, queue)
    run.close(search.stop_reason or "")
    return Driven(search, num_paid, ledger.usage)


def show(run: RunStorage, queue: TaskQueue) -> None:
    """Bring the study up to date."""
    while not queue._events.empty():
        event = queue._events.get()
        if event is not None:
            run.trial_writer.show(event)


def record(run: RunStorage, *tasks: Task) -> None:
    """Keep the results of some tasks."""
    for task in tasks:
        run.log.add(task, perform(task))
    run.log.write()


def scoring(stop: int, start: int = 0) -> list[ScoringTask]:
    """Some of the student's examples."""
    return [ScoringTask(STUDENT, 0, "train", position) for position in range(start, stop)]


def known(run: RunStorage) -> dict[str, TaskResult]:
    """Task key -> what was recorded before the run was opened; an error where a task was recorded twice."""
    results = list(run.results())
    assert len(dict(results)) == len(results)
    return dict(results)


def expected(*tasks: Task) -> dict[str, TaskResult]:
    return {task_key(task): perform(task) for task in tasks}


def shown(study: optuna.Study) -> list[Any]:
    """All that a study says of its trials but the time."""
    return [
        (t.number, t.state.name, t.value, t.user_attrs, t.intermediate_values)
        for t in study.get_trials(deepcopy=False)
    ]


def in_memory(**arguments: Any) -> tuple[Driven, list[Any]]:
    """The run that nobody disturbed, and its trials."""
    run = open_run()
    driven = drive(run, **arguments)
    return driven, shown(run.study)
