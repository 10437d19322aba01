"""One failure is data; `max_errors` of them, whole rounds of nothing else, or a broken start end a run."""

from __future__ import annotations

from typing import Any

import pytest

from dspy_opro.programs.evaluator import MetricRaised
from dspy_opro.programs.failures import FailureLimit, FirstExamples, TooManyErrors
from dspy_opro.programs.metering import Budget
from dspy_opro.programs.metric import MetricError
from dspy_opro.search.tasks import (
    Proposal,
    ProposalTask,
    RoundDecided,
    ScoringTask,
    TaskResult,
    TrialFinished,
    View,
)
from dspy_opro.search.trajectory import Candidate, Outcome, Trajectory, Trial, Usage


def task(position: int, name: str = "student") -> ScoringTask:
    return ScoringTask(Candidate({"self": name}), 0, "train", position)


def failed(cause: str = "the provider is down") -> TaskResult:
    return TaskResult(Outcome(0.0, error=f"ValueError: {cause}"), error=ValueError(cause))


PASSED = TaskResult(Outcome(1.0))


def metric_raised() -> TaskResult:
    try:
        raise MetricRaised("metric raised AttributeError: nothing") from AttributeError("nothing")
    except MetricRaised as error:
        return TaskResult(Outcome(0.0, error=str(error)), error=error)


# --- the first example -----------------------------------------------------------------------------------


def test_the_first_example_that_passes_is_enough() -> None:
    assert FirstExamples(8).passes(PASSED)


def test_single_failures_at_the_start_are_no_reason_to_end() -> None:
    first = FirstExamples(8)
    assert not first.passes(failed())
    assert not first.passes(failed())
    assert first.passes(PASSED)


def test_a_score_of_zero_is_no_failure() -> None:
    assert FirstExamples(8).passes(TaskResult(Outcome(0.0)))


def test_a_metric_that_raises_on_the_first_example_is_broken() -> None:
    with pytest.raises(MetricError, match="metric raised AttributeError") as caught:
        FirstExamples(8).passes(metric_raised())
    assert isinstance(caught.value.__cause__, AttributeError)


@pytest.mark.parametrize(("num_train", "num_tried"), [(80, 10), (8, 8), (2, 2), (1, 1)])
def test_a_student_that_fails_on_all_of_ten_examples_is_broken(num_train: int, num_tried: int) -> None:
    first = FirstExamples(num_train)
    for number in range(num_tried - 1):
        assert not first.passes(failed(f"cause {number}"))
    with pytest.raises(
        TooManyErrors, match=r"fails on every example tried\. First cause: ValueError"
    ) as caught:
        first.passes(failed(f"cause {num_tried - 1}"))
    assert str(caught.value.__cause__) == "cause 0"
    assert "cause 0" in str(caught.value)


def test_a_key_that_is_refused_needs_one_example() -> None:
    kind = type("AuthenticationError", (Exception,), {"__module__": "litellm.exceptions"})
    refused = TaskResult(Outcome(0.0, error="AuthenticationError"), error=kind("wrong key"))
    with pytest.raises(TooManyErrors, match="First cause: AuthenticationError: wrong key"):
        FirstExamples(8).passes(refused)


JUDGED = Usage(scorer_calls=2, prompt_tokens=9, cost=0.1, unpriced_calls=1)
"""The program's LM has a price, and the LM of the metric has none."""


@pytest.mark.parametrize("budget", [Budget(max_tokens=9), Budget(max_cost=9.0)])
def test_a_budget_needs_an_lm_call_that_was_counted(budget: Budget) -> None:
    with pytest.raises(ValueError, match=r"=9 can't be measured: no LM call .* use dspy\.Parallel"):
        FirstExamples(8, budget).passes(PASSED)
    for counted in (Usage(cached_calls=1), Usage(scorer_calls=1, prompt_tokens=1, cost=1.0)):
        assert FirstExamples(8, budget).passes(TaskResult(Outcome(1.0), counted))
    assert FirstExamples(8, Budget(timeout_seconds=9.0)).passes(PASSED)


@pytest.mark.parametrize("spent", [Usage(scorer_calls=1, unpriced_calls=1), JUDGED])
def test_max_cost_needs_the_price_of_every_call(spent: Usage) -> None:
    missing = "no price is known for an LM of the program or the metric. Pass prices, or max_tokens"
    with pytest.raises(ValueError, match=f"max_cost=9 can't be measured: {missing}"):
        FirstExamples(8, Budget(max_cost=9.0)).passes(TaskResult(Outcome(1.0), spent))
    assert FirstExamples(8, Budget(timeout_seconds=9.0)).passes(TaskResult(Outcome(1.0), spent))


def test_max_cost_goes_with_free_lms() -> None:
    free = Usage(scorer_calls=1, prompt_tokens=1)
    assert FirstExamples(8, Budget(max_cost=9.0)).passes(TaskResult(Outcome(1.0), free))


# --- the log ---------------------------------------------------------------------------------------------


def logged(limit: FailureLimit, results: list[TaskResult], caplog: pytest.LogCaptureFixture) -> list[str]:
    for position, result in enumerate(results):
        limit.count(task(position), result)
    return caplog.messages


def test_of_failures_the_first_and_every_tenth_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    results = [result for number in range(25) for result in (failed(f"cause {number}"), metric_raised())]
    messages = logged(FailureLimit(None, 10), results, caplog)
    assert messages == [
        "Failed on an example: ValueError: cause 0",
        "Failed on an example: metric raised AttributeError: nothing",
        "Failed on an example (program, 10 times so far): ValueError: cause 9",
        "Failed on an example (metric, 10 times so far): metric raised AttributeError: nothing",
        "Failed on an example (program, 20 times so far): ValueError: cause 19",
        "Failed on an example (metric, 20 times so far): metric raised AttributeError: nothing",
    ]
    assert "Traceback" not in caplog.text


def test_the_traceback_is_logged_on_request(caplog: pytest.LogCaptureFixture) -> None:
    logged(FailureLimit(None, 10, provide_traceback=True), [metric_raised()], caplog)
    assert "Traceback (most recent call last)" in caplog.text


def test_the_final_error_says_how_often_the_metric_raised_and_why() -> None:
    limit = FailureLimit(5, 10)
    limit.count(task(0), failed("cause 0"))
    for position in range(1, 4):
        limit.count(task(position), metric_raised())
    with pytest.raises(TooManyErrors) as caught:
        limit.count(task(4), metric_raised())
    assert str(caught.value) == (
        "The program or the metric failed on 5 examples (max_errors=5); the metric raised 4 times. "
        "First cause: ValueError: cause 0"
    )
    limit = FailureLimit(2, 10)
    limit.count(task(0), metric_raised())
    with pytest.raises(
        TooManyErrors, match=r"^The metric failed on 2 examples .* metric raised AttributeError"
    ):
        limit.count(task(1), metric_raised())


# --- max_errors ------------------------------------------------------------------------------------------


def test_max_errors_counts_all_failures_and_tells_the_first_cause() -> None:
    limit = FailureLimit(3, 10)
    for position in range(5):
        limit.count(task(position), failed(f"cause {position}") if position in (1, 3) else PASSED)
    with pytest.raises(
        TooManyErrors, match=r"failed on 3 examples \(max_errors=3\)\. First cause: .*cause 1"
    ) as caught:
        limit.count(task(5), failed("cause 5"))
    assert "cause 1" in str(caught.value.__cause__)


def test_proposals_that_fail_are_no_failed_examples() -> None:
    limit = FailureLimit(1, 10)
    view = View(Trajectory(), Candidate({"self": "student"}), [])
    asked = ProposalTask(1, 0, 0, ("self",), view)
    for _ in range(5):
        limit.count(asked, TaskResult(Proposal({}, error="ValueError: down"), error=ValueError("down")))


def test_without_max_errors_single_failures_never_end_a_run() -> None:
    limit = FailureLimit(None, 10)
    for number in range(3):
        for position in range(8):
            limit.count(task(position, f"bad {number}"), failed())


# --- whole rounds ----------------------------------------------------------------------------------------


def decide(limit: FailureLimit, *trials: tuple[str, int]) -> None:
    """A round is over, after these trials of five examples each: name and number of failures."""
    finished = [Trial(Candidate({"self": name}), 0.0, 5, num_failures=count) for name, count in trials]
    for trial in finished:
        limit.see(TrialFinished(trial))
    best = Trial(Candidate({"self": "student"}), 1.0, 5)
    limit.see(RoundDecided(1, best, 1.0))


def test_without_max_errors_whole_rounds_of_failures_end_it() -> None:
    limit = FailureLimit(None, 10)
    limit.count(task(0, "a"), failed())
    with pytest.raises(
        TooManyErrors,
        match=r"each of the last 20 examples, under 4 candidates\. First cause: .*provider is down",
    ) as caught:
        decide(limit, ("a", 5), ("b", 5), ("c", 5), ("d", 5))
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize(
    "rounds",
    [
        [[("a", 5), ("b", 5), ("c", 5), ("d", 4)]],  # one example worked
        [[("a", 5), ("b", 5)], [("c", 0)], [("d", 5), ("e", 5)]],
        [[("a", 5), ("b", 5), ("c", 5)]],  # three bad instructions
        [[], [("a", 5)]],
    ],
)
def test_what_is_no_reason_to_end(rounds: list[list[Any]]) -> None:
    limit = FailureLimit(None, 10)
    limit.count(task(0, "a"), failed())
    for trials in rounds:
        decide(limit, *trials)


def test_few_failures_are_no_reason_to_end_however_many_candidates() -> None:
    limit = FailureLimit(None, 21)
    limit.count(task(0, "a"), failed())
    decide(limit, ("a", 5), ("b", 5), ("c", 5), ("d", 5))


def test_max_errors_takes_the_place_of_the_rule_over_whole_rounds() -> None:
    limit = FailureLimit(1000, 10)
    limit.count(task(0, "a"), failed())
    decide(limit, ("a", 5), ("b", 5), ("c", 5), ("d", 5))


def test_rounds_of_few_candidates_add_up() -> None:
    limit = FailureLimit(None, 10)
    limit.count(task(0, "d"), failed())
    for name in "abc":
        decide(limit, (name, 5))
    with pytest.raises(TooManyErrors):
        decide(limit, ("d", 5))


def test_failures_that_an_earlier_process_recorded_do_not_end_this_one() -> None:
    decide(FailureLimit(None, 10), ("a", 5), ("b", 5), ("c", 5), ("d", 5))
