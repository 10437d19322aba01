"""When failed examples end a run: after `max_errors` of them, or after whole rounds in which every example failed."""

from __future__ import annotations

import logging
import traceback
from collections import Counter
from dataclasses import dataclass

from dspy_opro.search.tasks import Event, RoundDecided, ScoringTask, Task, TaskResult, TrialFinished
from dspy_opro.search.trajectory import Outcome, Trial, Usage

from .errors import in_brief
from .evaluator import MetricRaised
from .metering import Budget
from .metric import MetricError
from .provider import judge

logger = logging.getLogger("dspy_opro")

NUM_DEAD = 4
"""If so many candidates in a row fail on every example, the program or the LM is broken."""
NUM_FIRST = 10
"""If the student fails on all of so many examples at the start, the run ends. Few of them say little: a student that
breaks the output format half of the time fails on three in a row in one of eight runs, and can be optimized.
"""


class TooManyErrors(RuntimeError):
    """The run can't go on. The first error is the cause.

    The program failed on `max_errors` examples, on the first ten, or on every example for a while; examples hang on
    all threads; or the provider was down before the student had a score.
    """


@dataclass(frozen=True)
class TimeLimit:
    """How long one example may take.

    A call can't be cut from outside. After `seconds` its example counts as failed, after twice as long its worker is
    left behind and another one takes the place, as long as no more than `num_threads` are left behind.
    """

    seconds: float
    failed: TaskResult
    """What an example gives that took longer."""


class ProposerFailed(RuntimeError):
    """The optimizer LM can't be called, or every proposal failed. The first error is the cause."""


class FailureLimit:
    """Counts the failed examples of this process.

    `max_errors` failed examples end the run. If it is None, `num_in_dead_rounds` failures end the run, if they are
    all examples of whole rounds. With `provide_traceback` the log of a failure has the traceback.
    """

    def __init__(
        self, max_errors: int | None, num_in_dead_rounds: int, provide_traceback: bool = False
    ) -> None:
        self._max_errors = max_errors
        self._num_in_dead_rounds = num_in_dead_rounds
        self._provide_traceback = provide_traceback
        self._counts: Counter[str] = Counter()  # metric or program -> its failures
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
        source = "metric" if isinstance(result.error, MetricRaised) else "program"
        self._counts[source] += 1
        self._first_error = self._first_error or result.error
        self._failed.add(task.candidate.id)
        self._log(source, result.error, outcome.error)
        total = self._counts.total()
        if self._max_errors is not None and total >= self._max_errors:
            raise self._too_many(f"failed on {total} examples (max_errors={self._max_errors})")

    def _log(self, source: str, error: Exception | None, cause: str) -> None:
        """Log the first failure of metric and of program, and then every tenth, because what is broken fails often."""
        number = self._counts[source]
        if number == 1 or number % 10 == 0:
            many = f" ({source}, {number} times so far)" if number > 1 else ""
            detail = "".join(traceback.format_exception(error)) if self._provide_traceback else cause
            logger.warning("Failed on an example%s: %s", many, detail)

    def see(self, event: Event) -> None:
        """Without `max_errors`, end the run if the last rounds have only failures.

        A candidate may fail on every example, because an instruction can break the output format. If whole rounds
        fail, the cause is elsewhere. The rule does not depend on the order in which results arrive.

        Raises:
            TooManyErrors: No example succeeded in the last rounds, which have at least `NUM_DEAD` candidates.
        """
        if isinstance(event, TrialFinished):
            self._finished.append(event.trial)
        elif isinstance(event, RoundDecided):
            self._decided()

    def _decided(self) -> None:
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
                f"failed on each of the last {failures} examples, under {len(self._dead)} candidates"
            )

    def _too_many(self, what: str) -> TooManyErrors:
        by_metric = self._counts["metric"]
        who = "The program"
        if by_metric:
            who = "The metric" if by_metric == self._counts.total() else "The program or the metric"
            what += f"; the metric raised {by_metric} times"
        error = TooManyErrors(f"{who} {what}. First cause: {in_brief(self._first_error)}")
        error.__cause__ = self._first_error
        return error


class FirstExamples:
    """The run first scores the student on one example alone, so a broken metric or program costs almost nothing.

    A program may fail on single examples. After a failure the run tries the next example, at most `NUM_FIRST`. A
    refused key and an unknown model end the run at once.
    """

    def __init__(self, num_train: int, budget: Budget | None = None) -> None:
        self._num_left = min(NUM_FIRST, num_train)
        self._budget = budget or Budget()
        self._first_error: Exception | None = None

    def passes(self, result: TaskResult) -> bool:
        """Whether the result lets the run start with all other tasks.

        Raises:
            MetricError: The metric raised an error.
            TooManyErrors: The program failed on every example so far, and there is no further attempt.
            ValueError: The answers don't say what a budget needs to know.
        """
        if result.error is None:
            check_program(self._budget, result.usage)
            return True
        if isinstance(result.error, MetricRaised):
            raise MetricError(str(result.error)) from result.error.__cause__
        self._num_left -= 1
        self._first_error = self._first_error or result.error
        if not self._num_left or judge(result.error).kind == "account":
            message = f"The student fails on every example tried. First cause: {in_brief(self._first_error)}"
            raise TooManyErrors(message) from self._first_error
        return False


def check_program(budget: Budget, spent: Usage) -> None:
    """Check that a successful example says what a budget needs to know.

    Raises:
        ValueError: As `check_budget`, or no LM call could be measured. DSPy's settings, which count the calls, are not
            known in a plain thread.
    """
    check_budget(budget, spent)
    limits: dict[str, float | None] = {"max_tokens": budget.max_tokens, "max_cost": budget.max_cost}
    for name, limit in limits.items():
        if limit is None or spent.scorer_calls or spent.cached_calls:
            continue
        raise ValueError(
            f"{name}={limit:g} can't be measured: no LM call of the program was counted. If the program starts "
            "threads of its own, use dspy.Parallel, or run them in contextvars.copy_context(). If it calls no LM, "
            f"leave {name} out."
        )


def check_budget(budget: Budget, spent: Usage, lm: str = "an LM of the program or the metric") -> None:
    """Check that the answers of an LM say what a budget needs to know.

    Raises:
        ValueError: There is a token budget and no token count, or a dollar budget and a call without a price.
    """
    num_calls, no_price = spent.scorer_calls + spent.proposer_calls, f"no price is known for {lm}"
    for name, limit, is_known, missing, other in (
        ("max_tokens", budget.max_tokens, spent.tokens, "the provider sends no usage", "max_metric_calls"),
        ("max_cost", budget.max_cost, not spent.unpriced_calls, no_price, "prices, or max_tokens"),
    ):
        if limit is not None and num_calls and not is_known:
            raise ValueError(f"{name}={limit:g} can't be measured: {missing}. Pass {other} instead.")
