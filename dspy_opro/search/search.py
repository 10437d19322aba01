"""The search as a whole: results come in, every decision that they allow is taken, work and events go out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from dspy_opro.racing import Pruner
from dspy_opro.stopping import RunState, Usage
from dspy_opro.trajectory import Candidate, Outcome, Trajectory
from dspy_opro.work import Ask, Block, Decided, Event, Plan, Proposal, View, Work

from .overlap import Overlap
from .proposals import Opening, Proposals, Tried
from .round import Round
from .rules import Recombine, Rules
from .worklist import Worklist


class Search:
    """OPRO rounds over racing candidates.

    Args:
        plan: Sizes and limits.
        student: Candidate number zero.
        pruner: Who leaves a race, and when.
        recombine: Gives one more candidate's instructions out of the trajectory, or None.
    """

    def __init__(
        self, plan: Plan, student: Candidate, pruner: Pruner, recombine: Recombine | None = None
    ) -> None:
        self.plan = plan
        self.student = student
        self.pruner = pruner
        self.trajectory = Trajectory()
        self.best_scores: list[float] = []
        self.stop_reason: str | None = None
        self.stop_rule: Callable[[RunState], str | None] = lambda state: None
        """Called after every decided round; a reason ends the search."""
        self.problems: list[str] = []
        """Why proposals were not used."""
        self._rules = Rules(plan, student, pruner, recombine)
        self._tried = Tried({student.id})
        self._worklist = Worklist(plan.block_size)
        self._events: list[Event] = []
        self._is_cut_short = False
        self._rounds: list[Round] = []  # undecided ones, in order
        before_any = View(self.trajectory, student, [None] * plan.num_train)
        self._overlap = Overlap(self._rules, before_any)
        first = self._begin(Opening(0, before_any, 1, plan.num_train + plan.num_val))
        first.enter([student])
        if plan.num_val:
            first.validate(student)
        self._open_rounds()

    # -- the outside: next, tell, events ---------------------------------------------------------

    def next(self) -> Work | None:
        """The most urgent piece of work, or None while everything open waits for results."""
        return self._worklist.next()

    def tell_proposal(self, ask: Ask, proposal: Proposal) -> None:
        """The answer to an `Ask`."""
        current = next((r for r in self._rounds if r.number == ask.round), None)
        if self.done or current is None:
            return
        current.proposals.tell(ask, proposal)
        self._advance()

    def tell_block(self, block: Block, outcomes: Sequence[Outcome]) -> None:
        """The outcomes of a block, in the order of its positions."""
        if self._worklist.tell(block, outcomes) and not self.done:
            self._advance()

    def events(self) -> list[Event]:
        """What happened since the last call."""
        happened = self._events.copy()
        self._events.clear()  # the list stays: the round that is to be decided next writes into it
        return happened

    @property
    def done(self) -> bool:
        return self.stop_reason is not None

    @property
    def demo_sets(self) -> dict[int, Mapping[str, str]]:
        """Number of a demo set -> predictor name -> its demos, as text."""
        return self._tried.demo_sets

    def most_calls(self, num_candidates: int) -> int:
        """Examples that a round of so many proposed candidates scores at most."""
        return self._rules.most_calls(num_candidates)

    def stop(self, reason: str) -> None:
        """End the search from outside: nothing more is handed out; results under way may still be told."""
        if self.stop_reason is None:
            self._end(reason)
            self._is_cut_short = True

    def salvage(self) -> None:
        """After a `stop` from outside, once all results are told: what is scored in full counts."""
        if not self._is_cut_short:
            return
        for current in self._rounds:
            if current.candidates is None:
                current.make_do()
            completed = [c for c in current.alive.values() if current.is_measured(c)]
            if current.number == 0 and not completed:
                break  # without the student's score nothing can be compared
            if completed or current.trials:
                self._show(current)
                self._add(current, completed)
        self._rounds.clear()

    # -- progress --------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Take every decision whose results are all there."""
        while not self.done:
            for current in self._rounds:
                if current.candidates is None and not current.resolve():
                    current.proposals.score_early()
                    break  # rounds become known in order, so that duplicates are dropped alike in every run
            moved = [current.race(self.trajectory) for current in self._racing()]
            if any(moved):
                self._open_rounds()
            if not (self._rounds and self._decide(self._rounds[0])) and not any(moved):
                return

    def _racing(self) -> Sequence[Round]:
        """The rounds whose races may move on: later ones too, unless the pruner depends on the order of races."""
        independent = getattr(self.pruner, "independent", False) and len(self.trajectory) > 0
        return tuple(self._rounds) if independent else self._rounds[:1]

    def _open_rounds(self) -> None:
        """Ask for the proposals of every round that may be under way now."""
        while (opening := self._overlap.open()) is not None:
            self._begin(opening).proposals.ask(range(opening.num_slots))

    def _begin(self, opening: Opening) -> Round:
        proposals = Proposals(opening, self._rules, self._tried, self._worklist)
        opened = Round(opening, proposals, self._rules, self._worklist)
        self._rounds.append(opened)
        self._overlap.add(opened)
        return opened

    def _decide(self, current: Round) -> bool:
        """Move the oldest undecided round on towards its end; False where results are missing."""
        if current.candidates is None:
            return False
        self._show(current)
        if not current.is_raced:
            return False
        if current.validating is not None:
            if not current.is_validated:
                return False
        elif self.plan.num_val and (leader := current.leader(self.trajectory.incumbent)) is not None:
            current.validate(leader)
            return True
        self._close(current)
        return True

    def _show(self, current: Round) -> None:
        """Tell of the candidates once their round is next to be decided: a run that ends before has none of them."""
        if problems := current.show(self._events):
            self.problems = [*self.problems, *problems][:1000]

    def _close(self, current: Round) -> None:
        """A round's end: only the incumbent's predictions are shown again, so that the others' are forgotten."""
        before = self.trajectory.incumbent if len(self.trajectory) else None
        self._add(current, current.alive.values())
        incumbent = self.trajectory.incumbent.candidate
        for candidate in (*current.alive.values(), *((before.candidate,) if before else ())):
            if candidate.id != incumbent.id:
                self._worklist.forget(candidate)
        self._rounds.pop(0)
        view = View(self.trajectory, incumbent, tuple(self._worklist.outcomes(incumbent)))
        self._overlap.decide(current, view)
        self._events.append(Decided(current.number, self.trajectory.best, self.best_scores[-1]))
        self._go_on(current)

    def _go_on(self, last: Round) -> None:
        """After a round's end: open what may be opened, or end where nothing can follow."""
        state = RunState(last.number, self.trajectory, tuple(self.best_scores), Usage(), 0.0)
        reason = self.stop_rule(state)
        if reason is not None:
            self._end(reason)
        elif self.plan.num_rounds is not None and last.number >= self.plan.num_rounds:
            self._end("num_rounds")
        else:
            self._open_rounds()
            if not self._rounds:
                failed = "proposer_failed" if last.proposals.has_failed else "no_new_proposals"
                self._end("max_metric_calls" if last.candidates else failed)

    def _add(self, current: Round, completed: Iterable[Candidate]) -> None:
        """Put a round's trials into the trajectory."""
        self.trajectory = self.trajectory.add(*current.complete(completed))
        best = self.trajectory.best
        self.best_scores.append(best.reward if best.valset_score is None else best.valset_score)

    def _end(self, reason: str) -> None:
        self.stop_reason = reason
        self._worklist.clear()
