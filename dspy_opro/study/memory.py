"""What a log says of answered work, found again by the work."""

from __future__ import annotations

from typing import Any

from dspy_opro.stopping import Usage
from dspy_opro.trajectory import Candidate, Outcome
from dspy_opro.work import Answer, Ask, Block, Work, work_key

from .records import Record, decode_outcome, decode_proposal, decode_usage


class Memory:
    """Answers by the work that they belong to; of two for the same work the first counts."""

    def __init__(self) -> None:
        self.used = Usage()
        """What all answers cost, repeated ones included."""
        self._proposals: dict[str, Record] = {}  # work key -> record
        self._outcomes: dict[
            tuple[str, str], dict[int, Any]
        ] = {}  # candidate id, split -> position -> outcome
        self._blocks: dict[
            tuple[str, str], list[tuple[range, Record]]
        ] = {}  # candidate id, split -> per block

    def load(self, record: Record) -> None:
        if record["kind"] == "proposal":
            self.used += decode_usage(record["usage"])
            self._proposals.setdefault(record["key"], record)
        elif record["kind"] == "block":
            self.used += decode_usage(record["usage"])
            key, start = (record["candidate"], record["split"]), record["start"]
            outcomes = self._outcomes.setdefault(key, {})
            for position, outcome in enumerate(record["outcomes"], start):
                outcomes.setdefault(position, outcome)
            spent = {"usage": record["usage"], "seconds": record["seconds"]}
            self._blocks.setdefault(key, []).append((range(start, start + len(record["outcomes"])), spent))

    def recall(self, work: Work) -> Answer | None:
        return self._proposal(work) if isinstance(work, Ask) else self._block(work)

    def _proposal(self, ask: Ask) -> Answer | None:
        record = self._proposals.get(work_key(ask))
        if record is None:
            return None
        return Answer(ask, decode_proposal(record), decode_usage(record["usage"]), record["seconds"])

    def _block(self, block: Block) -> Answer | None:
        key, positions = (block.candidate.id, block.split), range(block.start, block.stop)
        known = self._outcomes.get(key, {})
        if any(position not in known for position in positions):
            return None
        outcomes = tuple(decode_outcome(known[position]) for position in positions)
        spent = [record for covered, record in self._blocks[key] if covered[0] in positions]
        usage = sum((decode_usage(record["usage"]) for record in spent), Usage())
        return Answer(block, outcomes, usage, max((record["seconds"] for record in spent), default=0.0))

    def parts(self, block: Block) -> dict[int, tuple[Outcome, Usage]]:
        """Position -> what is known; what a record cost stands at its first position."""
        key, positions = (block.candidate.id, block.split), range(block.start, block.stop)
        known = self._outcomes.get(key, {})
        costs = {covered[0]: decode_usage(record["usage"]) for covered, record in self._blocks.get(key, ())}
        return {p: (decode_outcome(known[p]), costs.get(p, Usage())) for p in positions if p in known}

    def forget(self, candidate: Candidate) -> None:
        """Its race is over: no work on it is handed out any more."""
        for split in ("train", "val"):
            self._outcomes.pop((candidate.id, split), None)
            self._blocks.pop((candidate.id, split), None)
