"""Values of a search: equal programs are one candidate, ties go to the earlier, scores stay comparable."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspy_opro.search.trajectory import (
    Candidate,
    Trajectory,
    Trial,
    Usage,
    mean,
    normalise,
    paired_difference,
    percent,
    to_array,
)

scores = st.lists(st.floats(0, 1), min_size=1, max_size=20)


def trial(text: str, reward: float, state: str = "complete", **more: object) -> Trial:
    row = more.pop("scores", (reward,))
    return Trial(Candidate({"p": text}), reward, 1, state, scores=row, **more)  # type: ignore[arg-type]


# --- candidates ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"p": "Do it."}, {"p": "Do  it.\n"}, True),
        ({"p": "Do it.", "q": "x"}, {"q": "x", "p": "Do it."}, True),
        ({"p": "Do it."}, {"p": "do it."}, False),
        ({"p": "Do it."}, {"q": "Do it."}, False),
        ({"p": "a", "q": "b"}, {"p": "b", "q": "a"}, False),
    ],
)
def test_a_candidate_is_its_canonical_instructions(one: dict, other: dict, same: bool) -> None:
    ids = Candidate(one, round=1, parent="x").id, Candidate(other, round=7).id
    assert (ids[0] == ids[1]) is same


def test_the_demo_set_tells_candidates_apart() -> None:
    ids = {Candidate({"p": "a"}, demo_set=number).id for number in (None, 0, 1)}
    assert len(ids) == 3


def test_an_id_is_the_sha256_of_the_canonical_instructions() -> None:
    """The same in every process and with every version: studies keep it."""
    canonical = b'{"p": "\\u00fcn\\u00ef \\ud800 c"}'
    assert Candidate({"p": " ünï  \ud800 c"}).id == hashlib.sha256(canonical).hexdigest()


@given(st.text())
def test_normalising_twice_is_normalising_once(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


def test_values_cannot_be_changed() -> None:
    for value in (Candidate({"p": "a"}), trial("a", 0.5), Trajectory()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            value.round = 3  # type: ignore[union-attr]


def test_a_trajectory_pickles() -> None:
    trajectory = Trajectory().add(trial("a", 0.5, scores=to_array([0.0, 1.0])))
    trajectory.incumbent  # noqa: B018 # fills the cache
    copied = pickle.loads(pickle.dumps(trajectory))
    assert copied.incumbent.id == trajectory.incumbent.id
    assert list(copied.trials[0].scores) == [0.0, 1.0]


# --- who leads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trials", "expected"),
    [
        ([("a", 0.5, "complete"), ("b", 0.6, "complete")], "b"),
        ([("a", 0.5, "complete"), ("b", 0.5, "complete")], "a"),
        ([("a", 0.5, "complete"), ("b", 0.9, "pruned")], "a"),
        ([("a", -3.0, "complete"), ("b", -2.0, "complete"), ("c", -2.5, "complete")], "b"),
    ],
)
def test_the_incumbent_is_the_first_best_that_was_scored_in_full(trials: list, expected: str) -> None:
    trajectory = Trajectory().add(*(trial(*values) for values in trials))
    assert trajectory.incumbent.candidate.instructions["p"] == expected


@pytest.mark.parametrize(
    ("validated", "expected"),
    [
        ({"a": 0.5}, "a"),
        ({"a": 0.5, "c": 0.5}, "a"),
        ({"a": 0.0, "c": 0.1}, "c"),
        ({"a": -0.5, "b": -0.2}, "b"),
        ({"a": -0.5, "b": 0.0}, "b"),
        ({}, "c"),
    ],
)
def test_the_valset_decides_where_there_is_one(validated: dict[str, float], expected: str) -> None:
    trials = [trial(t, r, valset_score=validated.get(t)) for t, r in (("a", 0.1), ("b", 0.2), ("c", 0.3))]
    assert Trajectory().add(*trials).best.candidate.instructions["p"] == expected


def test_the_top_ascends_and_the_best_comes_last() -> None:
    trajectory = Trajectory().add(
        trial("a", 0.5), trial("b", 0.9, "pruned"), trial("c", 0.1), trial("d", 0.5)
    )
    assert [t.candidate.instructions["p"] for t in trajectory.top(3)] == ["a", "d", "b"]
    assert trajectory.top_texts("p", 2) == [("d", 0.5), ("b", 0.9)]


def test_a_text_in_several_trials_is_shown_once_with_its_best_reward() -> None:
    def pair(p: str, q: str, reward: float) -> Trial:
        return Trial(Candidate({"p": p, "q": q}), reward, 1, scores=(reward,))

    trajectory = Trajectory().add(pair("a", "x", 0.1), pair("a", "y", 0.7), pair("b", "x", 0.4))
    assert trajectory.top_texts("p", 20) == [("b", 0.4), ("a", 0.7)]
    assert trajectory.top_texts("q", 20) == [("x", 0.4), ("y", 0.7)]


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(-5, 5)), min_size=1), st.integers(1, 8))
def test_top_texts_are_the_best_distinct_ones(rows: list[tuple[str, float]], k: int) -> None:
    trajectory = Trajectory().add(*(trial(text, reward) for text, reward in rows))
    best = {text: max(r for t, r in rows if t == text) for text, _ in rows}
    shown = trajectory.top_texts("p", k)
    assert dict(shown).items() <= best.items()
    assert [r for _, r in shown] == sorted(best.values())[-k:]


# --- numbers ---------------------------------------------------------------------------------------------


def test_usage_adds_up_in_every_field() -> None:
    one = Usage(*range(1, len(dataclasses.fields(Usage)) + 1))
    assert all(getattr(one + one, f.name) == 2 * getattr(one, f.name) for f in dataclasses.fields(Usage))
    assert one - one == Usage()
    assert Usage(scorer_calls=2, unpriced_calls=1) == Usage(scorer_calls=2)
    assert Usage(prompt_tokens=3, completion_tokens=4).tokens == 7


@given(scores)
def test_a_mean_does_not_depend_on_the_order(values: list[float]) -> None:
    assert mean(values) == mean(values[::-1]) == mean(sorted(values))


@given(scores, scores)
def test_the_paired_difference_covers_the_common_prefix(one: list[float], other: list[float]) -> None:
    reference = other + [0.25] * max(0, len(one) - len(other))
    expected = mean(one) - mean(reference[: len(one)])
    assert math.isclose(paired_difference(one, reference), expected, abs_tol=1e-12)


@pytest.mark.parametrize(
    ("reward", "bounds", "expected"),
    [
        (0.5, (0.0, 1.0), 50),
        (0.994, (0.0, 1.0), 99),
        (1.4, (0.0, 1.0), 100),
        (-0.2, (0.0, 1.0), 0),
        (3.0, (1.0, 5.0), 50),
        (-7.5, (-10.0, 0.0), 25),
        (2.0, (2.0, 2.0), 100),
        (-2.0, (-2.0, -2.0), 0),
    ],
)
def test_rewards_are_shown_as_whole_numbers_up_to_100(
    reward: float, bounds: tuple[float, float], expected: int
) -> None:
    assert percent(reward, *bounds) == expected


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        ([[0.2, 0.4]], (0.0, 1.0)),
        ([[0.0, 5.0]], (0.0, 5.0)),
        ([[2.0, 5.0]], (2.0, 5.0)),
        ([[0.0, 1.0], [3.0, 5.0]], (0.0, 5.0)),
        ([[3.0], [4.0], [1.0]], (1.0, 4.0)),
        ([[-2.0, -1.0], [0.5]], (-2.0, 0.5)),
    ],
)
def test_the_score_range_covers_all_that_was_seen(
    rounds: list[list[float]], expected: tuple[float, float]
) -> None:
    trajectory = Trajectory()
    for number, row in enumerate(rounds):
        trajectory = trajectory.add(trial(str(number), mean(row), scores=to_array(row)))
    assert trajectory.score_range == expected
