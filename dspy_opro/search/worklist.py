"""Work on its way out and outcomes on their way in: no example of a candidate is handed out twice."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from dspy_opro.trajectory import Candidate, Outcome
from dspy_opro.work import Ask, Block, Split, Work


class Worklist:
    """Work that nobody took yet, and the outcomes of every candidate that is not forgotten."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._queue: list[tuple[tuple[int, int, int], Work]] = []  # asks first, then older rounds
        self._num_queued = 0
        self._outcomes: dict[tuple[str, Split], list[Outcome | None]] = {}  # by position; None until answered
        self._missing: dict[tuple[str, Split], int] = {}  # examples handed out and not yet answered

    def next(self) -> Work | None:
        return heapq.heappop(self._queue)[1] if self._queue else None

    def clear(self) -> None:
        self._queue.clear()

    def ask(self, ask: Ask) -> None:
        self._push(0, ask)

    def score(self, candidate: Candidate, round: int, split: Split, stop: int) -> None:
        """Hand out what is still missing of a candidate's first `stop` examples."""
        key = (candidate.id, split)
        outcomes = self._outcomes.setdefault(key, [])
        start = len(outcomes)
        outcomes.extend([None] * (stop - start))
        self._missing[key] = self._missing.get(key, 0) + len(outcomes) - start
        while start < stop:
            end = min(start + self._block_size, stop)
            self._push(1, Block(candidate, round, split, start, end))
            start = end

    def _push(self, urgency: int, work: Work) -> None:
        self._num_queued += 1
        heapq.heappush(self._queue, ((urgency, work.round, self._num_queued), work))

    def tell(self, block: Block, outcomes: Sequence[Outcome]) -> bool:
        """Take in a block's outcomes; False where its candidate is forgotten."""
        key = (block.candidate.id, block.split)
        if key not in self._outcomes:
            return False
        self._outcomes[key][block.start : block.stop] = outcomes
        self._missing[key] -= block.stop - block.start
        return True

    def is_complete(self, candidate: Candidate, split: Split = "train") -> bool:
        """Whether all that was handed out is answered."""
        return self._missing.get((candidate.id, split), 0) == 0

    def outcomes(self, candidate: Candidate, split: Split = "train") -> Sequence[Outcome | None]:
        """By position; none where nothing was handed out yet."""
        return self._outcomes.get((candidate.id, split), ())

    def scores(self, candidate: Candidate, split: Split = "train") -> list[float]:
        return [o.score for o in self._outcomes[candidate.id, split] if o is not None]

    def forget(self, candidate: Candidate) -> None:
        for split in ("train", "val"):
            self._outcomes.pop((candidate.id, split), None)
            self._missing.pop((candidate.id, split), None)
