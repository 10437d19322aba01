"""The search as a whole: results come in, the search takes every decision that they allow, tasks and events go out."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace

from .confidence import Gain, measured_gain, shortest_tied
from .order import RaceOrder
from .proposals import Opening, ProposalSlots
from .pruners import Pruner
from .reserve import num_pairs
from .round import Round
from .shared import Recombine, Rules, Tried, Worklist
from .stoppers import RunState, Stopper, first_reason
from .tasks import (
    Event,
    Failure,
    Plan,
    Proposal,
    ProposalTask,
    RoundDecided,
    ScoringTask,
    Split,
    Task,
    TaskResult,
    View,
)
from .trajectory import Candidate, Outcome, Trajectory, Trial, Usage

LAST = sys.maxsize
"""The round of examples that wait for all others."""


class Search:
    """OPRO rounds over racing candidates.

    Args:
        plan: Sizes and limits.
        student: Candidate number zero.
        pruner: Who leaves a race, and when.
        recombine: Gives one more candidate's instructions out of the trajectory, or None.
        stoppers: Asked after every decided round, in this order. The first reason ends the search.
        carried: Candidates of an earlier search. They are scored in full together with the student.
        returned_before: Id of the candidate that an earlier search confirmed and returned. It is returned in place of
            the student where no gain is proven.
        seen: Positions of unseen examples that an earlier search scored candidates on. They confirm nothing.
    """

    def __init__(
        self,
        plan: Plan,
        student: Candidate,
        pruner: Pruner,
        recombine: Recombine | None = None,
        stoppers: Sequence[Stopper] = (),
        carried: Sequence[Candidate] = (),
        returned_before: str | None = None,
        seen: Set[int] = frozenset(),
    ) -> None:
        self.plan = plan
        self.student = student
        self.pruner = pruner
        self.trajectory = Trajectory()
        self.best_scores: list[float] = []
        self.stop_reason: str | None = None
        self.problems: list[str] = []
        """Why proposals were not used."""
        self.usage = Usage()
        """What the results told so far cost."""
        self.seconds = 0.0
        """How long the run had been at work when the search was told the last result, over all its processes."""
        self.failures: list[Failure] = []
        """Failed examples, by position in the run's order; in the order in which they were told."""
        self.gain: Gain | None = None
        """How certain the gain over the student is. None while that is not known, and if the student is the best."""
        self.chosen: Trial
        """The best trial; where the plan confirms the result, one with a shorter prompt that is as good.

        It is set once the student is scored."""
        self._ending: str | None = None  # why the rounds are over, while the result is being confirmed
        self._stoppers = stoppers
        self._rules = Rules(plan, student, pruner, recombine)
        start = [student, *carried]
        self._returned_before = returned_before
        self._seen = seen
        demo_sets = {c.demo_set: c.demos for c in carried if c.demo_set is not None and c.demos}
        self._tried = Tried({candidate.id for candidate in start}, demo_sets)
        self._worklist = Worklist(student)
        self._events: list[Event] = []
        self._is_cut_short = False
        self._rounds: list[Round] = []  # undecided ones, in order
        self._raced = Trajectory()  # the trials of all races that are over, without validation scores
        self._in_full: list[Candidate] = []  # those of decided rounds whose outcomes are not forgotten
        before_any = View(self.trajectory, student, [None] * plan.num_train)
        self._overlap = Overlap(self._rules, before_any)
        reserved = len(start) * (plan.num_train + plan.num_val)
        first = self._begin(Opening(0, before_any, len(start), reserved, RaceOrder.fixed(plan.num_train)))
        first.enter(start)
        for candidate in start if plan.num_val else ():
            first.validate(candidate, as_urgent_as=0)
        self._open_rounds()

    # -- the outside: next_tasks, tell, events ---------------------------------------------------

    def next_tasks(self) -> list[Task]:
        """The tasks that came up since the last call, in the order in which they came up."""
        return self._worklist.next_tasks()

    def tell(self, task: Task, result: TaskResult) -> None:
        """Take in what a task gave, and take every decision that it allows.

        Raises:
            Exception: What a stopper or a pruner raises.
        """
        self.usage += result.usage
        self.seconds = max(self.seconds, result.seconds)
        if isinstance(task, ProposalTask):
            assert isinstance(result.content, Proposal)
            self._tell_proposal(task, result.content, result.usage)
            return
        assert isinstance(result.content, Outcome)
        if result.content.error is not None:
            self.failures.append(Failure(task.candidate.id, task.split, task.position, result.content.error))
        if self._worklist.tell(task, result.content, result.usage) and not self.done:
            if self._ending is None:
                self._advance()
            elif all(self._worklist.is_complete(c, "unseen") for c in self._compared()):
                self._finish(self._ending)

    def _tell_proposal(self, task: ProposalTask, proposal: Proposal, usage: Usage) -> None:
        current = next((r for r in self._rounds if r.number == task.round), None)
        if self.done or current is None:  # the rounds are over
            return
        current.scheduled += usage.metric_calls  # what making demos has tried
        current.proposals.tell(task, proposal)
        self._advance()

    def events(self) -> list[Event]:
        """What happened since the last call."""
        happened = self._events.copy()
        self._events.clear()  # the list stays: the round that is to be decided next writes into it
        return happened

    @property
    def done(self) -> bool:
        return self.stop_reason is not None

    def wants(self, task: Task) -> bool:
        """Whether a task that was handed out is still to be done: the rounds may be over meanwhile."""
        return self._ending is None or (isinstance(task, ScoringTask) and task.split == "unseen")

    @property
    def returned(self) -> Trial:
        """The trial of the program that the run returns: the best one, or where no gain is proven the student.

        A candidate that an earlier search returned takes the place of the student, unless unseen examples refute it.
        """
        if self.plan.confirms and self.gain is not None and not self.gain.is_proven:
            trials = self.trajectory.trials
            if self.chosen.id == self._returned_before and self.gain.interval.basis == "fresh":
                return trials[0]
            before = (t for t in trials if t.id == self._returned_before and t.state == "complete")
            return next(before, trials[0])
        return self.chosen

    @property
    def gain_so_far(self) -> Gain | None:
        """`gain`, or before the end what is known so far of the best candidate."""
        return self.gain or self._measured_gain()

    def outcomes(self, candidate: Candidate, split: Split) -> Sequence[Outcome | None]:
        """A candidate's outcomes without calls: of student, best and returned candidate, none of most others."""
        found = self._worklist.outcomes(candidate, split)
        return tuple(o if o is None or o.calls is None else replace(o, calls=None) for o in found)

    def checkpoints(self, num_candidates: int) -> Sequence[int]:
        """The numbers of examples after which a round of so many candidates decides who leaves."""
        return self._rules.checkpoints(num_candidates)

    def most_calls(self, num_candidates: int) -> int:
        """Examples that a round of so many proposed candidates scores at most."""
        return self._rules.most_calls(num_candidates)

    def stop(self, reason: str) -> None:
        """End the search from outside: nothing more is handed out; results under way may still be told."""
        if self.stop_reason is None:
            self._worklist.clear()
            self.stop_reason = reason
            self._is_cut_short = True

    @property
    def is_confirming(self) -> bool:
        """Whether the rounds are over and the confirmation has begun."""
        return self._ending is not None

    @property
    def is_confirmed_later(self) -> bool:
        """Whether a part of every budget is kept for confirming the result. The first scores may use all of it."""
        return self._ending is None and self.plan.num_held_back > 0 and len(self.trajectory) > 0

    @property
    def most_metric_calls(self) -> float:
        """The budget of examples, less what is kept for confirming the result."""
        if self.plan.max_metric_calls is None:
            return math.inf
        if not self.is_confirmed_later:
            return self.plan.max_metric_calls + 2 * self.plan.num_held_back
        # Threads may have scored the student already.
        return self.plan.max_metric_calls + len(self._worklist.scores(self.student, "unseen"))

    def conclude(self, reason: str) -> None:
        """End the rounds from outside, once all results are told: what is scored in full counts and is confirmed.

        If the result is being confirmed, end that, too.
        """
        if self._ending is not None:
            self.stop(reason)
        elif not self.done:
            self._keep_scored()
            if len(self.trajectory):
                self._end(reason, is_early=True)
            else:
                self.stop(reason)

    def salvage(self) -> None:
        """After a `stop` from outside, once all results are told: what is scored in full counts."""
        if self._is_cut_short:
            self._keep_scored()

    def _keep_scored(self) -> None:
        for current in self._rounds:
            if current.candidates is None:
                current.keep_measured()
                self._tried.ids.update(current.alive)
            completed = [c for c in current.alive.values() if current.is_measured(c)]
            if current.number == 0 and len(completed) < len(current.alive):
                break  # without the first scores nothing can be compared
            if completed or current.trials:
                self._show(current)
                self._add(current, completed)
        self._rounds.clear()
        self.gain = self._measured_gain()

    # -- progress --------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Take every decision whose results are all there."""
        while not self.done:
            for current in self._rounds:
                if current.candidates is None and not current.resolve():
                    current.proposals.score_early()
                    break  # rounds become known in order, so that duplicates are dropped alike in every run
            moves = [current.race(self._raced) for current in self._racing()]  # every race moves on
            has_moved = self._rank() or any(moves)
            if has_moved:
                self._open_rounds()
            if not self._decide() and not has_moved:
                return

    def _racing(self) -> Sequence[Round]:
        """The rounds whose races may move on: later ones too, unless the pruner depends on the order of races."""
        racing = [current for current in self._rounds if not current.is_ranked]
        return racing if self._rules.is_independent and len(self._raced) > 0 else racing[:1]

    def _open_rounds(self) -> None:
        """Ask for the proposals of every round that may be under way now."""
        while (opening := self._overlap.open()) is not None:
            self._begin(opening).proposals.ask(range(opening.num_slots))

    def _begin(self, opening: Opening) -> Round:
        proposals = ProposalSlots(opening, self._rules, self._tried, self._worklist)
        opened = Round(opening, proposals, self._rules, self._worklist)
        self._rounds.append(opened)
        self._overlap.add(opened)
        return opened

    def _rank(self) -> bool:
        """Take in the oldest race that is over: its winner is validated, and later rounds build on it meanwhile."""
        current = next((r for r in self._rounds if not r.is_ranked), None)
        if current is None or not current.is_raced:
            return False
        leader = current.leader(self._raced.incumbent) if self.plan.num_val and current.number else None
        self._raced = self._raced.add(*current.rank())
        if leader is not None:
            # The end waits for the race of the last round, so threads validate while that race keeps few of them busy.
            current.validate(leader, LAST if self._overlap.is_full else current.number)
        incumbent = self._raced.incumbent.candidate
        view = View(self._raced, incumbent, tuple(self._worklist.outcomes(incumbent)))
        self._overlap.rank(current, view)
        return True

    def _decide(self) -> bool:
        """End the oldest undecided round; False where results are missing."""
        if not self._rounds or self._rounds[0].candidates is None:
            return False
        self._show(self._rounds[0])
        if not (self._rounds[0].is_ranked and self._rounds[0].is_validated):
            return False
        self._close(self._rounds.pop(0))
        return True

    def _show(self, current: Round) -> None:
        """Publish a round's events once it is the oldest undecided round, or at the end if it has finished trials."""
        if problems := current.show(self._events):
            self.problems = [*self.problems, *problems][:1000]

    def _close(self, current: Round) -> None:
        """A round's end: predictions of the student, the incumbent and the best are shown again, others forgotten."""
        self._add(current, current.alive.values())
        kept = {self.student.id, self._returned_before, self._raced.incumbent.id}
        kept |= {self.trajectory.best.id, self.chosen.id}
        self._in_full += current.alive.values()
        for candidate in self._in_full:
            if candidate.id not in kept:
                self._worklist.forget(candidate)
        self._in_full = [candidate for candidate in self._in_full if candidate.id in kept]
        for candidate in self._in_full:
            if candidate.id != self._raced.incumbent.id:
                self._worklist.forget_predictor_calls(candidate)
        self._events.append(RoundDecided(current.number, self.trajectory.best, self.best_scores[-1]))
        self._go_on(current)

    def _go_on(self, last: Round) -> None:
        """After a round's end: open what may be opened, or end where nothing can follow."""
        scores = tuple(self.best_scores)
        state = RunState(last.number, self.trajectory, scores, self.usage, self.seconds)
        reason = first_reason(self._stoppers, state)
        if reason is not None:
            self._end(reason, is_early=True)
        elif self.plan.num_rounds is not None and last.number >= self.plan.num_rounds:
            self._end("num_rounds")
        else:
            self._open_rounds()
            if not self._rounds:
                failed = "proposer_failed" if last.proposals.has_failed else "no_new_proposals"
                self._end("max_metric_calls" if last.candidates else failed)

    def _add(self, current: Round, completed: Iterable[Candidate]) -> None:
        """Put a round's trials into the trajectory."""
        trajectory = self.trajectory.add(*current.complete(completed))
        chosen = shortest_tied(trajectory) if self.plan.confirms else trajectory.best
        # Another thread may read them at any time, so neither is there without the other.
        self.trajectory, self.chosen = trajectory, chosen
        self.best_scores.append(trajectory.best.score)
        if self.plan.num_held_back and self.chosen.id != self.student.id:
            # The confirmation needs them in any case, so threads that have nothing else to do may score them now.
            self._worklist.score(self.student, LAST, "unseen", self._unseen()[: self.plan.num_held_back])

    # -- the end ---------------------------------------------------------------------------------

    def _end(self, reason: str, is_early: bool = False) -> None:
        """The rounds are over: confirm the result on unseen examples, where there are some.

        After an early end, what later rounds have used of a budget depends on the order of arrival. So only the
        held-back examples are scored.
        """
        plan, unseen, left, count = self.plan, self._unseen(), None, 0
        num_unseen = sum(position >= plan.num_spare for position in unseen)
        num_spare = len(unseen) - num_unseen
        if plan.max_metric_calls is not None and is_early:
            num_spare = 0
        elif plan.max_metric_calls is not None:
            left = plan.max_metric_calls + 2 * plan.num_held_back - self._overlap.num_examples
        self._rounds.clear()
        if self.chosen.id != self.student.id:
            count = num_pairs(plan.num_held_back, num_unseen, num_spare, left)
        self._worklist.clear(kept="unseen")
        if not count:
            self._finish(reason)
            return
        self._ending = reason
        # Pair by pair, as a limit may cut them off. Some of the student's may be scored already.
        for position in unseen[:count]:
            for candidate in self._compared():
                self._worklist.score(candidate, LAST, "unseen", [position])

    def _unseen(self) -> Sequence[int]:
        """Positions of the examples that may confirm the chosen candidate, in the order in which they do.

        Examples that were kept for demos are unseen where it has no demos: no candidate was scored on them.
        """
        spare, has_demos = range(self.plan.num_spare), self.chosen.candidate.demo_set is not None
        others = range(len(spare), len(spare) + self.plan.num_unseen)
        return [p for p in (others if has_demos else [*others, *spare]) if p not in self._seen]

    def _finish(self, reason: str) -> None:
        self.gain = self._measured_gain()
        self.stop_reason = reason

    def _compared(self) -> tuple[Candidate, Candidate]:
        return self.student, self.chosen.candidate

    def _measured_gain(self) -> Gain | None:
        """The best candidate's gain over the student."""
        if not len(self.trajectory):
            return None
        unseen = (self._worklist.outcomes(c, "unseen") for c in self._compared())
        return measured_gain(self.trajectory, self.chosen, *unseen, confirms=self.plan.confirms)


@dataclass(frozen=True)
class Ranking:
    """What was known when a round's race was over, whatever has come in since."""

    view: View
    num_examples: int
    """Examples that the rounds up to it scored."""
    is_empty: bool
    """Whether the round had no candidates."""


class Overlap:
    """When the next round opens, how large it is, and what its proposals see.

    A round sees everything up to round `number - 1 - lag`. Of each round in between it sees the trials after a fixed
    checkpoint, later for older rounds. It never builds on what else happens to be known: docs/decisions/0006-lag.md
    says why.
    """

    def __init__(self, rules: Rules, before_any: View) -> None:
        self._rules = rules
        self._next = 0
        self._rounds: dict[int, Round] = {}  # number -> round, decided or not
        self._rankings = {-1: Ranking(before_any, 0, False)}  # number of a round -> its ranking
        self._as_of = -1  # number of the round whose ranking the next round builds on

    def open(self) -> Opening | None:
        """What the next round is given, or None where its proposals may not be asked for yet."""
        plan = self._rules.plan
        while plan.num_rounds is None or self._next <= plan.num_rounds:
            number = self._next
            # With a lag above 1, round 1 asks before the student is scored.
            blind = number == 1 and plan.lag > 1
            self._as_of = max(self._as_of, number - 1 - plan.lag, -1 if blind else 0)
            between = range(self._as_of + 1, number)
            standings = [self._rounds[before].standing_after(self._num_passed(before)) for before in between]
            ranking = self._rankings.get(self._as_of)
            if ranking is None or None in standings:
                return None
            size = 0 if ranking.is_empty else self._affordable(ranking, between)
            if size:
                view, trials = ranking.view, [trial for standing in standings for trial in standing or ()]
                if trials:
                    view = replace(view, trajectory=view.trajectory.add(*trials))
                most_calls = self._rules.most_calls(size) + self._rules.most_demo_calls(number)
                return Opening(number, view, size, most_calls, self._rules.order(view.trajectory))
            if not between:
                return None
            self._as_of += 1  # that round may score fewer examples than reserved, or have candidates
        return None

    def add(self, opened: Round) -> None:
        self._rounds[opened.number] = opened
        self._next = opened.number + 1

    def rank(self, ranked: Round, view: View) -> None:
        """Keep what later rounds build on once this race is over, and nothing older than they may look at."""
        before = self._rankings[ranked.number - 1]
        num_examples = before.num_examples + ranked.scheduled
        view = replace(view, problems=before.view.problems.union(ranked.proposals.problems))
        self._rankings[ranked.number] = Ranking(view, num_examples, not ranked.candidates)
        self._rankings.pop(ranked.number - self._rules.plan.lag - 2, None)
        self._rounds.pop(ranked.number - self._rules.plan.lag - 2, None)

    @property
    def is_full(self) -> bool:
        """Whether no further round can open, unless those under way score fewer examples than reserved."""
        plan = self._rules.plan
        if plan.num_rounds is not None and self._next > plan.num_rounds:
            return True
        smallest = self._rules.most_calls(self._smallest)
        return plan.max_metric_calls is not None and plan.max_metric_calls - self.num_examples < smallest

    @property
    def _smallest(self) -> int:
        """Candidates of the smallest round that opens beside others. They may leave enough for a larger one."""
        return (self._rules.most_candidates(self._next) + 1) // 2

    @property
    def num_examples(self) -> int:
        """Examples that the ranked rounds scored, and that the others may have scored."""
        last = max(self._rankings)
        later = (opened.reserved for number, opened in self._rounds.items() if number > last)
        return self._rankings[last].num_examples + sum(later)

    def _num_passed(self, number: int) -> int:
        """The checkpoints of a round that the next one to open knows of.

        With a lag of 1 the round before must have passed its first checkpoint; with a larger lag it need not have
        passed any.
        """
        return self._next - number - (self._rules.plan.lag > 1)

    def _affordable(self, ranking: Ranking, between: Sequence[int]) -> int:
        """How many candidates the next round can have; 0 for none now."""
        wanted, limit = self._rules.most_candidates(self._next), self._rules.plan.max_metric_calls
        if limit is None:
            return wanted
        left = limit - ranking.num_examples - sum(self._rounds[number].reserved for number in between)
        left -= self._rules.most_demo_calls(self._next)
        if between:
            smallest = self._smallest
        elif self._rules.plan.lag and self._next > 1:
            # The rest pays for a small round at most, and that would wait for each of its slow calls.
            smallest = wanted
        else:
            smallest = 1
        sizes = range(wanted, smallest - 1, -1)
        return next((size for size in sizes if self._rules.most_calls(size) <= left), 0)
