"""One more candidate out of known texts."""

from __future__ import annotations

import itertools

import pytest

from dspy_opro.search.trajectory import Candidate, Trajectory, Trial
from dspy_opro.storage.recombination import recombine

GAIN = {"retrieve": {"r0": 0.0, "r1": 0.1, "r2": 0.4}, "answer": {"a0": 0.0, "a1": 0.3, "a2": 0.1}}


def trial(**texts: str) -> Trial:
    reward = sum(GAIN[name].get(text, 0.0) for name, text in texts.items())
    return Trial(Candidate(texts), reward, 10, "complete")


def grid() -> list[Trial]:
    return [trial(retrieve=r, answer=a) for r, a in itertools.product(GAIN["retrieve"], GAIN["answer"])]


def test_the_one_combination_that_is_left_is_found() -> None:
    left = {"retrieve": "r2", "answer": "a1"}
    known = [t for t in grid() if t.candidate.instructions != left]
    assert recombine(Trajectory(tuple(known)), seed=0) == left


def test_nothing_is_left() -> None:
    assert recombine(Trajectory(tuple(grid())), seed=0) is None


def test_good_texts_are_put_together_more_often_than_by_chance() -> None:
    """Rewritten one at a time, the best of each were never seen together: 64 combinations are untried."""
    number = 9
    texts = [f"{n}" for n in range(number)]
    GAIN.update(
        left={t: 0.05 * n for n, t in enumerate(texts)}, right={t: 0.05 * n for n, t in enumerate(texts)}
    )
    trials = [trial(left="0", right="0")]
    trials += [trial(left=t, right="0") for t in texts[1:]] + [trial(left="0", right=t) for t in texts[1:]]
    drawn = [recombine(Trajectory(tuple(trials)), seed) for seed in range(20)]
    rewards = [sum(GAIN[name][text] for name, text in (d or {}).items()) for d in drawn]
    assert sum(rewards) / len(rewards) > 0.45  # a draw by chance from the untried ones gives 0.45
    assert all(d is not None and d not in [t.candidate.instructions for t in trials] for d in drawn)


def test_equal_seeds_give_equal_answers_and_others_differ() -> None:
    trajectory = Trajectory((*grid()[:3], *grid()[3::3]))  # r0 with each answer, a0 with each retrieve
    assert recombine(trajectory, 3) == recombine(trajectory, 3)
    assert len({str(recombine(trajectory, seed)) for seed in range(10)}) > 1


@pytest.mark.parametrize("seed", [-1, 2**32 - 1, 2**32, 2**70])
def test_every_whole_number_is_a_seed(seed: int) -> None:
    assert recombine(Trajectory(tuple(grid()[:-1])), seed) == {"retrieve": "r2", "answer": "a2"}


def test_texts_that_differ_in_white_space_are_the_same() -> None:
    known = [trial(retrieve="r0", answer="a0"), trial(retrieve="r0", answer=" a0\n")]
    assert recombine(Trajectory(tuple(known)), 0) is None


@pytest.mark.parametrize("known", [[], [Trial(Candidate({"only": "x"}), 0.5, 3)], grid()[:1]])
def test_nothing_to_combine(known: list[Trial]) -> None:
    assert recombine(Trajectory(tuple(known)), 0) is None
