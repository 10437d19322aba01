"""When stoppers end a run, and with which reason."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspy_opro.search.stoppers import Patience, RunState, StopAtScore, first_reason
from dspy_opro.search.trajectory import Trajectory, Usage


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


def test_a_stopper_may_compare_with_numpy() -> None:
    def good_enough(state: RunState) -> Any:
        return numpy.mean(state.best_scores) > 0.5

    assert first_reason([good_enough], state(0.6)) == "good_enough"
    assert first_reason([good_enough], state(0.5)) is None


def test_an_empty_text_is_no_reason() -> None:
    assert first_reason([lambda state: "enough" if state.best_score > 0.5 else ""], state(0.5)) is None


@pytest.mark.parametrize("answer", [0, 1, 0.3, numpy.float64(1), object()])
def test_any_other_answer_is_an_error(answer: object) -> None:
    with pytest.raises(TypeError, match=r"A stopper must return a reason or None, but .* returned"):
        first_reason([lambda _: answer], state(0.1))  # type: ignore[list-item, return-value]
