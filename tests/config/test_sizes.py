"""Sizes that nobody gave."""

from __future__ import annotations

import math

import pytest

from dspy_opro.config.sizes import (
    MOST_CANDIDATES,
    affordable_examples,
    useful_examples,
    usual_candidates,
    usual_first,
    usual_lag,
)


@pytest.mark.parametrize(("num_examples", "expected"), [(1, 2), (16, 2), (20, 3), (24, 4), (1000, 4)])
def test_a_short_race_decides_sooner(num_examples: int, expected: int) -> None:
    assert usual_first(num_examples) == expected


@pytest.mark.parametrize(
    ("num_calls", "expected"), [(60, 16), (326, 16), (768, 24), (1600, 50), (32_000, 1000)]
)
def test_a_small_budget_scores_fewer_examples(num_calls: int, expected: int) -> None:
    assert affordable_examples(num_calls) == expected


@pytest.mark.parametrize(
    ("num_calls", "expected"),
    [(60, 16), (326, 32), (450, 37), (768, 48), (1500, 48), (1600, 50), (32_000, 1000)],
)
def test_where_examples_are_plenty_a_full_score_takes_more(num_calls: int, expected: int) -> None:
    assert useful_examples(num_calls) == expected


@pytest.mark.parametrize(
    ("num_rounds", "expected"), [(1, 8), (14, 8), (15, 16), (29, 16), (30, 32), (60, 64), (math.inf, 16)]
)
def test_a_long_run_has_larger_rounds(num_rounds: float, expected: int) -> None:
    assert usual_candidates(num_rounds) == expected
    assert usual_candidates(10**6) == MOST_CANDIDATES


@pytest.mark.parametrize(
    ("num_rounds", "expected"), [(1, 0), (3, 0), (4, 1), (8, 2), (12, 3), (500, 3), (math.inf, 3)]
)
def test_rounds_of_a_long_run_overlap_more(num_rounds: float, expected: int) -> None:
    assert usual_lag(num_rounds) == expected
