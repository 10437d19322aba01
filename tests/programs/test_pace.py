"""How many calls may be in flight, after which answers; no clock is involved."""

from __future__ import annotations

import pytest

from dspy_opro.programs.pace import LONGEST_PAUSE_SECONDS, Pace, pause_after
from dspy_opro.programs.provider import Verdict

LIMITED, ADVISED, DOWN = Verdict("transient", True), Verdict("transient", True, 7.0), Verdict("transient")


def test_without_failures_all_calls_may_be_in_flight() -> None:
    pace = Pace(64)
    assert (pace.allowed(0.0), pace.pause(0.0), pace.trouble(0.0)) == (64, 0.0, "")


def test_a_rate_limit_halves_the_calls_once_for_all_that_were_in_flight() -> None:
    pace = Pace(64)
    for number in range(40):
        pace.failed(LIMITED, started=0.0, now=1.0 + number / 100)
    assert pace.allowed(3.0) == 32
    pace.failed(LIMITED, started=3.0, now=4.0)
    pace.answered(20.0)
    assert pace.allowed(20.0) == 16


def test_each_round_of_answers_adds_one_call() -> None:
    pace = Pace(8)
    pace.failed(LIMITED, 0.0, 1.0)
    allowed = []
    for _ in range(4):
        allowed.append(pace.allowed(10.0))
        for _ in range(pace.allowed(10.0) + 1):
            pace.answered(10.0)
    assert allowed == [4, 5, 6, 7]
    for _ in range(50):
        pace.answered(10.0)
    assert pace.allowed(10.0) == 8


def test_the_provider_says_when_to_go_on() -> None:
    pace = Pace(8)
    pace.failed(ADVISED, 0.0, 1.0)
    assert (pace.allowed(7.9), pace.allowed(8.0)) == (0, 4)
    assert pace.trouble(5.0) == "rate limit, next call in 3.0 s"
    assert pace.trouble(8.0) == "rate limit, 4 calls at a time"


def test_a_server_that_says_when_it_is_back_is_no_rate_limit() -> None:
    pace = Pace(8)
    pace.failed(Verdict("transient", retry_after=60.0), 0.0, 0.0)
    assert pace.trouble(20.0) == "no answer from the provider, next call in 40.0 s"
    pace.answered(20.0)  # by a call that was in flight
    assert pace.allowed(59.0) == 0


def test_pauses_grow_while_there_is_no_answer_and_one_call_looks() -> None:
    pace, now, pauses = Pace(8), 0.0, []
    for _ in range(10):
        pace.failed(DOWN, now, now)
        pauses.append(pace.pause(now))
        now += pauses[-1]
        assert pace.allowed(now) == (8 if len(pauses) <= 2 else 1)
    assert pauses[:5] == [0.0, 0.5, 1.0, 2.0, 4.0]  # a single failure means nothing
    assert pauses[-1] == LONGEST_PAUSE_SECONDS
    assert pace.down_since == 0.0
    assert pace.trouble(now - 1) == "no answer from the provider, next call in 1.0 s"
    assert pace.answered(now)
    assert (pace.down_since, pace.allowed(now), pace.trouble(now)) == (None, 8, "")


def test_single_failures_among_answers_change_nothing() -> None:
    pace = Pace(8)
    for now in range(20):
        pace.failed(DOWN, now, now)
        pace.answered(now)
        assert (pace.allowed(now), pace.pause(now)) == (8, 0.0)


@pytest.mark.parametrize(("count", "seconds"), [(0, 0.5), (1, 1.0), (3, 4.0), (50, 10.0)])
def test_pauses(count: int, seconds: float) -> None:
    assert pause_after(count) == seconds
