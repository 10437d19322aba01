"""What never changes in a search: its arguments, and the answers that follow from them alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from dspy_opro.racing import Pruner
from dspy_opro.trajectory import Candidate, Trajectory
from dspy_opro.work import Plan

Recombine = Callable[[Trajectory, int], "Mapping[str, str] | None"]
"""Gives one more candidate's instructions out of the trajectory and a seed, or None."""


@dataclass(frozen=True)
class Rules:
    plan: Plan
    student: Candidate
    pruner: Pruner
    recombine: Recombine | None = None

    @property
    def recombines(self) -> bool:
        """Whether a round may have one candidate more than it has slots."""
        return self.recombine is not None and len(self.student.instructions) > 1

    def calls(self, round: int, slot: int) -> Iterator[tuple[str, ...]]:
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

    def checkpoints(self, num_candidates: int) -> list[int]:
        """The numbers of examples after which a round of so many candidates decides who leaves."""
        last = self.plan.num_train
        ends = list(self.pruner.checkpoints(last, max(1, num_candidates)))
        if ends != sorted({*ends, last}) or ends[0] < 1 or ends[-1] != last:
            raise ValueError(
                f"A pruner's checkpoints must ascend from at least 1 and end with all {last} examples, "
                f"but {type(self.pruner).__name__} gave {ends}."
            )
        return ends

    def most_calls(self, num_slots: int) -> int:
        """Examples that a round of so many proposed candidates scores at most."""
        num_candidates = num_slots + self.recombines
        return self.pruner.most_calls(self.plan.num_train, num_candidates) + self.plan.num_val

    def most_candidates(self, round: int) -> int:
        """How many candidates a round may propose as far as the number of trials goes."""
        size, limit = self.plan.num_candidates, self.plan.num_trials
        return size if limit is None else max(0, min(size, limit - (round - 1) * size))
