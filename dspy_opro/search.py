"""The search as a state machine: `next()` hands out work, `tell_...()` takes results, nothing here waits.

It knows nothing of threads, clocks, DSPy or storages. What it does depends on the results alone and not
on the order in which they arrive: decisions are taken at fixed checkpoints, in a fixed order.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .racing import Pruner, Race
from .stopping import RunState, Usage
from .trajectory import Candidate, Outcome, Trajectory, Trial, mean, paired_difference, to_array
from .work import (
    Ask,
    Block,
    Decided,
    Event,
    Finished,
    Plan,
    Proposal,
    Proposed,
    Reported,
    Split,
    View,
    Work,
    rng,
)


class _Round:
    """A round under way."""

    def __init__(self, number: int, view: View, num_candidates: int, reserved: int) -> None:
        self.number = number
        self.view = view
        self.num_candidates = num_candidates
        self.reserved = reserved  # examples it may score at most
        self.scheduled = 0  # examples that its decisions so far have asked for
        self.wave = 0
        self.waiting = 0  # asks of this wave without an answer
        self.texts: dict[int, dict[str, str]] = {}  # slot -> predictor -> accepted text
        self.demos: dict[int, Mapping[str, str]] = {}  # slot -> predictor -> its demos, as text
        self.early: dict[int, Candidate | None] = {}  # slot -> what is scored before all are known
        self.problems: list[tuple[int, str]] = []  # (slot, why a proposal is not used)
        self.num_errors = 0
        self.candidates: list[Candidate] | None = None  # None until known
        self.checkpoints: Sequence[int] = ()
        self.stage = 0
        self.is_proposed = False  # whether its event is out
        self.alive: dict[str, Candidate] = {}
        self.trials: dict[str, Trial] = {}
        self.is_raced = False
        self.events: list[Event] = []  # of the race, kept until the candidates are told of
        self.validating: Candidate | None = None
        self.standings: list[tuple[Trial, ...]] = []  # after each checkpoint, in the order of proposal


@dataclass(frozen=True)
class _Decision:
    """What was known when a round was decided, whatever has come in since."""

    view: View
    num_calls: int
    """Examples that the rounds up to it scored."""
    is_empty: bool
    """Whether the round had no candidates."""


class Search:
    """OPRO rounds over racing candidates.

    Args:
        plan: Sizes and limits.
        student: Candidate number zero.
        pruner: Who leaves a race, and when.
        recombine: Gives one more candidate's instructions out of the trajectory, or None.
    """

    def __init__(
        self,
        plan: Plan,
        student: Candidate,
        pruner: Pruner,
        recombine: Callable[[Trajectory, int], Mapping[str, str] | None] | None = None,
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
        self.demo_sets: dict[int, Mapping[str, str]] = {}
        """Number of a demo set -> predictor name -> its demos, as text."""
        self._recombine = recombine
        self._events: list[Event] = []
        self._queue: list[tuple[tuple[int, int, int], Work]] = []
        self._num_queued = 0
        self._rounds: list[_Round] = []  # undecided ones, in order
        self._next_round = 1
        self._recent: dict[
            int, _Round
        ] = {}  # number -> round, decided or not: what the next ones may look at
        self._decisions: dict[int, _Decision] = {}  # number of a round -> its decision; -1 before any
        self._as_of = -1  # the decision that the next round builds on
        self._known: set[str] = set()
        self._missing: dict[tuple[str, Split], int] = {}  # examples handed out and not yet answered
        self._outcomes: dict[tuple[str, Split], list[Outcome | None]] = {}
        self._is_cut_short = False
        self._start()

    # -- the outside: next, tell, events ---------------------------------------------------------

    def next(self) -> Work | None:
        """The most urgent piece of work, or None while everything open waits for results."""
        return heapq.heappop(self._queue)[1] if self._queue else None

    @property
    def done(self) -> bool:
        return self.stop_reason is not None

    def stop(self, reason: str) -> None:
        """End the search from outside: nothing more is handed out; results under way may still be told."""
        if self.stop_reason is None:
            self._end(reason)
            self._is_cut_short = True

    def _end(self, reason: str) -> None:
        self.stop_reason = reason
        self._queue.clear()

    def salvage(self) -> None:
        """After a `stop` from outside, once all results are told: what is scored in full counts."""
        if not self._is_cut_short:
            return
        for current in self._rounds:
            if current.candidates is None:
                self._make_do(current)
            completed = [c for c in current.alive.values() if self._is_measured(current, c)]
            if current.number == 0 and not completed:
                break  # without the student's score nothing can be compared
            if completed or current.trials:
                self._show(current)
                self._add(current, completed)
        self._rounds.clear()

    def _make_do(self, current: _Round) -> None:
        """The candidates of a round that others are missing of: those that are scored in full already."""
        early = {
            c.id: c for _, c in sorted(current.early.items()) if c is not None and c.id not in self._known
        }
        current.alive = {id_: c for id_, c in early.items() if self._is_measured(current, c)}
        current.candidates = list(current.alive.values())
        self._known.update(current.alive)

    def _is_measured(self, current: _Round, candidate: Candidate) -> bool:
        """Whether nothing is missing that a decision on the candidate would read."""
        outcomes = self._outcomes[candidate.id, "train"]
        in_full = len(outcomes) == self.plan.num_train and self._complete(candidate)
        if self.plan.num_val == 0 or not in_full:
            return in_full
        return current.validating is not None and self._complete(current.validating, "val")

    def events(self) -> list[Event]:
        """What happened since the last call."""
        happened, self._events = self._events, []
        return happened

    def tell_proposal(self, ask: Ask, proposal: Proposal) -> None:
        """The answer to an `Ask`."""
        current = next((r for r in self._rounds if r.number == ask.round), None)
        if self.done or current is None:
            return
        if ask.is_for_demos:
            current.demos[ask.slot] = proposal.texts
        else:
            current.texts.setdefault(ask.slot, {}).update(proposal.texts)
        current.problems.extend((ask.slot, problem) for problem in proposal.problems)
        if proposal.error is not None:
            current.problems.append((ask.slot, proposal.error))
            current.num_errors += 1
        current.waiting -= 1
        self._advance()

    def tell_block(self, block: Block, outcomes: Sequence[Outcome]) -> None:
        """The outcomes of a block, in the order of its positions."""
        key = (block.candidate.id, block.split)
        if key not in self._outcomes:
            return
        self._outcomes[key][block.start : block.stop] = outcomes
        self._missing[key] -= block.stop - block.start
        if not self.done:
            self._advance()

    # -- scheduling ------------------------------------------------------------------------------

    def _push(self, urgency: int, round: int, work: Work) -> None:
        self._num_queued += 1
        heapq.heappush(self._queue, ((urgency, round, self._num_queued), work))

    def _schedule(self, current: _Round, candidate: Candidate, split: Split, stop: int) -> None:
        """Hand out what is still missing of a candidate's first `stop` examples."""
        key = (candidate.id, split)
        outcomes = self._outcomes.setdefault(key, [])
        start = len(outcomes)
        outcomes.extend([None] * (stop - start))
        self._missing[key] = self._missing.get(key, 0) + len(outcomes) - start
        while start < stop:
            end = min(start + self.plan.block_size, stop)
            self._push(1, current.number, Block(candidate, current.number, split, start, end))
            start = end

    def _complete(self, candidate: Candidate, split: Split = "train") -> bool:
        return self._missing.get((candidate.id, split), 0) == 0

    def _scores(self, candidate: Candidate, split: Split = "train") -> list[float]:
        return [o.score for o in self._outcomes[candidate.id, split] if o is not None]

    def _start(self) -> None:
        view = View(Trajectory(), self.student, [None] * self.plan.num_train)
        first = _Round(0, view, 1, self.plan.num_train + self.plan.num_val)
        self._rounds.append(first)
        self._recent[0] = first
        self._decisions[-1] = _Decision(view, 0, False)
        self._enter(first, [self.student])
        if self.plan.num_val:
            self._validate(first, self.student)
        self._open_rounds()

    def _open_rounds(self) -> None:
        """Ask for the proposals of every round that may be under way now.

        A round builds on the decision `lag` rounds before its predecessor and on what the rounds in between stood
        at when each was one checkpoint further than the next: never on what else happens to be known.
        """
        plan = self.plan
        while plan.num_rounds is None or self._next_round <= plan.num_rounds:
            number = self._next_round
            blind = (
                number == 1 and plan.lag > 1
            )  # of many rounds the first need not wait for the student's score
            self._as_of = max(self._as_of, number - 1 - plan.lag, -1 if blind else 0)
            between = range(self._as_of + 1, number)
            if self._as_of not in self._decisions or not all(map(self._has_stood, between)):
                return
            decision = self._decisions[self._as_of]
            size = 0 if decision.is_empty else self._affordable(decision, between)
            if size:
                opened = _Round(number, self._view(decision, between), size, self.most_calls(size))
                self._rounds.append(opened)
                self._recent[number] = opened
                self._next_round += 1
                self._ask(opened, range(size))
            elif between:
                self._as_of += 1  # the next decision may give back funds, or have candidates
            else:
                return

    def _num_passed(self, number: int) -> int:
        """The checkpoints of a round that the next one to open knows of.

        With a lag of 1 proposals are asked for while the tail of the race before runs; with more while others are
        still being written.
        """
        return self._next_round - number - (self.plan.lag > 1)

    def _has_stood(self, number: int) -> bool:
        current = self._recent[number]
        return current.is_raced or len(current.standings) >= self._num_passed(number)

    def _view(self, decision: _Decision, between: Sequence[int]) -> View:
        standings = [self._recent[number].standings[: self._num_passed(number)][-1:] for number in between]
        trials = [trial for rows in standings for row in rows for trial in row]
        view = decision.view
        return replace(view, trajectory=view.trajectory.add(*trials)) if trials else view

    @property
    def _recombines(self) -> bool:
        return self._recombine is not None and len(self.student.instructions) > 1

    def most_calls(self, num_candidates: int) -> int:
        """Examples that a round of so many proposed candidates scores at most."""
        num_candidates += self._recombines
        return self.pruner.most_calls(self.plan.num_train, num_candidates) + self.plan.num_val

    def _affordable(self, decision: _Decision, between: Sequence[int]) -> int:
        """How many candidates the next round can have; 0 for none now."""
        plan, wanted = self.plan, self.plan.num_candidates
        if plan.num_trials is not None:
            wanted = max(0, min(wanted, plan.num_trials - (self._next_round - 1) * wanted))
        if plan.max_metric_calls is None:
            return wanted
        reserved = sum(self._recent[number].reserved for number in between)
        left = plan.max_metric_calls - decision.num_calls - reserved
        # While other rounds hold funds that they may give back, a round smaller than half can wait for them.
        smallest = (wanted + 1) // 2 if between else 1
        sizes = range(wanted, smallest - 1, -1)
        return next((size for size in sizes if self.most_calls(size) <= left), 0)

    def _ask(self, current: _Round, slots: Sequence[int]) -> None:
        for slot in slots:
            if current.number == 1 and current.wave == 0 and slot < self.plan.num_demo_sets:
                current.waiting += 1
                names = tuple(self.student.instructions)
                self._push(0, 1, Ask(1, slot, 0, names, current.view, is_for_demos=True))
                continue
            for predictors in self._calls(current.number, slot):
                current.waiting += 1
                ask = Ask(current.number, slot, current.wave, predictors, current.view)
                self._push(0, current.number, ask)

    def _calls(self, round: int, slot: int) -> Iterator[tuple[str, ...]]:
        """The proposer calls that one candidate takes: the predictors that each of them rewrites."""
        names = tuple(self.student.instructions)
        if self.plan.predictor_strategy == "joint":
            yield names
        elif self.plan.predictor_strategy == "round_robin":
            yield (names[(round - 1) % len(names)],)
        elif slot % 2 == 0:  # every other candidate rewrites all predictors,
            yield from ((name,) for name in names)
        else:  # the others one each in turn, so that a gain can be traced to its predictor
            yield (names[(slot // 2 + round) % len(names)],)

    # -- progress --------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Take every decision whose results are all there."""
        while not self.done:
            for current in self._rounds:
                if current.candidates is None and not (current.waiting == 0 and self._resolve(current)):
                    self._score_early(current)
                    break  # rounds become known in order, so that duplicates are dropped alike in every run
            moved = [self._race(current) for current in self._racing()]
            if any(moved):
                self._open_rounds()
            if not (self._rounds and self._decide(self._rounds[0])) and not any(moved):
                return

    def _racing(self) -> Sequence[_Round]:
        """The rounds whose races may move on: later ones too, unless the pruner depends on the order of races."""
        independent = getattr(self.pruner, "independent", False) and len(self.trajectory) > 0
        return tuple(self._rounds) if independent else self._rounds[:1]

    def _score_early(self, current: _Round) -> None:
        """Hand out the first examples of candidates whose round still waits for the answers to others.

        Every candidate is scored on them, so nothing is scored that would not be, only earlier.
        """
        for slot, texts in current.texts.items():
            asked = (name for names in self._calls(current.number, slot) for name in names)
            if slot in current.early or not all(name in texts for name in asked):
                continue
            candidate = current.early[slot] = self._candidate(current, texts, self._demo_set(current, slot))
            if candidate is not None and candidate.id not in self._known:
                sizes = range(1, current.num_candidates + self._recombines + 1)
                first = min(self._checkpoints(size)[0] for size in sizes)
                self._schedule(current, candidate, "train", first)

    def _resolve(self, current: _Round) -> bool:
        """Turn a wave of proposals into candidates; False where another wave was asked for."""
        fresh: dict[str, Candidate] = {}
        unused = []
        for slot in range(current.num_candidates):
            if slot in current.demos:
                candidate = self._demonstrated(current, slot)
            else:
                candidate = self._candidate(
                    current, current.texts.get(slot, {}), self._demo_set(current, slot)
                )
            if candidate is None or candidate.id in self._known or candidate.id in fresh:
                unused.append(slot)
                if current.texts.get(slot):
                    current.problems.append((slot, "duplicate"))
                current.texts.pop(slot, None)
                current.early.pop(slot, None)
                current.demos.pop(slot, None)
            else:
                fresh[candidate.id] = candidate
        current.wave += 1
        if unused and current.wave < self.plan.max_waves:
            self._ask(current, unused)
            return False
        limit = self.plan.num_trials
        has_room = limit is None or len(self._known) - 1 + len(fresh) < limit
        if self._recombine is not None and self._recombines and has_room:
            texts = self._recombine(current.view.trajectory, self.plan.seed + current.number)
            mixed = self._candidate(current, texts or {}, current.view.base.demo_set)
            if mixed is not None and mixed.id not in self._known:
                fresh.setdefault(mixed.id, mixed)
        self._enter(current, list(fresh.values()))
        return True

    def _demonstrated(self, current: _Round, slot: int) -> Candidate | None:
        """The base with a set of demos that no other slot has."""
        demos, base = current.demos[slot], current.view.base
        if not demos or any(demos == known for number, known in self.demo_sets.items() if number != slot):
            return None
        self.demo_sets[slot] = demos
        return Candidate(base.instructions, current.number, base.id, (), slot)

    def _demo_set(self, current: _Round, slot: int) -> int | None:
        """The demos that a slot's new text is tried with: every other time not the base's, but any set's."""
        if current.number == 1 or not self.demo_sets or slot % 2 == 0:
            return current.view.base.demo_set
        generator = rng(self.plan.seed, "demo set", current.number, slot)
        return generator.choice([None, *sorted(self.demo_sets)])

    def _candidate(self, current: _Round, texts: Mapping[str, str], demo_set: int | None) -> Candidate | None:
        base = current.view.base
        changed = {
            name: texts[name] for name, old in base.instructions.items() if texts.get(name, old) != old
        }
        if not changed:
            return None
        instructions = {**base.instructions, **changed}
        return Candidate(instructions, current.number, base.id, tuple(changed), demo_set)

    def _enter(self, current: _Round, candidates: list[Candidate]) -> None:
        """The candidates are known: hand out the examples up to the first checkpoint."""
        current.candidates = candidates
        current.alive = {c.id: c for c in candidates}
        self._known.update(current.alive)
        current.checkpoints = self._checkpoints(len(candidates)) if current.number else [self.plan.num_train]
        current.scheduled += len(candidates) * current.checkpoints[0]
        for candidate in candidates:
            self._schedule(current, candidate, "train", current.checkpoints[0])

    def _checkpoints(self, num_candidates: int) -> list[int]:
        last = self.plan.num_train
        ends = list(self.pruner.checkpoints(last, max(1, num_candidates)))
        if ends != sorted({*ends, last}) or ends[0] < 1 or ends[-1] != last:
            raise ValueError(
                f"A pruner's checkpoints must ascend from at least 1 and end with all {last} examples, "
                f"but {type(self.pruner).__name__} gave {ends}."
            )
        return ends

    def _race(self, current: _Round) -> bool:
        """Take a round's race past one checkpoint; False where results are missing, or it is over."""
        if current.candidates is None or current.is_raced:
            return False
        if not all(self._complete(c) for c in current.alive.values()):
            return False
        if current.number > 0:
            self._cut(current)
            current.standings.append(self._standing(current))
        if current.alive and current.stage + 1 < len(current.checkpoints):
            current.stage += 1
            start, stop = current.checkpoints[current.stage - 1 : current.stage + 1]
            current.scheduled += len(current.alive) * (stop - start)
            for candidate in current.alive.values():
                self._schedule(current, candidate, "train", stop)
        else:
            current.is_raced = True
        return True

    def _decide(self, current: _Round) -> bool:
        """Move the oldest undecided round on towards its end; False where results are missing."""
        if current.candidates is None:
            return False
        self._show(current)
        if not current.is_raced:
            return False
        if current.validating is not None:
            if self._complete(current.validating, "val"):
                self._close(current)
                return True
            return False
        return self._settle(current)

    def _show(self, current: _Round) -> None:
        """Tell of the candidates once their round is next to be decided: a run that ends before has none of them."""
        if current.is_proposed or current.candidates is None:
            return
        current.is_proposed = True
        problems = tuple(problem for _, problem in sorted(current.problems))
        self.problems = (self.problems + list(problems))[:1000]
        self._events.append(Proposed(current.number, tuple(current.candidates), problems))
        self._events.extend(current.events)

    def _emit(self, current: _Round, event: Event) -> None:
        """Tell of it now, or once the round's candidates are told of: the order of events is that of the rounds."""
        (self._events if current.is_proposed else current.events).append(event)

    def _reference(self, current: _Round) -> Trial:
        """What a round's candidates are compared with: the incumbent of the time when they were asked for.

        A fixed choice, so that rounds can race at the same time and still take the same decisions in every run.
        """
        known = current.view.trajectory
        return known.incumbent if len(known) else self.trajectory.trials[0]

    def _cut(self, current: _Round) -> None:
        """One checkpoint: report everyone, let the pruner say who leaves."""
        if not current.alive:
            return
        reference = self._reference(current)
        scores = {c.id: self._scores(c) for c in current.alive.values()}
        seen = [s for row in (reference.scores, *scores.values()) for s in row]
        bounded = current.view.trajectory.score_range == (0.0, 1.0) and all(0.0 <= s <= 1.0 for s in seen)
        race = Race(reference.scores, scores, len(current.candidates or ()), bounded)
        for candidate in current.alive.values():
            reward = reference.reward + race.difference(candidate.id)
            self._emit(current, Reported(candidate, race.num_scored, reward))
        for id_, reason in self.pruner.drop(race).items():
            if race.num_scored < race.num_examples:
                self._finish(current, current.alive.pop(id_), "pruned", reason)

    def _settle(self, current: _Round) -> bool:
        """Every race of the round is over: validate a new incumbent, or close the round."""
        if current.number == 0:  # the student, without a valset
            self._close(current)
            return True
        rewards = {c.id: mean(self._scores(c)) for c in current.alive.values()}
        leader = max(rewards, key=lambda c: rewards[c], default=None)
        is_new = leader is not None and rewards[leader] > self.trajectory.incumbent.reward
        if leader is not None and is_new and self.plan.num_val:
            self._validate(current, current.alive[leader])
            return True
        self._close(current)
        return True

    def _validate(self, current: _Round, candidate: Candidate) -> None:
        current.validating = candidate
        current.scheduled += self.plan.num_val
        self._schedule(current, candidate, "val", self.plan.num_val)

    def _finish(
        self, current: _Round, candidate: Candidate, state: Literal["complete", "pruned"], reason: str
    ) -> None:
        trial = current.trials[candidate.id] = self._trial(current, candidate, state, reason)
        self._emit(current, Finished(trial))
        if state == "pruned":
            self._forget(candidate)

    def _trial(
        self, current: _Round, candidate: Candidate, state: Literal["complete", "pruned"], reason: str
    ) -> Trial:
        scores = self._scores(candidate)
        if state == "complete":
            reward = mean(scores)
        else:
            reference = self._reference(current)
            reward = reference.reward + paired_difference(scores, reference.scores)
        validated = current.validating is not None and current.validating.id == candidate.id
        valset_score = mean(self._scores(candidate, "val")) if validated else None
        outcomes = self._outcomes[candidate.id, "train"]
        failures = sum(o is not None and o.error is not None for o in outcomes)
        return Trial(candidate, reward, len(scores), state, reason, valset_score, failures, to_array(scores))

    def _standing(self, current: _Round) -> tuple[Trial, ...]:
        """A round's trials at a checkpoint, as if those that still race ended there."""
        return tuple(
            current.trials.get(c.id) or self._trial(current, c, "pruned", "still racing")
            for c in current.candidates or ()
        )

    def _forget(self, candidate: Candidate) -> None:
        for split in ("train", "val"):
            self._outcomes.pop((candidate.id, split), None)
            self._missing.pop((candidate.id, split), None)

    def _close(self, current: _Round) -> None:
        before = self.trajectory.incumbent if len(self.trajectory) else None
        self._add(current, current.alive.values())
        incumbent = self.trajectory.incumbent
        for candidate in (*current.alive.values(), *((before.candidate,) if before else ())):
            if candidate.id != incumbent.id:
                self._forget(candidate)  # only the incumbent's predictions are shown again
        self._rounds.pop(0)
        self._remember(current)
        self._events.append(Decided(current.number, self.trajectory.best, self.best_scores[-1]))
        state = RunState(current.number, self.trajectory, tuple(self.best_scores), Usage(), 0.0)
        reason = self.stop_rule(state)
        if reason is not None:
            self._end(reason)
        elif self.plan.num_rounds is not None and current.number >= self.plan.num_rounds:
            self._end("num_rounds")
        else:
            self._open_rounds()
            if not self._rounds:
                self._end(self._why_none(current))

    def _remember(self, current: _Round) -> None:
        """Keep what later rounds build on once this one is decided, and nothing older than they may look at."""
        base = self.trajectory.incumbent.candidate
        view = View(self.trajectory, base, tuple(self._outcomes[base.id, "train"]))
        num_calls = self._decisions[current.number - 1].num_calls + current.scheduled
        self._decisions[current.number] = _Decision(view, num_calls, not current.candidates)
        self._decisions.pop(current.number - self.plan.lag - 2, None)
        self._recent.pop(current.number - self.plan.lag - 2, None)

    def _why_none(self, last: _Round) -> str:
        """Why no round is under way and none could be opened."""
        if last.candidates:
            return "max_metric_calls"
        failed = last.num_errors and last.num_errors == len(last.problems)
        return "proposer_failed" if failed else "no_new_proposals"

    def _add(self, current: _Round, completed: Iterable[Candidate]) -> None:
        """Put a round's trials into the trajectory."""
        for candidate in completed:
            self._finish(current, candidate, "complete", "scored in full")
        trials = [current.trials[c.id] for c in current.candidates or () if c.id in current.trials]
        self.trajectory = self.trajectory.add(*trials)
        best = self.trajectory.best
        self.best_scores.append(best.reward if best.valset_score is None else best.valset_score)
