"""Who leaves a race: nobody who could still win by the bound, nobody for reasons of rounding, and no one late."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspy_opro.search.pruners import Halving, Race, ScoreAll, cannot_win
from dspy_opro.search.trajectory import mean

unit = st.floats(0, 1)
GRID = (0.0, 0.5, 1.0)


def race(
    incumbent: Sequence[float],
    scores: Mapping[str, Sequence[float]],
    started: int | None = None,
    bounded: bool = True,
) -> Race:
    return Race(incumbent, scores, len(scores) if started is None else started, bounded)


# --- the exact bound -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_examples", [1, 2, 3, 4])
def test_the_bound_drops_exactly_those_that_no_completion_makes_a_winner(num_examples: int) -> None:
    for incumbent in itertools.product(GRID, repeat=num_examples):
        for count in range(1, num_examples + 1):
            for scores in itertools.product(GRID, repeat=count):
                rests = itertools.product(GRID, repeat=num_examples - count)
                can_win = any(mean(scores + rest) > mean(incumbent) for rest in rests)
                assert cannot_win(scores, incumbent) is not can_win


@given(st.data())
def test_rounding_never_drops_a_winner(data: st.DataObject) -> None:
    """Scores that binary fractions do not hold, such as 0.1, sum up to more or less than they should."""
    share = st.one_of(unit, st.sampled_from([0.1, 0.2, 0.3, 0.7, 1 / 3, 1 - 1e-16]))
    incumbent = data.draw(st.lists(share, min_size=1, max_size=12))
    completed = data.draw(st.lists(share, min_size=len(incumbent), max_size=len(incumbent)))
    seen = data.draw(st.integers(1, len(incumbent)))
    if mean(completed) > mean(incumbent):
        assert not cannot_win(completed[:seen], incumbent)


@pytest.mark.parametrize(
    ("scores", "dropped"),
    [
        ([0.0, 0.0], True),  # the rest gives 2 at most, the incumbent has 2
        ([1.0, 0.0], False),
    ],
)
def test_who_can_at_most_tie_is_dropped(scores: list[float], dropped: bool) -> None:
    assert cannot_win(scores, [1.0, 0.0, 1.0, 0.0]) is dropped


def test_scores_beyond_one_have_no_bound() -> None:
    """One example may give 5 points, so a candidate that is far behind can still win."""
    incumbent, behind = [5.0, 0.0, 0.0, 0.0], {"a": [0.0, 0.0]}
    lenient = Halving(first=2, slack=100.0)
    assert lenient.drop(race(incumbent, behind, bounded=False)) == {}
    assert lenient.drop(race(incumbent, behind, bounded=True)) == {"a": "cannot win any more"}


# --- halving ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "num_examples", "expected"),
    [
        (5, 1, [1]),
        (5, 5, [5]),
        (5, 6, [6]),  # no race over a single last example
        (5, 8, [5, 8]),
        (5, 20, [5, 10, 20]),
        (5, 42, [5, 10, 20, 42]),
        (5, 100, [5, 10, 20, 40, 100]),
        (1, 4, [1, 2, 4]),
    ],
)
def test_checkpoints_double(first: int, num_examples: int, expected: list[int]) -> None:
    assert list(Halving(first=first).checkpoints(num_examples, 8)) == expected


@given(st.integers(1, 12), st.integers(1, 400), st.integers(1, 40))
def test_checkpoints_ascend_and_end_with_all(first: int, num_examples: int, num_candidates: int) -> None:
    for pruner in (Halving(first=first), ScoreAll()):
        ends = list(pruner.checkpoints(num_examples, num_candidates))
        assert ends == sorted(set(ends))
        assert ends[0] >= 1
        assert ends[-1] == num_examples


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({"a": [1, 1], "b": [1, 0], "c": [0, 1], "d": [1, 1]}, {"b", "c"}),
        ({"a": [1, 1], "b": [1, 1], "c": [1, 1], "d": [1, 1]}, {"c", "d"}),  # the earlier proposals go on
        ({"a": [1, 1], "b": [0, 0], "c": [0, 0], "d": [0, 0]}, {"b", "c", "d"}),
    ],
)
def test_half_go_on(scores: dict[str, list[float]], expected: set[str]) -> None:
    incumbent = [1.0, 0.0, 0.0, 0.0]
    assert set(Halving(first=2).drop(race(incumbent, scores))) == expected


@pytest.mark.parametrize(
    ("slack", "scores", "dropped"),
    [
        (0.0, [1, 0, 1, 0], False),  # level with the incumbent
        (0.0, [1, 0, 0, 0], True),
        (1.0, [1, 0, 0, 0], False),  # 0.25 behind, one standard error is 0.25
        (0.9, [1, 0, 0, 0], True),
    ],
)
def test_who_is_behind_leaves(slack: float, scores: list[float], dropped: bool) -> None:
    pruner = Halving(first=4, slack=slack)
    out = pruner.drop(race([1.0, 0.0, 1.0, 0.0] * 3, {"a": scores, "z": [1, 1, 1, 1]}, started=8))
    assert ("a" in out) is dropped
    if dropped:
        assert "behind the incumbent after 4 examples" in out["a"]


@given(st.permutations([0, 1, 2, 3, 5, 7]), st.sampled_from([3, 10]))
def test_a_tie_is_not_behind_whatever_rounding_says(tenths: list[int], parts: int) -> None:
    """The incumbent's scores in another order, and one of them in two parts."""
    incumbent = [score / parts for score in (0, 1, 2, 3, 5, 7)] + [0.0] * 6
    for scores in (tenths, [0, 0, 3, 3, 5, 7], [1, 2, 5, 3, 0, 7]):
        assert not Halving(first=6).drop(race(incumbent, {"a": [s / parts for s in scores]}))


def test_easy_and_hard_examples_cancel_in_the_difference() -> None:
    """Both have the same mean; only the second is better where the incumbent fails, and both pair the same."""
    now = race([1.0, 1.0, 0.0, 0.0], {"a": [1.0, 0.0], "b": [1.0, 1.0]})
    assert now.difference("a") == -0.5
    assert now.difference("b") == 0.0


def test_nothing_is_ranked_out_once_all_is_scored() -> None:
    incumbent = [0.0, 0.0]
    scores = {"a": [1.0, 1.0], "b": [1.0, 0.0], "c": [0.0, 1.0]}
    assert Halving(first=2).drop(race(incumbent, scores)) == {}


def test_the_places_do_not_depend_on_who_left_before() -> None:
    """At the second checkpoint of eight, two go on, whether four or three came that far."""
    pruner, incumbent = Halving(first=2), [0.0] * 8
    for survivors in (4, 3, 2):
        scores = {str(n): [1.0] * 4 for n in range(survivors)}
        assert len(pruner.drop(race(incumbent, scores, started=8))) == survivors - 2


@given(st.data())
def test_a_race_never_costs_more_than_said(data: st.DataObject) -> None:
    num_examples, num_candidates = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 12))
    pruner = Halving(
        first=data.draw(st.integers(1, 8)),
        keep=data.draw(st.sampled_from([0.5, 1 / 3, 0.7, 0.9, 0.1])),
        slack=data.draw(st.sampled_from([0.0, 2.0])),
    )
    draws = data.draw(st.randoms(use_true_random=False))
    incumbent = [float(draws.random() < 0.3) for _ in range(num_examples)]
    rows = {str(n): [float(draws.random() < 0.6) for _ in range(num_examples)] for n in range(num_candidates)}
    alive, done, calls = dict(rows), 0, 0
    for end in pruner.checkpoints(num_examples, num_candidates):
        calls += len(alive) * (end - done)
        done = end
        scores = {name: row[:end] for name, row in alive.items()}
        dropped = pruner.drop(race(incumbent, scores, started=num_candidates)) if alive else {}
        alive = {name: row for name, row in alive.items() if name not in dropped}
    assert calls <= pruner.most_calls(num_examples, num_candidates)
    assert calls <= ScoreAll().most_calls(num_examples, num_candidates)


@given(st.integers(1, 200), st.integers(1, 20))
def test_more_candidates_never_cost_less(num_examples: int, num_candidates: int) -> None:
    for pruner in (Halving(), ScoreAll()):
        costs = [pruner.most_calls(num_examples, n) for n in (num_candidates, num_candidates + 1)]
        assert costs[0] <= costs[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"first": 0}, r"first must be at least 1, but got 0\."),
        ({"keep": 0.0}, r"keep must lie between 0 and 1, but got 0\.0\."),
        ({"keep": 1.0}, r"keep must lie between 0 and 1, but got 1\.0\."),
        ({"slack": -1.0}, r"slack must be at least 0, but got -1\.0\."),
        ({"slack": math.nan}, r"slack must be at least 0, but got nan\."),
    ],
)
def test_halving_checks_its_values(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Halving(**values)  # type: ignore[arg-type]


# --- everything in full ----------------------------------------------------------------------------------


def test_without_a_pruner_everybody_is_scored_in_full() -> None:
    pruner = ScoreAll()
    assert list(pruner.checkpoints(30, 8)) == [30]
    assert pruner.drop(race([1.0, 1.0], {"a": [0.0]})) == {}
    assert pruner.most_calls(30, 8) == 240
