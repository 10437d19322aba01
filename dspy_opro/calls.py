"""Calls under way: takes work apart into single calls, in order of urgency, and puts their results together.

A thread that has scored an example takes the next one itself. The way through the event loop would cost more than all
else in this file, and where many threads want the interpreter's lock, each change of threads waits for it.
"""

from __future__ import annotations

import asyncio
import heapq
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from .protocols import Executor, Unit
from .stopping import Usage
from .trajectory import Outcome
from .work import Ask, Block, Proposal, Work

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
        may_start: Whether another call may begin; asked in any thread, just before it does.
        on_answer: Called with work, content, cost and what known parts had cost before, once all of a piece of
            work is there.
        on_error: Called with what a call raised.
        on_free: Called when a thread is free, with whether its call was cancelled; calls `start` for what may
            follow it.
        on_complete: Called after the answer of a block, which more may follow from.
        on_taken: Called when a thread has taken its next example itself, where that matters to anyone.

    All but `may_start` are called on the loop's thread, and the last two from outside any task: they start nothing.
    """

    def __init__(
        self,
        executor: Executor,
        limit: int,
        may_start: Callable[[], bool],
        on_answer: Callable[[Work, Proposal | tuple[Outcome, ...], Usage, Usage], None],
        on_error: Callable[[Exception], None],
        on_free: Callable[[bool], None],
        on_complete: Callable[[], None],
        on_taken: Callable[[], None] | None = None,
    ) -> None:
        self.limit = limit
        self.num_in_flight = 0
        self._executor = executor
        self._may_start = may_start
        self._on_answer = on_answer
        self._on_error = on_error
        self._on_free = on_free
        self._on_complete = on_complete
        self._on_taken = on_taken
        self._loop: asyncio.AbstractEventLoop
        self._loop_thread = 0
        self._lock = threading.Lock()  # for what follows, which threads change too
        self._units: list[tuple[tuple[int, int, int], tuple[Work, int]]] = []
        self._num_units = 0
        self._blocks: dict[int, _Parts] = {}  # id(block) -> its parts

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
            with self._lock:
                self._push(0, work, 0)
            return
        parts = _Parts(work, known)
        with self._lock:
            self._blocks[id(work)] = parts
            for position in range(work.start, work.stop):
                if position not in known:
                    self._push(1, work, position)
        if parts.is_complete:  # out of what several processes left
            self._answer(parts)

    def _push(self, urgency: int, work: Work, position: int) -> None:
        self._num_units += 1
        heapq.heappush(self._units, ((urgency, work.round, self._num_units), (work, position)))

    def clear(self) -> None:
        """Forget what was not started."""
        with self._lock:
            self._units.clear()

    @property
    def can_start(self) -> bool:
        return bool(self._units) and self.num_in_flight < self.limit

    def start(self, tasks: Any) -> None:
        """Start the most urgent call in a task group, unless a thread has just taken the last one."""
        with self._lock:
            unit = heapq.heappop(self._units)[1] if self._units else None
        if unit is not None:
            self._loop, self._loop_thread = asyncio.get_running_loop(), threading.get_ident()
            self.num_in_flight += 1
            tasks.start_soon(self._run, *unit)

    async def _run(self, work: Work, position: int) -> None:
        """Do a call, and where it is an example those that the thread takes after it."""
        is_cancelled = True
        try:
            if isinstance(work, Ask):
                proposal, usage = await self._executor.propose(work)
                self._on_answer(work, proposal, usage, Usage())
            else:
                await self._executor.score((work, position), self._next)
            is_cancelled = False
        except Exception as error:
            is_cancelled = False
            self._on_error(error)
        finally:
            self.num_in_flight -= 1
            self._on_free(is_cancelled)

    def _next(self, unit: Unit, outcome: Outcome, usage: Usage) -> Unit | None:
        """`protocols.Then`."""
        block, position = unit
        following: Unit | None = None
        with self._lock:
            parts = self._blocks.get(id(block))
            if parts is None:  # the run has ended meanwhile, see `leftovers`
                return None
            parts.new[position] = outcome, usage
            is_complete = parts.is_complete
            if self._units and self._may_start():
                work, place = self._units[0][1]
                if isinstance(work, Block):  # the optimizer LM is asked from the loop
                    heapq.heappop(self._units)
                    following = work, place
        if is_complete:
            self._tell_loop(lambda: self._finish(parts))
        elif following is not None and self._on_taken is not None:
            self._tell_loop(self._on_taken)
        return following

    def _tell_loop(self, step: Callable[[], None]) -> None:
        """On the loop's own thread at once: else the last call could end before its block is known."""
        if threading.get_ident() == self._loop_thread:
            step()
        else:
            self._loop.call_soon_threadsafe(step)

    def _finish(self, parts: _Parts) -> None:
        """A block is complete; unless the run has ended meanwhile."""
        if id(parts.block) not in self._blocks:
            return
        try:
            self._answer(parts)
        except Exception as error:
            self._on_error(error)
        self._on_complete()

    def _answer(self, parts: _Parts) -> None:
        with self._lock:
            del self._blocks[id(parts.block)]
        self._on_answer(parts.block, parts.outcomes(), _sum(parts.new), _sum(parts.known))

    def leftovers(self) -> Iterator[tuple[Block, tuple[Outcome, ...], Usage]]:
        """What was scored of blocks that did not get complete, in pieces without gaps; the end of these blocks."""
        with self._lock:
            blocks = [*self._blocks.values()]
            self._blocks.clear()
        for parts in blocks:
            start = None
            for position in range(parts.block.start, parts.block.stop + 1):
                if position in parts.new:
                    start = position if start is None else start
                elif start is not None:
                    piece = {place: parts.new[place] for place in range(start, position)}
                    block = replace(parts.block, start=start, stop=position)
                    yield block, tuple(outcome for outcome, _ in piece.values()), _sum(piece)
                    start = None


def _sum(parts: Mapping[int, Scored]) -> Usage:
    return sum((parts[position][1] for position in sorted(parts)), Usage())
