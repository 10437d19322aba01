"""What the rounds of a search share: its rules, what was tried already, and the outcomes of the examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from numbers import Integral

from .order import RaceOrder
from .pruners import Pruner, Race
from .tasks import Failure, Plan, ProposalTask, ScoringTask, Split, Task
from .trajectory import Candidate, Outcome, Trajectory, Usage, as_counted, lowest_success, mean

SPLITS: tuple[Split, ...] = ("train", "val", "unseen")

Recombine = Callable[[Trajectory, int], "Mapping[str, str] | None"]
"""Gives one more candidate's instructions out of the trajectory and a seed, or None."""


@dataclass(frozen=True)
class Rules:
    """What never changes in a search: its arguments, and the answers that follow from them alone."""

    plan: Plan
    student: Candidate
    pruner: Pruner
    recombine: Recombine | None = None

    @property
    def recombines(self) -> bool:
        """Whether a round may have one candidate more than it has slots."""
        return self.recombine is not None and len(self.student.instructions) > 1

    def rewrites(self, round: int, slot: int) -> Iterator[tuple[str, ...]]:
        """The calls of the proposer that one candidate takes: the predictors that each of them rewrites."""
        names = tuple(self.student.instructions)
        if self.plan.predictor_strategy == "joint":
            yield names
        elif self.plan.predictor_strategy == "round_robin":
            yield (names[(round - 1) % len(names)],)
        elif slot % 2 == 0:  # every other candidate rewrites all predictors,
            yield from ((name,) for name in names)
        else:  # the others rewrite one predictor each in turn, so that a gain can be traced to it
            yield (names[(slot // 2 + round) % len(names)],)

    def checkpoints(self, num_candidates: int) -> list[int]:
        """The numbers of examples after which a round of so many candidates decides who leaves."""
        last = self.plan.num_train
        ends = list(self.pruner.checkpoints(last, max(1, num_candidates)))
        are_whole = all(isinstance(end, Integral) for end in ends)
        if not are_whole or ends != sorted({*ends, last}) or ends[0] < 1 or ends[-1] != last:
            raise ValueError(
                f"A pruner's checkpoints are whole numbers that must ascend from at least 1 and end with all {last} "
                f"examples, but {type(self.pruner).__name__} gave {ends}."
            )
        return list(map(int, ends))

    def drop(self, race: Race) -> Mapping[str, str]:
        """Id of a candidate -> the reason why it leaves now."""
        dropped: object = self.pruner.drop(race)
        if not (
            isinstance(dropped, Mapping)
            and dropped.keys() <= race.scores.keys()
            and all(isinstance(reason, str) for reason in dropped.values())
        ):
            raise TypeError(
                "A pruner's drop must return a mapping from ids in race.scores to reasons, "
                f"but {type(self.pruner).__name__} returned {dropped!r}."
            )
        return dropped

    def sure_to_go_on(self, race: Race, num_examples: int) -> Collection[str]:
        """Ids of candidates that the pruner keeps after so many examples, whatever the scores are that are missing."""
        ask = getattr(self.pruner, "sure_to_go_on", None)
        named = None if ask is None else ask(race, num_examples)
        return frozenset(named or ())

    def check_bound(self, num_scored: int, num_candidates: int) -> None:
        """Raise an error rather than exceed the budget because of a pruner that counts wrongly."""
        most = self.pruner.most_calls(self.plan.num_train, num_candidates)
        if self.plan.max_metric_calls is not None and num_scored > most:
            raise ValueError(
                f"A pruner's most_calls must be an upper bound, but {type(self.pruner).__name__} gave {most} for a "
                f"round of {num_candidates} candidates, which scores {num_scored} examples or more."
            )

    @property
    def is_independent(self) -> bool:
        """Whether the pruner decides on each round alone, so that rounds may race at the same time."""
        return getattr(self.pruner, "independent", False)

    def order(self, trajectory: Trajectory) -> RaceOrder:
        """The order of a round's race. A pruner that compares rounds sees the same examples in each of them."""
        if self.is_independent:
            return RaceOrder.contested_first(trajectory, self.plan.num_train)
        return RaceOrder.fixed(self.plan.num_train)

    def most_calls(self, num_slots: int) -> int:
        """Examples that a round of so many proposed candidates scores at most."""
        num_candidates = num_slots + self.recombines
        return self.pruner.most_calls(self.plan.num_train, num_candidates) + self.plan.num_val

    def most_demo_calls(self, round: int) -> int:
        """Examples that making the demo sets of a round tries at most."""
        return self.plan.max_demo_calls if round == 1 else 0

    def most_candidates(self, round: int) -> int:
        """How many candidates a round may propose as far as the number of trials goes."""
        size, limit = self.plan.num_candidates, self.plan.num_trials
        return size if limit is None else max(0, min(size, limit - (round - 1) * size))


@dataclass
class Tried:
    """What was tried in all rounds, so that nothing is tried twice."""

    ids: set[str]
    """Of the candidates of every round that is known, the student included."""
    demo_sets: dict[int, Mapping[str, str]] = field(default_factory=dict)
    """Number of a demo set -> predictor name -> its demos, as JSON text."""


class Worklist:
    """Tasks that nobody took yet, and the outcomes of every candidate that is not forgotten.

    No example of a candidate is handed out twice. If a metric has negative scores, a failed example counts no more than
    the worst example of the student that did not fail.
    """

    def __init__(self, student: Candidate) -> None:
        self._student: tuple[str, Split] = (student.id, "train")
        self._lowest = math.inf  # the student's lowest success, once all its train examples are told
        self._new: list[Task] = []
        self._outcomes: dict[
            tuple[str, Split], dict[int, Outcome | None]
        ] = {}  # by position; None until told
        self._usages: dict[tuple[str, Split], dict[int, Usage]] = {}  # position -> what the example cost
        self._missing: dict[tuple[str, Split], int] = {}  # examples handed out and not yet told

    def next_tasks(self) -> list[Task]:
        tasks, self._new = self._new, []
        return tasks

    def clear(self, kept: Split | None = None) -> None:
        """Drop the new tasks, except for those on the examples of one split."""
        self._new = [task for task in self._new if isinstance(task, ScoringTask) and task.split == kept]

    def ask(self, task: ProposalTask) -> None:
        self._new.append(task)

    def score(self, candidate: Candidate, round: int, split: Split, positions: Iterable[int]) -> None:
        """Hand out what is still missing of a candidate's examples at these positions."""
        key = (candidate.id, split)
        outcomes = self._outcomes.setdefault(key, {})
        new = [position for position in positions if position not in outcomes]
        outcomes.update(dict.fromkeys(new))
        self._missing[key] = self._missing.get(key, 0) + len(new)
        self._new.extend(ScoringTask(candidate, round, split, position) for position in new)

    def tell(self, task: ScoringTask, outcome: Outcome, usage: Usage) -> bool:
        """Take in an outcome.

        Returns:
            Whether a decision may follow: all that was handed out of this candidate and split is told.
        """
        key = (task.candidate.id, task.split)
        if key not in self._outcomes:  # the candidate is forgotten
            return False
        self._outcomes[key][task.position] = as_counted(outcome, self._lowest)
        self._usages.setdefault(key, {})[task.position] = usage
        self._missing[key] -= 1
        if key == self._student and self._missing[key] == 0:
            self._count_failures(lowest_success(self._outcomes[key].values()))
        return self._missing[key] == 0

    def _count_failures(self, lowest: float) -> None:
        """From now on no failed example scores more than `lowest`, nor do those that are told."""
        self._lowest = lowest
        for outcomes in self._outcomes.values():
            for position, known in outcomes.items():
                outcomes[position] = None if known is None else as_counted(known, lowest)

    def is_complete(self, candidate: Candidate, split: Split = "train") -> bool:
        """Whether all that was handed out is told."""
        return self._missing.get((candidate.id, split), 0) == 0

    def outcomes(self, candidate: Candidate, split: Split = "train") -> Sequence[Outcome | None]:
        """By position, up to the last one that was handed out; None where there is no outcome yet."""
        known = self._outcomes.get((candidate.id, split), {})
        return [known.get(position) for position in range(max(known, default=-1) + 1)]

    def scores_by_position(
        self, candidate: Candidate, among: Collection[int] | None = None
    ) -> dict[int, float]:
        """Position of a train example -> its score; of all examples, or among the given positions."""
        known = enumerate(self.outcomes(candidate))
        return {p: o.score for p, o in known if o is not None and (among is None or p in among)}

    def scores(self, candidate: Candidate, split: Split = "train") -> list[float]:
        return [o.score for o in self.outcomes(candidate, split) if o is not None]

    def usage(self, candidate: Candidate) -> Usage:
        """What all its examples cost, added in a fixed order."""
        both = (self._usages.get((candidate.id, split), {}) for split in ("train", "val"))
        return sum((usages[position] for usages in both for position in sorted(usages)), Usage())

    def failures(self, candidate: Candidate) -> Iterator[Failure]:
        """Its failed examples, by position in the run's order."""
        for split in ("train", "val"):
            for position, outcome in enumerate(self.outcomes(candidate, split)):
                if outcome is not None and outcome.error is not None:
                    yield Failure(candidate.id, split, position, outcome.error)

    def subscores(self, candidate: Candidate) -> dict[str, float]:
        """Name -> mean over the train examples that have it."""
        values: dict[str, list[float]] = {}
        for outcome in self.outcomes(candidate):
            for name, value in ((outcome and outcome.subscores) or {}).items():
                values.setdefault(name, []).append(value)
        return {name: mean(numbers) for name, numbers in values.items()}

    def forget_predictor_calls(self, candidate: Candidate) -> None:
        """The predictors' calls are shown of the incumbent alone."""
        known = self._outcomes[candidate.id, "train"]
        known |= {
            p: replace(o, calls=None) for p, o in known.items() if o is not None and o.calls is not None
        }

    def keep_only(self, candidate: Candidate, positions: Set[int]) -> None:
        """Forget what a candidate gave on all other train examples."""
        key: tuple[str, Split] = (candidate.id, "train")
        outcomes, usages = self._outcomes.get(key, {}), self._usages.get(key, {})
        for position in outcomes.keys() - positions:
            del outcomes[position]
            usages.pop(position, None)

    def forget(self, candidate: Candidate) -> None:
        for split in SPLITS:
            for kept in (self._outcomes, self._usages, self._missing):
                kept.pop((candidate.id, split), None)
