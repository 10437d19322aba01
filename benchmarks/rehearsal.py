"""The search on the vocabulary task in virtual time: a run of 1,600 scorer calls takes a second.

One rule: set-up, search, race, meta-prompt and proposer are the real ones, and so is what the models answer. What
is left out is the scored program (its answers come straight from the task), threads and HTTP;
`utilization.py` and `search_efficiency.py` have them.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from dataclasses import dataclass
from typing import Any

from simulation import PROPOSER_LATENCY, SCORER_LATENCY

from dspy_opro.config.arguments import make_config
from dspy_opro.setup import Setup, set_up
from dspy_opro.testing import Latency, ScriptedLM, VocabularyTask
from dspy_opro.search.trajectory import Outcome
from dspy_opro.search.tasks import ProposalTask, ScoringTask, Task


@dataclass(frozen=True)
class Rehearsal:
    """What came out of one run."""

    scorer_calls: int
    proposer_calls: int
    wall_seconds: float
    """In virtual time."""
    utilization: float
    quality: float
    """The hidden chance of the result's instruction; 0.30 at the start."""
    num_rounds: int


def rehearse(
    seed: int,
    *,
    num_threads: int = 16,
    scorer_latency: Latency = SCORER_LATENCY,
    proposer_latency: Latency = PROPOSER_LATENCY,
    num_examples: int = 60,
    **options: Any,
) -> Rehearsal:
    """One run; `options` are those of `OPROTeleprompter`, with `auto=None`."""
    task = VocabularyTask(seed)
    proposer = ScriptedLM(task.proposer, keep_calls=False)
    values = {"metric": task.metric, "trainset": task.trainset(num_examples), "prompt_model": proposer}
    values |= {"task_model": ScriptedLM(task.scorer), "seed": seed, "display_progress": False, "auto": None}
    setup = set_up(make_config({**values, **options}), task.student(), is_async=False)
    latencies = {ProposalTask: proposer_latency, ScoringTask: scorer_latency}
    clock = _Clock(setup, task, latencies, num_threads, seed)
    asyncio.run(clock.run())
    best = setup.search.trajectory.best.candidate
    return Rehearsal(
        scorer_calls=clock.num_done[ScoringTask],
        proposer_calls=clock.num_done[ProposalTask],
        wall_seconds=clock.now,
        utilization=clock.busy_seconds / (num_threads * clock.now),
        quality=task.quality(next(iter(best.instructions.values()))),
        num_rounds=len(setup.search.best_scores) - 1,
    )


class _Clock:
    """Does a search's work on `num_threads` virtual threads, in the order in which `evaluation.Run` starts it."""

    def __init__(
        self,
        setup: Setup,
        task: VocabularyTask,
        latencies: dict[type, Latency],
        num_threads: int,
        seed: int,
    ) -> None:
        self._setup, self._task, self._latencies = setup, task, latencies
        self._num_threads, self._draws = num_threads, random.Random(seed)
        self._waiting: list[tuple[tuple[bool, int, int], Task, int]] = []  # (urgency, round, number)
        self._flying: list[tuple[tuple[float, int], Task, int]] = []  # (end, number)
        self._results: dict[int, dict[int, Outcome]] = {}  # id(block) -> position -> outcome
        self._count = 0
        self.now = self.busy_seconds = 0.0
        self.num_done: dict[type, int] = {ProposalTask: 0, ScoringTask: 0}

    async def run(self) -> None:
        """To the end of the search."""
        while not self._setup.search.done:
            self._pull()
            self._start()
            if not self._flying:
                return
            (self.now, _), work, position = heapq.heappop(self._flying)
            self.num_done[type(work)] += 1
            if isinstance(work, ProposalTask):
                proposal, _ = await self._setup.executor.propose(work)
                self._setup.search.tell_proposal(work, proposal)
            else:
                self._tell(work, position)

    def _pull(self) -> None:
        while (work := self._setup.search.next()) is not None:
            for position in range(1) if isinstance(work, ProposalTask) else range(work.start, work.stop):
                self._count += 1
                order = (isinstance(work, ScoringTask), work.round, self._count)
                heapq.heappush(self._waiting, (order, work, position))

    def _start(self) -> None:
        while self._waiting and len(self._flying) < self._num_threads:
            _, work, position = heapq.heappop(self._waiting)
            latency = self._latencies[type(work)]
            seconds = latency.median_seconds * self._draws.lognormvariate(0.0, latency.sigma)
            self.busy_seconds += seconds
            self._count += 1
            heapq.heappush(self._flying, ((self.now + seconds, self._count), work, position))

    def _tell(self, block: ScoringTask, position: int) -> None:
        (instruction,) = block.candidate.instructions.values()
        item = f"{block.split}-{self._setup.inputs.orders[block.split][position]}"
        right = self._task.is_right(instruction, item)
        output = f"answer: {self._task.answer(item) if right else 'code unknown'}"
        results = self._results.setdefault(id(block), {})
        results[position] = Outcome(float(right), output)
        if len(results) == block.stop - block.start:
            del self._results[id(block)]
            self._setup.search.tell_block(block, [results[p] for p in range(block.start, block.stop)])
