"""The order of a race: contested examples first, and what the first ones say about all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.pruners import MedianPruner

from dspy_opro.search.order import RaceOrder
from dspy_opro.search.pruners import Halving
from dspy_opro.search.shared import Rules
from dspy_opro.search.tasks import Plan
from dspy_opro.search.trajectory import Candidate, Trajectory, Trial, mean, unless_first
from dspy_opro.storage.optuna_pruner import OptunaPruner


def trajectory(*rows: dict[int, float]) -> Trajectory:
    """A trial for each row: position -> score."""
    return Trajectory().add(
        *(
            Trial(
                Candidate({"self": f"text {number}"}),
                mean(list(row.values())),
                len(row),
                scores=tuple(row.values()),
                positions=unless_first(row),
            )
            for number, row in enumerate(rows)
        )
    )


rows = st.lists(
    st.dictionaries(st.integers(0, 7), st.sampled_from([0.0, 0.3, 1.0]), min_size=1).map(
        lambda row: dict(sorted(row.items()))
    ),
    max_size=6,
)


def test_without_a_disagreement_the_examples_keep_their_order() -> None:
    for known in (trajectory(), trajectory({0: 1.0, 1: 0.0}), trajectory({0: 1.0, 1: 0.0}, {0: 1.0, 1: 0.0})):
        order = RaceOrder.contested_first(known, 4)
        assert list(order.positions) == [0, 1, 2, 3]
        assert order.difference([1.0, 1.0], [0.0, 1.0]) == 0.5


def test_contested_examples_come_first_unknown_ones_next_and_agreed_ones_last() -> None:
    known = trajectory(*({0: 1.0, 1: 0.0, 2: float(i % 2), 3: float(i % 4 == 0)} for i in range(8)))
    order = RaceOrder.contested_first(known, 6)
    # One in two disagrees on 2, one in four on 3. Nobody was scored on 4 and 5. All agree on 0 and 1.
    assert list(order.positions) == [2, 3, 4, 5, 0, 1]
    half, quarter, unknown, unknown_too, agreed, _ = order.expected
    assert half > quarter > unknown == unknown_too > agreed > 0


def test_few_scores_move_an_example_less_than_many() -> None:
    known = [{0: 1.0, 1: float(i % 2)} | ({2: 1.0} if i < 2 else {}) for i in range(8)]
    order = RaceOrder.contested_first(trajectory(*known), 3)
    # All agree on 0 and 2, but only two candidates were scored on 2.
    assert list(order.positions) == [1, 2, 0]


@given(rows, st.integers(1, 8))
def test_an_order_has_every_example_once_and_differences_are_exact_at_its_end(
    known: list, num_scored: int
) -> None:
    order = RaceOrder.contested_first(trajectory(*known), 8)
    assert sorted(order.positions) == list(range(8))
    assert list(order.expected) == sorted(order.expected, reverse=True) and order.expected[-1] > 0
    scores = order.arrange({p: p / 8 for p in range(8)})
    assert scores == [p / 8 for p in order.positions]
    assert order.difference(scores, [0.0] * 8) == pytest.approx(mean(scores))
    assert order.arrange({order.positions[0]: 0.5}) == [0.5]
    assert order.difference([0.25] * num_scored, [0.25] * 8) == 0.0


def test_arranging_few_scores_looks_at_few_positions() -> None:
    class Counted(dict[int, float]):
        num_asked = 0

        def __contains__(self, position: object) -> bool:
            self.num_asked += 1
            return super().__contains__(position)

    scores = Counted({0: 0.25, 1: 0.5})
    assert RaceOrder.fixed(1000).arrange(scores) == [0.25, 0.5]
    assert scores.num_asked == 2


def test_a_difference_counts_less_where_more_is_contested_than_is_left() -> None:
    known = trajectory(*({0: 1.0, 1: float(i % 2), 2: 1.0, 3: 0.0} for i in range(8)))
    order = RaceOrder.contested_first(known, 4)
    assert order.positions[0] == 1
    assert -0.5 < order.difference([0.0], [1.0, 1.0, 1.0, 0.0]) < -0.25  # -1 by the plain mean of one example


def test_a_pruner_that_compares_rounds_has_the_same_examples_in_each() -> None:
    known = trajectory(*({0: 1.0, 1: float(i % 2)} for i in range(8)))
    student, plan = Candidate({"self": "text"}), Plan(2)
    assert list(Rules(plan, student, Halving()).order(known).positions) == [1, 0]
    assert list(Rules(plan, student, OptunaPruner(MedianPruner())).order(known).positions) == [0, 1]


def test_a_trial_says_which_examples_its_scores_are_of() -> None:
    (first, gap) = trajectory({0: 0.5, 1: 1.0}, {1: 1.0, 3: 0.0}).trials
    assert not first.positions and first.scores_by_position == {0: 0.5, 1: 1.0}
    assert list(gap.positions) == [1, 3] and gap.scores_by_position == {1: 1.0, 3: 0.0}
