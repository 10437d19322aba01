"""When a run ends: each stopper's reason, budgets between any two calls, a ledger that adds up exactly."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspy_opro.search.stoppers import (
    Budget,
    Ledger,
    MaxRounds,
    Patience,
    RunState,
    StopAtScore,
    Usage,
    first_reason,
)
from dspy_opro.search.trajectory import Trajectory


def state(*best_scores: float) -> RunState:
    return RunState(len(best_scores) - 1, Trajectory(), best_scores, Usage(), 0.0)


@pytest.mark.parametrize(
    ("patience", "min_delta", "scores", "stops"),
    [
        (2, 0.0, [0.5], False),
        (2, 0.0, [0.5, 0.5], False),
        (2, 0.0, [0.5, 0.5, 0.5], True),
        (2, 0.0, [0.5, 0.5, 0.6], False),
        (2, 0.0, [0.5, 0.6, 0.6, 0.6], True),
        (1, 0.0, [0.5, 0.6], False),
        (1, 0.0, [0.5, 0.6, 0.6], True),
        (2, 0.1, [0.5, 0.55, 0.59], True),
        (2, 0.1, [0.5, 0.56, 0.62], False),  # small gains add up
        (2, 0.25, [0.5, 0.75, 1.0], False),  # 0.75 is not more than 0.25 above 0.5, but 1.0 is
        (1, 0.25, [0.5, 0.75], True),
        (2, 0.0, [-3.0, -2.0, -2.0], False),
    ],
)
def test_patience(patience: int, min_delta: float, scores: list[float], stops: bool) -> None:
    expected = "patience" if stops else None
    assert Patience(patience, min_delta)(state(*scores)) == expected


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(1, 10))
def test_patience_counts_rounds_since_the_last_gain(gains: list[float], patience: int) -> None:
    scores = [max(gains[: n + 1]) for n in range(len(gains))]
    last_gain = max((n for n in range(1, len(scores)) if scores[n] > scores[n - 1]), default=0)
    expected = len(scores) - 1 - last_gain >= patience
    assert (Patience(patience)(state(*scores)) == "patience") is expected


@pytest.mark.parametrize(
    ("stopper", "scores", "reason"),
    [
        (StopAtScore(0.9), [0.3, 0.9], "stop_at_score"),
        (StopAtScore(0.9), [0.3, 0.899], None),
        (StopAtScore(0.0), [0.0], "stop_at_score"),
        (MaxRounds(2), [0.1, 0.1], None),
        (MaxRounds(2), [0.1, 0.1, 0.1], "num_rounds"),
    ],
)
def test_fixed_marks(stopper: Any, scores: list[float], reason: str | None) -> None:
    assert stopper(state(*scores)) == reason


def test_the_first_stopper_that_answers_gives_the_reason() -> None:
    asked: list[str] = []

    def stopper(name: str, answer: object) -> Any:
        return lambda _: (asked.append(name), answer)[1]

    stoppers = [stopper("a", None), stopper("b", False), stopper("c", "enough"), stopper("d", "too late")]
    assert first_reason(stoppers, state(0.1)) == "enough"
    assert asked == ["a", "b", "c"]
    assert first_reason([], state(0.1)) is None


def test_a_stopper_may_answer_true() -> None:
    def good_enough(state: RunState) -> bool:
        return state.best_score > 0.5

    class Never:
        def __call__(self, state: RunState) -> bool:
            return True

    assert first_reason([good_enough], state(0.6)) == "good_enough"  # type: ignore[list-item]
    assert first_reason([good_enough], state(0.5)) is None  # type: ignore[list-item]
    assert first_reason([Never()], state(0.5)) == "Never"  # type: ignore[list-item]


@pytest.mark.parametrize("answer", [1, 0.3, object()])
def test_any_other_answer_is_an_error(answer: object) -> None:
    with pytest.raises(TypeError, match=r"A stopper must return a reason or None, but .* returned"):
        first_reason([lambda _: answer], state(0.1))  # type: ignore[list-item, return-value]


@pytest.mark.parametrize(
    ("limits", "usage", "seconds", "reason"),
    [
        ({}, Usage(prompt_tokens=10**9, cost=1e9), 1e9, None),
        ({"max_tokens": 10}, Usage(prompt_tokens=5, completion_tokens=4), 0, None),
        ({"max_tokens": 10}, Usage(prompt_tokens=5, completion_tokens=5), 0, "max_tokens"),
        ({"max_cost": 0.5}, Usage(cost=0.49), 0, None),
        ({"max_cost": 0.5}, Usage(cost=0.5), 0, "max_cost"),
        ({"timeout_seconds": 3.0}, Usage(), 2.9, None),
        ({"timeout_seconds": 3.0}, Usage(), 3.0, "timeout_seconds"),
        ({"max_tokens": 1, "max_cost": 0.1}, Usage(cost=1.0, prompt_tokens=1), 0, "max_tokens"),
    ],
)
def test_budgets(limits: dict[str, Any], usage: Usage, seconds: float, reason: str | None) -> None:
    assert Budget(**limits).exhausted(usage, seconds) == reason


def test_usage_adds_up_in_every_field() -> None:
    one = Usage(*range(1, len(fields(Usage)) + 1))
    assert all(getattr(one + one, f.name) == 2 * getattr(one, f.name) for f in fields(Usage))
    assert one - one == Usage()
    assert Usage(prompt_tokens=3, completion_tokens=4).tokens == 7


def test_the_ledger_loses_nothing_between_threads() -> None:
    ledger = Ledger(Usage(metric_calls=5))
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: ledger.add(Usage(metric_calls=1, prompt_tokens=n)), range(4000)))
    assert ledger.usage == Usage(metric_calls=4005, prompt_tokens=sum(range(4000)))
