"""When the next round opens, how large it is, and what its proposals see.

A round builds on the decision `lag` rounds before its predecessor and on what the rounds in between stood at when
each was one checkpoint further than the next: never on what else happens to be known. Why: docs/decisions/0006-lag.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dspy_opro.work import View

from .proposals import Opening
from .round import Round
from .rules import Rules


@dataclass(frozen=True)
class Decision:
    """What was known when a round was decided, whatever has come in since."""

    view: View
    num_calls: int
    """Examples that the rounds up to it scored."""
    is_empty: bool
    """Whether the round had no candidates."""


class Overlap:
    """The rounds that the next ones may look at, and the decisions that they may build on."""

    def __init__(self, rules: Rules, before_any: View) -> None:
        self._rules = rules
        self._next = 0
        self._rounds: dict[int, Round] = {}  # number -> round, decided or not
        self._decisions = {-1: Decision(before_any, 0, False)}  # number of a round -> its decision
        self._as_of = -1  # the decision that the next round builds on

    def open(self) -> Opening | None:
        """What the next round is given, or None where its proposals may not be asked for yet."""
        plan = self._rules.plan
        while plan.num_rounds is None or self._next <= plan.num_rounds:
            number = self._next
            # Of many rounds the first need not wait for the student's score.
            blind = number == 1 and plan.lag > 1
            self._as_of = max(self._as_of, number - 1 - plan.lag, -1 if blind else 0)
            between = range(self._as_of + 1, number)
            standings = [self._rounds[before].standing(self._num_passed(before)) for before in between]
            decision = self._decisions.get(self._as_of)
            if decision is None or None in standings:
                return None
            size = 0 if decision.is_empty else self._affordable(decision, between)
            if size:
                view, trials = decision.view, [trial for standing in standings for trial in standing or ()]
                if trials:
                    view = replace(view, trajectory=view.trajectory.add(*trials))
                return Opening(number, view, size, self._rules.most_calls(size))
            if not between:
                return None
            self._as_of += 1  # the next decision may give back funds, or have candidates
        return None

    def add(self, opened: Round) -> None:
        self._rounds[opened.number] = opened
        self._next = opened.number + 1

    def decide(self, decided: Round, view: View) -> None:
        """Keep what later rounds build on once this one is decided, and nothing older than they may look at."""
        num_calls = self._decisions[decided.number - 1].num_calls + decided.scheduled
        self._decisions[decided.number] = Decision(view, num_calls, not decided.candidates)
        self._decisions.pop(decided.number - self._rules.plan.lag - 2, None)
        self._rounds.pop(decided.number - self._rules.plan.lag - 2, None)

    def _num_passed(self, number: int) -> int:
        """The checkpoints of a round that the next one to open knows of.

        With a lag of 1 proposals are asked for while the tail of the race before runs; with more while others are
        still being written.
        """
        return self._next - number - (self._rules.plan.lag > 1)

    def _affordable(self, decision: Decision, between: Sequence[int]) -> int:
        """How many candidates the next round can have; 0 for none now."""
        wanted, limit = self._rules.most_candidates(self._next), self._rules.plan.max_metric_calls
        if limit is None:
            return wanted
        left = limit - decision.num_calls - sum(self._rounds[number].reserved for number in between)
        if between:  # they hold funds that they may give back: a round smaller than half can wait for them
            smallest = (wanted + 1) // 2
        elif self._rules.plan.lag and self._next > 1:
            # The last funds that came back: a small round alone would wait for each of its stragglers.
            smallest = wanted
        else:
            smallest = 1
        sizes = range(wanted, smallest - 1, -1)
        return next((size for size in sizes if self._rules.most_calls(size) <= left), 0)
