"""When failed examples end a run. One is data; `max_errors` of them, or whole rounds of nothing else, are an error."""

from __future__ import annotations

from dspy_opro.search.tasks import RoundDecided, ScoringTask, Task, TaskResult, TrialFinished
from dspy_opro.search.trajectory import Outcome, Trial

from .evaluator import MetricRaised, in_brief
from .metric import MetricError

NUM_DEAD = 4
"""Candidates in a row that fail on every example and are taken for a broken program or LM."""
NUM_FIRST = 3
"""Examples on which the student may fail before the run ends at its start."""


class TooManyErrors(RuntimeError):
    """The program failed on `max_errors` examples, or on everything for a while. The first failure is the cause."""


class FailureLimit:
    """The failed examples of this process.

    Args:
        max_errors: Failed examples that end the run, or None for the rule over whole rounds.
        num_in_dead_rounds: Failures in rounds of nothing else that end a run where `max_errors` is None.
    """

    def __init__(self, max_errors: int | None, num_in_dead_rounds: int) -> None:
        self._max_errors = max_errors
        self._num_in_dead_rounds = num_in_dead_rounds
        self._num_failures = 0
        self._failed: set[str] = set()  # ids of candidates with a failure in this process
        self._finished: list[Trial] = []  # trials since the last round was decided
        self._dead: list[Trial] = []  # trials of the last rounds in which every example failed
        self._first_error: Exception | None = None

    def count(self, task: Task, result: TaskResult) -> None:
        """A result has come in.

        Raises:
            TooManyErrors: It was the last of `max_errors`.
        """
        outcome = result.content
        if not isinstance(task, ScoringTask) or not isinstance(outcome, Outcome) or outcome.error is None:
            return
        self._num_failures += 1
        self._first_error = self._first_error or result.error
        self._failed.add(task.candidate.id)
        if self._max_errors is not None and self._num_failures >= self._max_errors:
            raise self._too_many(f"on {self._num_failures} examples (max_errors={self._max_errors})")

    def finished(self, event: TrialFinished) -> None:
        self._finished.append(event.trial)

    def decided(self, event: RoundDecided) -> None:
        """A round is over: end the run where nothing works any more and `max_errors` is not given.

        Single failures are data, and so is a candidate that fails on everything: instructions break formats. But when
        whole rounds fail, the cause is elsewhere. The rule is the same whatever the order of arrival.

        Raises:
            TooManyErrors: Not one example succeeded in the last rounds, of `NUM_DEAD` candidates or more.
        """
        trials, self._finished = self._finished, []
        if any(t.num_failures < t.num_scored for t in trials):
            self._dead.clear()
        else:
            self._dead.extend(trials)
        failures = sum(t.num_failures for t in self._dead)
        is_over = len(self._dead) >= NUM_DEAD and failures >= self._num_in_dead_rounds
        # Failures of an earlier process may have had a cause that is gone.
        if self._max_errors is None and is_over and any(t.id in self._failed for t in self._dead):
            raise self._too_many(
                f"on each of the last {failures} examples, under {len(self._dead)} candidates"
            )

    def _too_many(self, where: str) -> TooManyErrors:
        error = TooManyErrors(f"The program failed {where}. First cause: {in_brief(self._first_error)}")
        error.__cause__ = self._first_error
        return error


class FirstExamples:
    """The student runs on one example alone at first, so that a broken metric or program ends the run at no cost.

    A program may fail on single examples: after a failure the next example is tried, `NUM_FIRST` at most.

    Args:
        num_train: Train examples there are.
    """

    def __init__(self, num_train: int) -> None:
        self._num_left = min(NUM_FIRST, num_train)
        self._first_error: Exception | None = None

    def passes(self, result: TaskResult) -> bool:
        """Whether the run may go on with everything else.

        Raises:
            MetricError: The metric raised.
            TooManyErrors: The program failed on each of the examples.
        """
        if result.error is None:
            return True
        if isinstance(result.error, MetricRaised):
            raise MetricError(str(result.error)) from result.error.__cause__
        self._num_left -= 1
        self._first_error = self._first_error or result.error
        if not self._num_left:
            brief = in_brief(self._first_error)
            raise TooManyErrors(
                f"The student fails on every example tried. First cause: {brief}"
            ) from self._first_error
        return False
