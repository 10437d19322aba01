"""The meta-prompt shows what tells candidates apart: a mix of failures and successes, disputed ones first."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspy_opro.proposers.meta_prompt import choose, disagreement, verdict
from dspy_opro.search.tasks import View
from dspy_opro.search.trajectory import Candidate, Outcome, Trajectory, Trial, mean

BASE = Candidate({"p": "base"})


def view(scores: Sequence[float | None], rows: Sequence[Sequence[float]] = ()) -> View:
    """The base's scores by position, and those of the other candidates."""
    trials = [
        Trial(Candidate({"p": str(n)}), mean(row), len(row), scores=tuple(row)) for n, row in enumerate(rows)
    ]
    outcomes = [None if score is None else Outcome(score) for score in scores]
    return View(Trajectory().add(*trials) if trials else Trajectory(), BASE, outcomes)


def chosen(shown: View, count: int, seed: int = 0, at_random: bool = False) -> list[int]:
    return choose(shown, count, random.Random(seed), at_random)


@pytest.mark.parametrize(
    ("scores", "count", "failures"),
    [
        ([0, 0, 0, 1, 1, 1], 3, 2),
        ([0, 0, 0, 1, 1, 1], 4, 2),
        ([0, 0, 0, 1, 1, 1], 1, 1),
        ([0, 1, 1, 1, 1, 1], 3, 1),  # too few failures: more successes
        ([0, 0, 0, 0, 0, 1], 3, 2),
        ([0, 0, 0, 0, 0, 1], 4, 3),  # too few successes: more failures
        ([0.9, 0.2, 0.9, 0.1], 2, 1),
        ([1, 1, 1], 2, 0),
        ([0, 0, 0], 2, 0),
        ([0, 1], 5, 1),
        ([0, 1], 0, 0),
    ],
)
def test_failures_and_successes_are_mixed(scores: list[float], count: int, failures: int) -> None:
    for seed in range(5):
        positions = chosen(view(scores, [scores]), count, seed)
        assert len(positions) == len(set(positions)) == min(count, len(scores))
        assert sum(scores[p] < max(scores) for p in positions) == failures


def test_disputed_examples_come_first() -> None:
    """The leading candidates disagree on 0 (failed) and 3 (answered), and on nothing else."""
    rows = [[0, 0, 0, 1, 1, 1], [1, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1], [1, 0, 0, 0, 1, 1]]
    shown = view(rows[0], rows)
    counts = [chosen(shown, 2, seed) for seed in range(40)]
    assert sum(0 in positions for positions in counts) > 30
    assert sum(3 in positions for positions in counts) > 30


def test_two_slots_see_different_examples() -> None:
    scores = [float(n % 2) for n in range(20)]
    assert len({tuple(chosen(view(scores, [scores]), 3, seed)) for seed in range(10)}) > 5


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_the_scale_of_the_scores_changes_no_choice(scale: float) -> None:
    draws = random.Random(0)
    rows = [[2 * draws.random() - 1 for _ in range(20)] for _ in range(8)]
    scaled = [[scale * score for score in row] for row in rows]
    choices = [chosen(view(rows[0], rows), 3, seed) for seed in range(10)]
    assert [chosen(view(scaled[0], scaled), 3, seed) for seed in range(10)] == choices
    assert len(set(map(tuple, choices))) > 5


def test_the_same_seed_sees_the_same_examples() -> None:
    scores = [float(n % 2) for n in range(20)]
    assert chosen(view(scores, [scores]), 3, 7) == chosen(view(scores, [scores]), 3, 7)


def test_before_the_first_score_any_examples_are_shown() -> None:
    assert len(chosen(view([None] * 5), 3)) == 3


def test_the_paper_draws_them_at_random_whatever_their_scores() -> None:
    shown = view([0.0] + [1.0] * 19, [[0.0] + [1.0] * 19])
    drawn = [chosen(shown, 3, seed, at_random=True) for seed in range(200)]
    share = sum(0 in positions for positions in drawn) / len(drawn)
    assert 0.05 < share < 0.3  # 3 of 20


@given(
    st.lists(st.none() | st.floats(-5, 5), min_size=1, max_size=15),
    st.integers(0, 20),
    st.integers(0, 100),
    st.booleans(),
)
def test_positions_are_valid_and_distinct(
    scores: list[float | None], count: int, seed: int, at_random: bool
) -> None:
    known = [s for s in scores if s is not None]
    positions = chosen(view(scores, [known] if known else []), count, seed, at_random)
    assert len(positions) == len(set(positions)) <= count
    assert all(0 <= p < len(scores) for p in positions)


def test_disagreement_is_the_variance_among_the_leaders() -> None:
    trajectory = view([], [[1, 0, 1], [0, 0], [1]]).trajectory
    assert disagreement(trajectory, 4) == pytest.approx([2 / 9, 0.0, 0.0, 0.0])
    # The two best have 1.0 and 2/3 on average.
    assert disagreement(trajectory, 3, leaders=2) == pytest.approx([0.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("outcome", "bounds", "expected"),
    [
        (Outcome(1.0), (0, 1), "correct"),
        (Outcome(0.0), (0, 1), "wrong"),
        (Outcome(0.5), (0, 1), "score 50"),
        (Outcome(5.0), (1, 5), "correct"),
        (Outcome(3.0), (1, 5), "score 50"),
        (Outcome(2.0), (2, 2), "correct"),
        (Outcome(-2.0), (-2, -2), "wrong"),
        (Outcome(0.0, error="KeyError: 'x'"), (0, 1), "failed: KeyError: 'x'"),
    ],
)
def test_a_score_in_words(outcome: Outcome, bounds: tuple[float, float], expected: str) -> None:
    assert verdict(outcome, *bounds) == expected
