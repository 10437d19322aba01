"""One round: its proposals become candidates, the candidates race, and each race ends in a trial.

A round looks at the other rounds only as they were when it opened, so rounds may race at the same time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import replace
from itertools import islice

from .proposals import Opening, ProposalSlots
from .pruners import Race
from .shared import Rules, Worklist
from .tasks import CandidatesProposed, Event, TrialFinished, TrialReported, View
from .trajectory import Candidate, Trajectory, Trial, mean, to_array, unless_first

MAX_FAILURES = 5
"""Failed examples of a trial that are told with it."""


def compared_with(view: View, trajectory: Trajectory) -> Trial:
    """What a round's candidates are compared with: the incumbent of the time when they were asked for.

    A fixed choice, so that rounds can race at the same time and still take the same decisions in every run.
    """
    return view.trajectory.incumbent if len(view.trajectory) else trajectory.trials[0]


class Round:
    """A round under way."""

    def __init__(self, opening: Opening, proposals: ProposalSlots, rules: Rules, worklist: Worklist) -> None:
        self.number = opening.number
        self.view = opening.view
        self.reserved = opening.reserved
        self.order = opening.order
        self.scheduled = 0  # examples that its decisions so far have asked for
        self.proposals = proposals
        self.candidates: list[Candidate] | None = None  # None until known
        self.alive: dict[str, Candidate] = {}  # id -> one that races on, or is scored in full
        self.trials: dict[str, Trial] = {}  # id -> trial of one whose race has ended
        self.is_raced = False
        self.is_ranked = False
        self.validating: list[Candidate] = []
        self._rules = rules
        self._worklist = worklist
        self._checkpoints: Sequence[int] = ()
        self._stage = 0
        self._num_raced = 0  # examples of its race so far
        self._ahead: set[str] = set()  # ids of those that have the examples up to the next checkpoint already
        self._standings: list[tuple[Trial, ...]] = []  # after each checkpoint, in the order of proposal
        self._is_shown = False
        self._events: list[Event] = []  # the round's own until it is shown, then the search's

    def show(self, events: list[Event]) -> tuple[str, ...]:
        """Tell of the candidates, and of what follows as it happens: events are in the order of rounds.

        Returns:
            Why proposals were not used; nothing where that was told before.
        """
        if self._is_shown or self.candidates is None:
            return ()
        self._is_shown = True
        problems = self.proposals.problems
        events += [CandidatesProposed(self.number, tuple(self.candidates), problems), *self._events]
        self._events = events  # from now on the round's events go to the search's own list
        return problems

    def resolve(self) -> bool:
        """Start the race once the candidates can be known; False where answers are missing."""
        candidates = self.proposals.resolve()
        if candidates is not None:
            self.enter(candidates)
        return candidates is not None

    def enter(self, candidates: list[Candidate]) -> None:
        """The candidates are known: hand out the examples up to the first checkpoint."""
        self.candidates, self.alive = candidates, {c.id: c for c in candidates}
        plan = self._rules.plan
        self._checkpoints = self._rules.checkpoints(len(candidates)) if self.number else [plan.num_train]
        self._score_alive(0, self._checkpoints[0])

    def keep_measured(self) -> None:
        """After the end: keep only the candidates that are measured in full."""
        self.alive = {c.id: c for c in self.proposals.early() if self.is_measured(c)}
        self.candidates = list(self.alive.values())

    def is_measured(self, candidate: Candidate) -> bool:
        """Whether nothing is missing that a decision on the candidate would read."""
        plan, num_scored = self._rules.plan, len(self._worklist.scores(candidate))
        in_full = num_scored == plan.num_train and self._worklist.is_complete(candidate)
        return in_full and (plan.num_val == 0 or self.is_validated)

    def race(self, trajectory: Trajectory) -> bool:
        """Go past one checkpoint; False where results are missing, or the race is over."""
        if self.candidates is None or self.is_raced:
            return False
        reference = compared_with(self.view, trajectory) if self.number > 0 else None
        if not all(c.id in self._ahead or self._worklist.is_complete(c) for c in self.alive.values()):
            if reference is not None and self._stage + 1 < len(self._checkpoints):
                self._score_ahead(reference)
            return False
        if reference is not None:
            self._cut(reference)
            self._standings.append(self._trials_now(reference))
        self._ahead.clear()
        if self.alive and self._stage + 1 < len(self._checkpoints):
            self._stage += 1
            self._score_alive(*self._checkpoints[self._stage - 1 : self._stage + 1])
        else:
            self.is_raced = True
        return True

    def _score_alive(self, start: int, stop: int) -> None:
        self.scheduled += len(self.alive) * (stop - start)
        self._num_raced += len(self.alive) * (stop - start)
        if self.number:
            self._rules.check_bound(self._num_raced, len(self.candidates or ()))
        for candidate in self.alive.values():
            self._worklist.score(candidate, self.number, "train", self.order.positions[:stop])

    def _score_ahead(self, reference: Trial) -> None:
        """Hand out the next examples of candidates that go on whatever the missing scores are."""
        ready = [c for c in self.alive.values() if c.id not in self._ahead and self._worklist.is_complete(c)]
        if not ready:
            return
        end, next_end = self._checkpoints[self._stage : self._stage + 2]
        sure = self._rules.sure_to_go_on(self._seen(reference), end)
        for candidate in ready:
            if candidate.id in sure:
                self._ahead.add(candidate.id)
                self._worklist.score(candidate, self.number, "train", self.order.positions[:next_end])

    def _cut(self, reference: Trial) -> None:
        """One checkpoint: report everyone, let the pruner say who leaves."""
        if not self.alive:
            return
        race = self._seen(reference)
        for candidate in self.alive.values():
            reward = reference.reward + self.order.difference(race.scores[candidate.id], race.incumbent)
            self._events.append(TrialReported(candidate, race.num_scored, reward))
        dropped = self._rules.drop(race)  # asked at the end too: a pruner may keep what it saw
        if race.num_scored == race.num_examples:
            return
        for id_, reason in dropped.items():
            candidate = self.alive.pop(id_)
            if id_ in self._ahead:  # it was not sure after all: another one has a score outside [0, 1]
                self._worklist.keep_only(candidate, self._prefix())
            self._finish(self._trial(candidate, reason, reference))
            self._worklist.forget(candidate)

    def _prefix(self) -> Set[int]:
        """Positions of the examples up to the current checkpoint."""
        return set(self.order.positions[: self._checkpoints[self._stage]])

    def _seen(self, reference: Trial) -> Race:
        """The race as the pruner sees it."""
        prefix = self._prefix()
        scores = {
            c.id: self.order.arrange(self._worklist.scores_by_position(c, prefix))
            for c in self.alive.values()
        }
        incumbent = self.order.arrange(reference.scores_by_position)
        seen = [s for row in (incumbent, *scores.values()) for s in row]
        bounded = self.view.trajectory.score_range == (0.0, 1.0) and all(0.0 <= s <= 1.0 for s in seen)
        return Race(incumbent, scores, len(self.candidates or ()), bounded)

    def _trials_now(self, reference: Trial) -> tuple[Trial, ...]:
        """The trials, as if those that still race ended here."""
        return tuple(
            self.trials.get(c.id) or self._trial(c, "still racing", reference) for c in self.candidates or ()
        )

    def standing_after(self, num_checkpoints: int) -> Sequence[Trial] | None:
        """Its trials after so many checkpoints, or after the last; None where it isn't that far."""
        if len(self._standings) < num_checkpoints and not self.is_raced:
            return None
        return next(reversed(self._standings[:num_checkpoints]), ())

    def leader(self, incumbent: Trial) -> Candidate | None:
        """Of those that are scored in full the best, among equals the first, where it beats the incumbent."""
        rewards = ((mean(self._worklist.scores(c)), c) for c in self.alive.values())
        better = (pair for pair in rewards if pair[0] > incumbent.reward)
        return max(better, key=lambda pair: pair[0], default=(0.0, None))[1]

    def validate(self, candidate: Candidate, as_urgent_as: int) -> None:
        """Score a candidate on the valset. Its examples are as urgent as those of the round with this number."""
        self.validating.append(candidate)
        self.scheduled += self._rules.plan.num_val
        self._worklist.score(candidate, as_urgent_as, "val", range(self._rules.plan.num_val))

    @property
    def is_validated(self) -> bool:
        """Whether no validation is missing."""
        if not self.validating:
            return self.is_ranked
        return all(self._worklist.is_complete(candidate, "val") for candidate in self.validating)

    def rank(self) -> list[Trial]:
        """The trials of the race, which is over, in the order of proposal and without validation scores."""
        self.is_ranked = True
        full = [self._trial(candidate, "scored in full") for candidate in self.alive.values()]
        known = self.trials | {t.id: replace(t, valset_score=None, valset_scores=()) for t in full}
        return [known[c.id] for c in self.candidates or ()]

    def complete(self, candidates: Iterable[Candidate]) -> list[Trial]:
        """End the races of those that are scored in full; gives all trials so far, in the order of proposal."""
        for candidate in candidates:
            self._finish(self._trial(candidate, "scored in full"))
        return [self.trials[c.id] for c in self.candidates or () if c.id in self.trials]

    def _finish(self, trial: Trial) -> None:
        subscores = self._worklist.subscores(trial.candidate)
        trial = replace(trial, subscores=subscores, usage=self._worklist.usage(trial.candidate))
        self.trials[trial.id] = trial
        failures = tuple(islice(self._worklist.failures(trial.candidate), MAX_FAILURES))
        self._events.append(TrialFinished(trial, failures))

    def _trial(self, candidate: Candidate, reason: str, reference: Trial | None = None) -> Trial:
        """What is scored by now as a trial: one that ends early is compared with a reference."""
        prefix = None if reference is None else self._prefix()
        known = self._worklist.scores_by_position(candidate, prefix)
        scores, on_valset = to_array(known.values()), to_array(self._worklist.scores(candidate, "val"))
        valset_score = mean(on_valset) if on_valset else None
        outcomes = enumerate(self._worklist.outcomes(candidate))
        failures = sum(o is not None and o.error is not None and p in known for p, o in outcomes)
        rest = (reason, valset_score, failures, scores, on_valset, unless_first(known))
        if reference is None:
            return Trial(candidate, mean(scores), len(scores), "complete", *rest)
        compared = [self.order.arrange(each) for each in (known, reference.scores_by_position)]
        reward = reference.reward + self.order.difference(*compared)
        return Trial(candidate, reward, len(scores), "pruned", *rest)
