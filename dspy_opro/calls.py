"""Calls under way: takes work apart into single calls, in order of urgency, and puts their results together."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from .protocols import Executor
from .stopping import Usage
from .trajectory import Outcome
from .work import Ask, Block, Proposal, Work

Unit = tuple[Work, int]  # the work and, for a block, a position
Scored = tuple[Outcome, Usage]


class _Parts:
    """A block that is being scored."""

    def __init__(self, block: Block, known: Mapping[int, Scored]) -> None:
        self.block = block
        self.known = known  # position -> what an earlier process left
        self.new: dict[int, Scored] = {}  # position -> what was scored here

    @property
    def is_complete(self) -> bool:
        return len(self.known) + len(self.new) == self.block.stop - self.block.start

    def outcomes(self) -> tuple[Outcome, ...]:
        parts = {**self.known, **self.new}
        return tuple(parts[position][0] for position in sorted(parts))


class Calls:
    """Up to `limit` calls at once.

    Args:
        executor: Does them.
        limit: Calls in flight at most.
        on_answer: Called with work, content, cost and what known parts had cost before, once all of a piece of
            work is there.
        on_error: Called with what a call raised.
        on_free: Called when a call has ended, with whether it was cancelled; calls `start` for what may follow it.
    """

    def __init__(
        self,
        executor: Executor,
        limit: int,
        on_answer: Callable[[Work, Proposal | tuple[Outcome, ...], Usage, Usage], None],
        on_error: Callable[[Exception], None],
        on_free: Callable[[bool], None],
    ) -> None:
        self.limit = limit
        self.num_in_flight = 0
        self._executor = executor
        self._on_answer = on_answer
        self._on_error = on_error
        self._on_free = on_free
        self._units: list[tuple[tuple[int, int, int], Unit]] = []
        self._num_units = 0
        self._blocks: dict[int, _Parts] = {}  # id(block) -> its parts
        self._successor: list[Unit] | None = None  # an empty list waits for what a task is to do next

    @property
    def num_waiting(self) -> int:
        """Calls that no thread was free for yet."""
        return len(self._units)

    def put(self, work: Work, known: Mapping[int, Scored]) -> None:
        """Take on a piece of work.

        Args:
            work: The work.
            known: Position -> what an earlier process left of a block.
        """
        if isinstance(work, Ask):
            self._push(0, work, 0)
            return
        parts = self._blocks[id(work)] = _Parts(work, known)
        if parts.is_complete:  # out of what several processes left
            self._finish(parts)
            return
        for position in range(work.start, work.stop):
            if position not in known:
                self._push(1, work, position)

    def _push(self, urgency: int, work: Work, position: int) -> None:
        self._num_units += 1
        heapq.heappush(self._units, ((urgency, work.round, self._num_units), (work, position)))

    def clear(self) -> None:
        """Forget what was not started."""
        self._units.clear()

    @property
    def can_start(self) -> bool:
        return bool(self._units) and self.num_in_flight < self.limit

    def start(self, tasks: Any) -> None:
        """Start the most urgent call in a task group."""
        unit = heapq.heappop(self._units)[1]
        self.num_in_flight += 1
        if self._successor == []:
            self._successor.append(unit)
        else:
            tasks.start_soon(self._run, unit)

    async def _run(self, unit: Unit) -> None:
        """Do a call, and then the next one: a new task for each would cost more than all else in this file."""
        units = [unit]
        try:
            while units:
                await self._do(*units.pop())
                self.num_in_flight -= 1
                self._successor = units
                try:
                    self._on_free(False)
                finally:
                    self._successor = None
        except BaseException:  # cancelled
            self.num_in_flight -= 1
            self._on_free(True)
            raise

    async def _do(self, work: Work, position: int) -> None:
        try:
            if isinstance(work, Ask):
                proposal, usage = await self._executor.propose(work)
                self._on_answer(work, proposal, usage, Usage())
            else:
                scored = await self._executor.score(work, position)
                parts = self._blocks[id(work)]
                parts.new[position] = scored
                if parts.is_complete:
                    self._finish(parts)
        except Exception as error:
            self._on_error(error)

    def _finish(self, parts: _Parts) -> None:
        del self._blocks[id(parts.block)]
        self._on_answer(parts.block, parts.outcomes(), _sum(parts.new), _sum(parts.known))

    def leftovers(self) -> Iterator[tuple[Block, tuple[Outcome, ...], Usage]]:
        """What was scored of blocks that did not get complete, in pieces without gaps."""
        for parts in self._blocks.values():
            start = None
            for position in range(parts.block.start, parts.block.stop + 1):
                if position in parts.new:
                    start = position if start is None else start
                elif start is not None:
                    piece = {place: parts.new[place] for place in range(start, position)}
                    block = replace(parts.block, start=start, stop=position)
                    yield block, tuple(outcome for outcome, _ in piece.values()), _sum(piece)
                    start = None
        self._blocks.clear()


def _sum(parts: Mapping[int, Scored]) -> Usage:
    return sum((parts[position][1] for position in sorted(parts)), Usage())
