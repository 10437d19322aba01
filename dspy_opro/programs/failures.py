"""When failed examples end a run: after `max_errors` of them, or after whole rounds in which every example failed."""

from __future__ import annotations

from dspy_opro.search.tasks import RoundDecided, ScoringTask, Task, TaskResult, TrialFinished
from dspy_opro.search.trajectory import Outcome, Trial

from .evaluator import MetricRaised, in_brief
from .metric import MetricError

NUM_DEAD = 4
"""If so many candidates in a row fail on every example, the program or the LM is broken."""
NUM_FIRST = 3
"""If the student fails on so many examples at the start, the run ends."""


class TooManyErrors(RuntimeError):
    """The program failed on `max_errors` examples, or on every example for a while. The first error is the cause."""


class ProposerFailed(RuntimeError):
    """The optimizer LM can't be called, or every proposal failed. The first error is the cause."""


_PERMANENT = frozenset({"LMAuthError", "LMBillingError", "LMNotConfiguredError", "LMUnsupportedModelError"})
_PERMANENT_STATUS = frozenset({401, 402, 403, 404})


def is_permanent(error: BaseException | None) -> bool:
    """Whether no call of this LM can work: a wrong or missing key, an unknown model, an account without money.

    DSPy 3.0 to 3.2 raise LiteLLM's errors, later versions their own.
    """
    while error is not None:
        if type(error).__module__.partition(".")[0] in ("dspy", "litellm", "openai"):
            status = getattr(error, "status_code", None) or getattr(error, "status", None)
            is_named = type(error).__name__ in _PERMANENT or "LLM Provider NOT provided" in str(error)
            if is_named or status in _PERMANENT_STATUS:
                return True
        error = error.__cause__ or error.__context__
    return False


class FailureLimit:
    """Counts the failed examples of this process.

    `max_errors` failed examples end the run. If it is None, `num_in_dead_rounds` failures end the run, if they are
    all examples of whole rounds.
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
        """Count a result.

        Raises:
            TooManyErrors: `max_errors` examples have failed.
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
        """Without `max_errors`, end the run if the last rounds have only failures.

        A candidate may fail on every example, because an instruction can break the output format. If whole rounds
        fail, the cause is elsewhere. The rule does not depend on the order in which results arrive.

        Raises:
            TooManyErrors: No example succeeded in the last rounds, which have at least `NUM_DEAD` candidates.
        """
        trials, self._finished = self._finished, []
        if any(t.num_failures < t.num_scored for t in trials):
            self._dead.clear()
        else:
            self._dead.extend(trials)
        failures = sum(t.num_failures for t in self._dead)
        is_over = len(self._dead) >= NUM_DEAD and failures >= self._num_in_dead_rounds
        # The cause of failures in an earlier process may be gone.
        if self._max_errors is None and is_over and any(t.id in self._failed for t in self._dead):
            raise self._too_many(
                f"on each of the last {failures} examples, under {len(self._dead)} candidates"
            )

    def _too_many(self, where: str) -> TooManyErrors:
        error = TooManyErrors(f"The program failed {where}. First cause: {in_brief(self._first_error)}")
        error.__cause__ = self._first_error
        return error


class FirstExamples:
    """The run first scores the student on one example alone, so a broken metric or program costs almost nothing.

    A program may fail on single examples. After a failure the run tries the next example, at most `NUM_FIRST`.
    """

    def __init__(self, num_train: int) -> None:
        self._num_left = min(NUM_FIRST, num_train)
        self._first_error: Exception | None = None

    def passes(self, result: TaskResult) -> bool:
        """Whether the result lets the run start with all other tasks.

        Raises:
            MetricError: The metric raised an error.
            TooManyErrors: The program failed on every example so far, and there is no further attempt.
        """
        if result.error is None:
            return True
        if isinstance(result.error, MetricRaised):
            raise MetricError(str(result.error)) from result.error.__cause__
        self._num_left = 0 if is_permanent(result.error) else self._num_left - 1
        self._first_error = self._first_error or result.error
        if not self._num_left:
            message = f"The student fails on every example tried. First cause: {in_brief(self._first_error)}"
            raise TooManyErrors(message) from self._first_error
        return False
