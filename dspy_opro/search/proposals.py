"""From a round's proposals to its candidates. Slots are filled in any order and read in their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from .order import RaceOrder
from .shared import Rules, Tried, Worklist
from .tasks import Proposal, ProposalTask, View, rng
from .trajectory import Candidate

NO_ROOM = ": the first round has no room"
"""The end of the problem of an instruction of the user that is not tried."""


@dataclass(frozen=True)
class Opening:
    """What a round is given when it opens."""

    number: int
    view: View
    num_slots: int
    """Candidates that it may propose."""
    reserved: int
    """Examples that it may score at most."""
    order: RaceOrder
    """In which its race scores the train examples."""


class ProposalSlots:
    """The slots of one round, until all its candidates are known."""

    def __init__(self, opening: Opening, rules: Rules, tried: Tried, worklist: Worklist) -> None:
        self._number = opening.number
        self._view = opening.view
        self._num_slots = opening.num_slots
        self._order = opening.order
        self._rules = rules
        self._tried = tried
        self._worklist = worklist
        # With a small budget the first round has fewer slots than the plan has candidates.
        self._num_demo_sets = min(rules.plan.num_demo_sets, max(1, opening.num_slots // 2))
        self._wave = 0
        self._num_waiting = 0  # tasks of this wave without a result
        self._texts: dict[int, dict[str, str]] = {}  # slot -> predictor -> accepted text
        self._demos: dict[int, Mapping[str, str]] = {}  # slot -> predictor -> its demos, as text
        self._early: dict[int, Candidate | None] = {}  # slot -> what is scored before all are known
        self._problems: list[tuple[int, str]] = []  # (slot, why a proposal is not used)
        self._num_errors = 0
        if self._number == 1:
            for index in range(self._num_slots, len(rules.plan.initial)):
                self._problems.append((index, f"initial_instructions[{index}]{NO_ROOM}"))

    @property
    def problems(self) -> tuple[str, ...]:
        """Why proposals are not used, in the order of their slots."""
        return tuple(problem for _, problem in sorted(self._problems))

    @property
    def has_failed(self) -> bool:
        """Whether errors are all that the proposer gave."""
        return 0 < self._num_errors == len(self._problems)

    def ask(self, slots: Iterable[int]) -> None:
        names, plan = tuple(self._rules.student.instructions), self._rules.plan
        view = replace(self._view, problems=self._view.problems.union(self.problems))
        for slot in slots:
            if self._number == 1 and self._wave == 0 and slot < len(plan.initial) + self._num_demo_sets:
                is_for_demos = slot >= len(plan.initial)
                initial = (None, "") if is_for_demos else (slot, plan.initial[slot])
                self._hand_out(ProposalTask(1, slot, 0, names, view, is_for_demos, *initial))
                continue
            for predictors in self._rules.rewrites(self._number, slot):
                self._hand_out(ProposalTask(self._number, slot, self._wave, predictors, view))

    def _hand_out(self, task: ProposalTask) -> None:
        self._num_waiting += 1
        self._worklist.ask(task)

    def tell(self, task: ProposalTask, proposal: Proposal) -> None:
        if task.is_for_demos:
            self._demos[task.slot] = proposal.texts
        else:
            self._texts.setdefault(task.slot, {}).update(proposal.texts)
        self._problems.extend((task.slot, problem) for problem in proposal.problems)
        if proposal.error is not None:
            self._problems.append((task.slot, proposal.error))
            self._num_errors += 1
        self._num_waiting -= 1

    def score_early(self) -> None:
        """Hand out the first examples of candidates whose round still waits for the answers to others.

        Every candidate is scored on them, so nothing is scored that would not be, only earlier.
        """
        for slot, texts in self._texts.items():
            asked = (name for names in self._rules.rewrites(self._number, slot) for name in names)
            if slot in self._early or not all(name in texts for name in asked):
                continue
            candidate = self._early[slot] = self._rewritten(slot)
            if candidate is not None and candidate.id not in self._tried.ids:
                sizes = range(1, self._num_slots + self._rules.recombines + 1)
                first = min(self._rules.checkpoints(size)[0] for size in sizes)
                self._worklist.score(candidate, self._number, "train", self._order.positions[:first])

    def resolve(self) -> list[Candidate] | None:
        """The round's candidates; None while answers are missing, those to one more wave included."""
        if self._num_waiting:
            return None
        new, unused = self._sift()
        self._wave += 1
        if unused and self._wave < self._rules.plan.max_waves:
            self.ask(unused)
            return None
        mixed = self._recombined(len(new))
        if mixed is not None and mixed.id not in self._tried.ids:
            new.setdefault(mixed.id, mixed)
        self._tried.ids.update(new)
        return list(new.values())

    def early(self) -> list[Candidate]:
        """The candidates whose first examples were handed out before all candidates are known."""
        return [c for _, c in sorted(self._early.items()) if c is not None and c.id not in self._tried.ids]

    def _sift(self) -> tuple[dict[str, Candidate], list[int]]:
        """Id -> candidate that is new, and the slots without one, which are empty again."""
        new: dict[str, Candidate] = {}
        unused = []
        for slot in range(self._num_slots):
            candidate = self._demonstrated(slot) if slot in self._demos else self._rewritten(slot)
            if candidate is not None and candidate.id not in self._tried.ids and candidate.id not in new:
                new[candidate.id] = candidate
                continue
            unused.append(slot)
            if self._texts.get(slot):
                self._problems.append((slot, "duplicate"))
            for content in (self._texts, self._early, self._demos):
                content.pop(slot, None)
        return new, unused

    def _rewritten(self, slot: int) -> Candidate | None:
        return self._rewrite(self._texts.get(slot, {}), self._demo_set(slot))

    def _rewrite(self, texts: Mapping[str, str], demo_set: int | None) -> Candidate | None:
        """The base with new texts; None where they change nothing."""
        base = self._view.base
        changed = {
            name: texts[name] for name, old in base.instructions.items() if texts.get(name, old) != old
        }
        if not changed:
            return None
        instructions = {**base.instructions, **changed}
        demos = None if demo_set is None else self._tried.demo_sets[demo_set]
        return Candidate(instructions, self._number, base.id, tuple(changed), demo_set, demos)

    def _demo_set(self, slot: int) -> int | None:
        """Even slots keep the base's demos. Odd slots draw one of the sets or the student's own."""
        demo_sets = self._tried.demo_sets
        if self._number == 1 or not demo_sets or slot % 2 == 0:
            return self._view.base.demo_set
        generator = rng(self._rules.plan.seed, "demo set", self._number, slot)
        return generator.choice([None, *sorted(demo_sets)])

    def _demonstrated(self, slot: int) -> Candidate | None:
        """The base with a set of demos that no other slot has."""
        demos, base, demo_sets = self._demos[slot], self._view.base, self._tried.demo_sets
        if not demos or any(demos == known for number, known in demo_sets.items() if number != slot):
            return None
        demo_sets[slot] = demos
        return Candidate(base.instructions, self._number, base.id, (), slot, demos)

    def _recombined(self, num_new: int) -> Candidate | None:
        """One more candidate, out of what is known, where another trial may be made."""
        plan, recombine = self._rules.plan, self._rules.recombine
        has_room = True
        if plan.num_trials is not None:
            num_later = max(0, plan.num_trials - self._number * plan.num_candidates)
            has_room = len(self._tried.ids) - 1 + num_new + num_later < plan.num_trials
        if recombine is None or not self._rules.recombines or not has_room:
            return None
        texts = recombine(self._view.trajectory, plan.seed + self._number)
        return self._rewrite(texts or {}, self._view.base.demo_set)
