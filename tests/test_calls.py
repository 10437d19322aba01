"""Calls under way: threads take what follows by themselves, but never what they may not, and no result is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from dspy_opro.calls import Calls
from dspy_opro.protocols import Then, Unit
from dspy_opro.stopping import Usage
from dspy_opro.threads import DaemonThreads
from dspy_opro.trajectory import Candidate, Outcome, Trajectory
from dspy_opro.work import Ask, Block, Proposal, View

STUDENT = Candidate({"p": "student"})
ASK = Ask(1, 0, 0, ("p",), View(Trajectory(), STUDENT, []))


def block(start: int, stop: int, round: int = 1) -> Block:
    return Block(STUDENT, round, "train", start, stop)


class Case:
    """Calls that note what happens; examples are scored on the loop, or in a thread."""

    def __init__(self, in_thread: bool, limit: int = 1) -> None:
        self.log: list[Any] = []  # positions as they are scored, and what is called on the loop
        self.in_thread = in_thread
        self.may_start = True
        self.on_score: Callable[[int], None] = lambda position: None
        self.calls = Calls(
            self,
            limit,
            may_start=lambda: self.may_start,
            on_answer=lambda work, content, usage, before: self.log.append("answer"),
            on_error=lambda error: self.log.append(repr(error)),
            on_free=lambda is_cancelled: self.log.append("cancelled" if is_cancelled else "free"),
            on_complete=lambda: None,
            on_taken=lambda: self.log.append("taken"),
        )

    async def propose(self, ask: Ask) -> tuple[Proposal, Usage]:
        self.log.append("ask")
        return Proposal({}), Usage()

    async def score(self, unit: Unit, then: Then) -> None:
        if not self.in_thread:
            return self._score(unit, then)
        threads = DaemonThreads()
        try:
            return await threads.run(lambda: self._score(unit, then))
        finally:
            threads.close()

    def _score(self, unit: Unit, then: Then) -> None:
        following: Unit | None = unit
        while following is not None:
            self.log.append(following[1])
            self.on_score(following[1])
            following = then(following, Outcome(1.0), Usage(metric_calls=1))

    async def run(self, *works: Ask | Block) -> list[Any]:
        """Start one call and wait until it is over, whatever its thread took."""
        for work in works:
            self.calls.put(work, {})
        async with anyio.create_task_group() as tasks:
            self.calls.start(tasks)
        await asyncio.sleep(0)
        return self.log


@pytest.fixture(params=[False, True], ids=["on the loop", "in a thread"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def without(log: list[Any], *what: str) -> list[Any]:
    return [entry for entry in log if entry not in what]


async def test_a_block_is_answered_before_the_call_that_completed_it_is_over(case: Case) -> None:
    """Else a run could see that nothing is under way and nothing is known: a lost call."""
    log = await case.run(block(0, 3))
    assert without(log, "taken") == [0, 1, 2, "answer", "free"]
    assert log.count("taken") == 2
    assert case.calls.num_in_flight == case.calls.num_waiting == 0


async def test_older_rounds_come_first(case: Case) -> None:
    assert without(await case.run(block(0, 1, 3), block(5, 6, 2)), "taken", "answer") == [5, 0, "free"]


async def test_a_proposal_is_asked_for_before_further_examples_are_taken(case: Case) -> None:
    case.on_score = lambda position: case.calls.put(ASK, {})
    assert await case.run(block(0, 3)) == [0, "free"]
    assert case.calls.num_waiting == 3
    assert await case.run() == [0, "free", "ask", "answer", "free"]


async def test_nothing_is_taken_that_may_not_be_started(case: Case) -> None:
    def stop(position: int) -> None:
        case.may_start = position < 1

    case.on_score = stop
    assert without(await case.run(block(0, 9)), "taken") == [0, 1, "free"]
    assert case.calls.num_waiting == 7


async def test_what_is_cut_comes_back_in_pieces_and_later_results_are_dropped(case: Case) -> None:
    pieces: list[Any] = []

    def cut(position: int) -> None:
        if position == 3:
            pieces.extend(case.calls.leftovers())

    case.on_score = cut
    assert without(await case.run(block(0, 2), block(2, 6)), "taken", "answer") == [0, 1, 2, 3, "free"]
    # The first block may be among the pieces: from a thread, its answer may still be on its way.
    piece, outcomes, usage = next(piece for piece in pieces if piece[0].start == 2)
    assert (piece.stop, len(outcomes), usage.metric_calls) == (3, 1, 1)


async def test_an_error_is_passed_on_and_frees_the_thread(case: Case) -> None:
    def fail(position: int) -> None:
        raise ValueError("broken")

    case.on_score = fail
    assert await case.run(block(0, 3)) == [0, "ValueError('broken')", "free"]
