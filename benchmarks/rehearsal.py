"""The search on the vocabulary task in virtual time: a run of 1,600 scorer calls takes a second.

One rule: checks, plan, search, race, meta-prompt and proposer are the real ones, and so is what the models answer. What
is left out is the scored program (its answers come straight from the task), threads and HTTP;
`utilization.py` and `search_efficiency.py` have them.
"""

from __future__ import annotations

import heapq
import json
import random
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

from simulation import PROPOSER_LATENCY, SCORER_LATENCY, SIGNALS

from dspy_opro.compile import Job
from dspy_opro.config.arguments import make_config
from dspy_opro.proposers.demos import is_labeled, num_bootstrapped
from dspy_opro.search.tasks import Proposal, ProposalTask, ScoringTask, Task, TaskResult, rng, urgency
from dspy_opro.search.trajectory import Candidate, Outcome, Usage
from dspy_opro.testing import Latency, ScriptedLM, VocabularyTask
from dspy_opro.testing.models import uniform


@dataclass(frozen=True)
class Rehearsal:
    """What came out of one run."""

    scorer_calls: int
    proposer_calls: int
    wall_seconds: float
    """In virtual time."""
    utilization: float
    quality: float
    """The true probability of a right answer under the result's instruction; `gain` says what it gained."""
    gain: float
    """The quality less that of the student's instruction."""
    num_rounds: int
    has_demos: bool


@dataclass(frozen=True)
class Demos:
    """What sets of demos are worth. Each set adds to the quality of an instruction what a normal distribution gives."""

    mean: float = 0.0
    deviation: float = 0.0

    def task_of(self, task: VocabularyTask, candidate: Candidate) -> VocabularyTask:
        """The task as it is for a candidate with its demos."""
        text = text_of(candidate)
        if not text:
            return task
        drawn = min(0.999, max(0.001, uniform("worth", task.seed, text)))
        worth = self.mean + self.deviation * NormalDist().inv_cdf(drawn)
        return replace(task, base=min(1.0, max(0.0, task.base + worth)))


def text_of(candidate: Candidate) -> str:
    """The demos of a candidate as one text; nothing without demos."""
    return "".join((candidate.demos or {}).values())


def rehearse(
    seed: int,
    *,
    num_threads: int = 16,
    scorer_latency: Latency = SCORER_LATENCY,
    proposer_latency: Latency = PROPOSER_LATENCY,
    num_examples: int = 60,
    signal: str = "strong",
    validates: bool = False,
    demos: Demos = Demos(),
    **options: Any,
) -> Rehearsal:
    """One run; `options` are those of `OPROTeleprompter`, with `auto=None`.

    If it `validates`, it has a valset of `num_examples`, too. `demos` says what the sets are worth that it searches if
    `options` say so. Bootstrapping is simulated: each try passes as often as the student is right.
    """
    task = VocabularyTask(seed, **SIGNALS[signal])
    proposer = ScriptedLM(task.proposer, keep_calls=False)
    values = {"metric": task.metric, "trainset": task.trainset(num_examples), "prompt_model": proposer}
    values |= {"task_model": ScriptedLM(task.scorer), "seed": seed, "display_progress": False, "auto": None}
    values |= {"valset": task.valset(num_examples)} if validates else {}
    job = Job(make_config({**values, **options}), task.student())
    latencies = {ProposalTask: proposer_latency, ScoringTask: scorer_latency}
    clock = _Clock(job, task, demos, latencies, num_threads, seed)
    try:
        clock.run()
    finally:
        job.close()
    search = job.queue.search
    returned = search.returned.candidate
    quality = demos.task_of(task, returned).true_quality(next(iter(returned.instructions.values())))
    return Rehearsal(
        scorer_calls=clock.num_done[ScoringTask],
        proposer_calls=clock.num_done[ProposalTask],
        wall_seconds=clock.now,
        utilization=clock.busy_seconds / (num_threads * clock.now),
        quality=quality,
        gain=quality - task.true_quality(task.student().signature.instructions),
        num_rounds=len(search.best_scores) - 1,
        has_demos=returned.demo_set is not None,
    )


class _Clock:
    """Does a search's tasks on `num_threads` virtual threads, in the order in which `TaskQueue` hands them out."""

    def __init__(
        self,
        job: Job,
        task: VocabularyTask,
        demos: Demos,
        latencies: dict[type, Latency],
        num_threads: int,
        seed: int,
    ) -> None:
        self._job, self._vocabulary, self._demos, self._latencies = job, task, demos, latencies
        self._search = job.queue.search
        self._num_threads, self._draws = num_threads, random.Random(seed)
        self._waiting: list[tuple[tuple[bool, int], int, Task]] = []  # urgency, number, task
        self._in_flight: list[tuple[float, int, Task]] = []  # end, number, task
        self._count = 0
        self.now = self.busy_seconds = 0.0
        self.num_done: dict[type, int] = {ProposalTask: 0, ScoringTask: 0}

    def run(self) -> None:
        """To the end of the search."""
        while not self._search.done:
            for task in self._search.next_tasks():
                heapq.heappush(self._waiting, (urgency(task), self._next_number(), task))
            self._start()
            self.now, _, task = heapq.heappop(self._in_flight)
            self.num_done[type(task)] += 1
            self._search.tell(task, self._perform(task))

    def _next_number(self) -> int:
        self._count += 1
        return self._count

    def _start(self) -> None:
        while self._waiting and len(self._in_flight) < self._num_threads:
            task = heapq.heappop(self._waiting)[-1]
            if not self._search.wants(task):
                continue
            latency = self._latencies[type(task)]
            seconds = latency.median_seconds * self._draws.lognormvariate(0.0, latency.sigma)
            self.busy_seconds += seconds
            heapq.heappush(self._in_flight, (self.now + seconds, self._next_number(), task))

    def _perform(self, task: Task) -> TaskResult:
        if isinstance(task, ProposalTask):
            return self._bootstrap(task) if task.is_for_demos else self._job.writer.write(task)
        (instruction,) = task.candidate.instructions.values()
        question = self._job.inputs.splits[task.split][task.position].question
        item = question.removesuffix("?").split()[-1]
        vocabulary = self._demos.task_of(self._vocabulary, task.candidate)
        is_right = vocabulary.is_right(instruction, item, text_of(task.candidate))
        output = f"answer: {self._vocabulary.answer(item) if is_right else 'code unknown'}"
        return TaskResult(Outcome(float(is_right), output))

    def _bootstrap(self, task: ProposalTask) -> TaskResult:
        """A set of demos. It has the labels alone, or tries examples until it has enough or may try no more."""
        config, plan = self._job.config, self._search.plan
        most, labeled = config.max_bootstrapped_demos or 0, config.max_labeled_demos or 0
        tries = 0
        if not is_labeled(task.slot, most, labeled):
            chance = self._vocabulary.true_quality(self._vocabulary.student().signature.instructions)
            draws = rng(self._vocabulary.seed, "bootstrap", task.slot)
            wanted = draws.randint(1, most)
            left = plan.max_demo_calls // num_bootstrapped(plan.num_demo_sets, most, labeled)
            while wanted and tries < left:
                tries += 1
                wanted -= draws.random() < chance
        text = json.dumps([{"question": f"Which demos are in set {task.slot}?", "answer": "code 0000"}])
        texts = dict.fromkeys(self._search.student.instructions, text)
        return TaskResult(Proposal(texts), Usage(metric_calls=tries))
