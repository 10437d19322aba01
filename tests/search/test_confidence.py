"""Intervals cover what they say, luck is taken off, and a candidate is returned where the evidence favours it."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from scipy import stats

from dspy_opro.search.confidence import (
    Gain,
    Interval,
    compare,
    expected_best,
    luck,
    paired_interval,
    selected_interval,
    shortest_tied,
    standard_error,
    t_quantile,
)
from dspy_opro.search.reserve import held_back, num_pairs
from dspy_opro.search.trajectory import Candidate, Trajectory, Trial, mean


def pairs(gains: int, losses: int, count: int) -> list[float]:
    return [1.0] * gains + [-1.0] * losses + [0.0] * (count - gains - losses)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 19, 60, 61, 100, 1000])
@pytest.mark.parametrize("probability", [0.0001, 0.025, 0.3, 0.5, 0.8, 0.975, 0.9999])
def test_t_quantile_is_scipys(probability: float, freedom: int) -> None:
    expected = stats.t.ppf(probability, freedom)
    assert t_quantile(probability, freedom) == pytest.approx(
        expected, rel=1e-9 if freedom <= 60 else 1e-5, abs=1e-9
    )


@pytest.mark.parametrize(("probability", "freedom"), [(0.0, 5), (1.0, 5), (0.5, 0), (math.nan, 5)])
def test_t_quantile_has_its_range(probability: float, freedom: int) -> None:
    with pytest.raises(ValueError, match="no quantile"):
        t_quantile(probability, freedom)


@pytest.mark.parametrize("num_draws", [1, 2, 5, 36, 300])
def test_expected_best_is_the_mean_of_the_largest(num_draws: int) -> None:
    below = stats.norm.cdf
    exact = stats.norm.expect(lambda x: x * num_draws * below(x) ** (num_draws - 1), lb=-10, ub=10)
    assert expected_best(num_draws) == pytest.approx(exact, abs=0.03)


def test_there_is_no_best_of_none() -> None:
    with pytest.raises(ValueError, match="at least 1 draw"):
        expected_best(0)


@pytest.mark.parametrize(("gains", "losses", "count"), [(3, 1, 20), (10, 0, 10), (0, 2, 45), (12, 12, 30)])
def test_the_standard_error_of_wins_and_losses_has_a_little_more_of_each(
    gains: int, losses: int, count: int
) -> None:
    won, lost = (gains + 0.3) / (count + 0.6), (losses + 0.3) / (count + 0.6)
    variance = won + lost - (won - lost) ** 2
    assert standard_error(pairs(gains, losses, count)) == pytest.approx(math.sqrt(variance / count))


def test_the_standard_error_grows_with_the_scale_of_the_scores() -> None:
    differences = [0.3, -0.1, 0.0, 0.5, 0.2]
    assert standard_error([10 * d for d in differences]) == pytest.approx(10 * standard_error(differences))
    assert standard_error([0.0] * 9, scale=100.0) == pytest.approx(100 * standard_error([0.0] * 9))


@pytest.mark.parametrize("differences", [[0.0] * 20, [1.0] * 20, [-0.25] * 20, [0.0], [1.0]])
def test_equal_differences_leave_a_doubt(differences: list[float]) -> None:
    interval = paired_interval(differences)
    assert interval.low < interval.high
    assert interval.low <= interval.estimate <= interval.high
    assert interval.estimate == differences[0]


def test_one_pair_says_nothing() -> None:
    assert paired_interval([1.0]) == Interval(1.0, -1.0, 1.0, 0.95, 1, "fresh")
    assert paired_interval([30.0], scale=100.0).low == -100.0


def test_an_interval_is_cut_at_what_is_possible_but_not_where_scores_have_another_range() -> None:
    assert paired_interval(pairs(7, 0, 8)).high == 1.0
    assert paired_interval([3.0, 5.0, 4.0]).high > 5.0


def test_a_known_interval() -> None:
    interval = paired_interval(pairs(6, 1, 40))
    reach = stats.t.ppf(0.975, 39) * math.sqrt((7.6 / 40.6 - (5 / 40.6) ** 2) / 40)
    assert (interval.estimate, interval.num_examples, interval.level) == (0.125, 40, 0.95)
    assert (interval.low, interval.high) == pytest.approx((0.125 - reach, 0.125 + reach))
    narrow = paired_interval(pairs(6, 1, 40), level=0.5)
    assert interval.low < narrow.low < narrow.high < interval.high


@pytest.mark.parametrize("differences", [[], [math.nan], [0.0, math.inf]])
def test_differences_must_be_there_and_finite(differences: list[float]) -> None:
    for function in (
        standard_error,
        paired_interval,
        lambda d: selected_interval(d, 3),
        lambda d: compare(d, 3),
    ):
        with pytest.raises(ValueError, match="all finite"):
            function(differences)


def test_who_is_chosen_by_a_share_of_the_examples_is_less_lucky_on_all_of_them() -> None:
    rng = random.Random(2)
    flattery = []
    for _ in range(4000):
        part, rest = max((rng.gauss(0, 1), rng.gauss(0, 1)) for _ in range(40))
        flattery.append(0.5 * part + math.sqrt(0.75) * rest)  # a quarter of the examples decided
    assert luck(40, 0.25) == 0.5 * expected_best(40)
    assert statistics.fmean(flattery) == pytest.approx(luck(40, 0.25), abs=0.05)
    for share in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="share must be above 0"):
            luck(40, share)


def test_levels_and_scales_have_their_ranges() -> None:
    for level in (0.0, 1.0, 95.0):
        with pytest.raises(ValueError, match="level must lie between 0 and 1"):
            paired_interval([0.0, 1.0], level)
        with pytest.raises(ValueError, match="level must lie between 0 and 1"):
            selected_interval([0.0, 1.0], 2, level=level)
    for scale in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="scale must be above 0"):
            paired_interval([0.0, 1.0], scale=scale)
    with pytest.raises(ValueError, match="at least 1 draw"):
        compare([0.0, 1.0], 0)


@pytest.mark.parametrize("count", [8, 15, 20, 30, 45])
@pytest.mark.parametrize(
    ("unequal", "gain"), [(0.06, 0.03), (0.1, 0.05), (0.15, 0.1), (0.3, 0.25), (0.4, 0.2), (0.5, 0.0)]
)
def test_wins_and_losses_are_covered(unequal: float, gain: float, count: int) -> None:
    """Exactly: the probability of every number of wins and losses, and whether the interval then holds the gain."""
    won, lost = (unequal + gain) / 2, (unequal - gain) / 2
    law = stats.multinomial(count, [won, lost, 1 - unequal])
    covered = 0.0
    for gains in range(count + 1):
        for losses in range(count + 1 - gains):
            interval = paired_interval(pairs(gains, losses, count))
            if interval.low - 1e-9 <= gain <= interval.high + 1e-9:
                covered += law.pmf([gains, losses, count - gains - losses])
    assert covered >= (0.919 if count > 8 else 0.915)
    assert covered <= 0.97 or unequal * count < 6


def coverage(draw: Sequence[Sequence[float]], truth: float) -> float:
    intervals = [paired_interval(differences) for differences in draw]
    return statistics.fmean(i.low <= truth <= i.high for i in intervals)


@pytest.mark.parametrize("count", [10, 40])
def test_graded_scores_are_covered(count: int) -> None:
    rng = random.Random(count)
    normal = [[rng.gauss(0.05, 0.2) for _ in range(count)] for _ in range(3000)]
    assert coverage(normal, 0.05) == pytest.approx(0.95, abs=0.02)
    rare = [[rng.choice([0.5, -0.5, 0.25]) * (rng.random() < 0.4) for _ in range(count)] for _ in range(3000)]
    assert 0.93 <= coverage(rare, 0.4 * 0.25 / 3) <= 0.99


def test_of_one_candidate_there_is_nothing_to_allow_for() -> None:
    differences = pairs(6, 1, 40)
    interval = selected_interval(differences, 1)
    reach = 1.959964 * standard_error(differences)
    assert (interval.estimate, interval.basis) == (0.125, "selected")
    assert (interval.low, interval.high) == pytest.approx((0.125 - reach, 0.125 + reach), abs=1e-6)
    wider = selected_interval(differences, 100)
    assert wider.low < interval.low
    assert wider.high == pytest.approx(interval.high)
    assert wider.estimate < interval.estimate


def test_the_best_of_many_that_are_all_alike_is_covered() -> None:
    rng = random.Random(0)
    covered, estimates = 0, []
    for _ in range(400):
        tried = [[rng.choice([-1.0, 0.0, 0.0, 1.0]) for _ in range(30)] for _ in range(25)]
        interval = selected_interval(max(tried, key=sum), 25)
        covered += interval.low <= 0.0 <= interval.high
        estimates.append(interval.estimate)
    assert covered / 400 >= 0.94
    assert statistics.fmean(estimates) == pytest.approx(0.0, abs=0.02)


def test_a_large_gain_on_fresh_examples_is_told_as_it_is() -> None:
    compared = compare(pairs(20, 2, 40), 60, pairs(12, 1, 20))
    assert compared.is_better
    assert compared.gain == pytest.approx(0.55, abs=0.002)
    assert compared.interval == paired_interval(pairs(12, 1, 20))


def test_luck_alone_does_not_pass() -> None:
    lucky = pairs(7, 3, 40)
    for fresh in (pairs(1, 1, 20), pairs(0, 0, 20), pairs(0, 2, 20), []):
        compared = compare(lucky, 60, fresh, share=0.25)
        assert (compared.is_better, compared.gain) == (False, 0.0)
        assert compared.interval.num_examples == (20 if fresh else 40)
    assert compare(lucky, 60, pairs(3, 0, 20), share=0.25).is_better


def test_fresh_examples_that_show_a_loss_are_not_outvoted() -> None:
    assert not compare(pairs(30, 0, 40), 60, pairs(1, 2, 8)).is_better


def test_equal_scores_on_fresh_examples_leave_it_to_the_search_and_no_gain_is_told() -> None:
    equal = pairs(1, 1, 8)
    assert compare(pairs(30, 0, 40), 60, equal)[:2] == (True, 0.0)
    assert not compare(pairs(7, 3, 40), 60, equal, share=0.25).is_better


def test_a_gain_that_just_passes_is_told_smaller() -> None:
    compared = compare(pairs(7, 2, 40), 60, pairs(3, 1, 20), share=0.25)
    assert compared.is_better
    assert 0.0 < compared.gain < 0.1 == compared.interval.estimate


def test_without_fresh_examples_the_search_must_prove_it() -> None:
    compared = compare(pairs(20, 2, 40), 60, share=0.25)
    assert compared.is_better
    assert compared.interval.basis == "selected"
    assert 0.2 < compared.gain <= compared.interval.estimate < 0.45
    assert not compare(pairs(7, 1, 40), 60).is_better


def test_percent_scores_give_the_same_decision() -> None:
    search, fresh = pairs(12, 2, 40), pairs(4, 1, 20)
    compared = compare(search, 60, fresh)
    percent = compare([100 * d for d in search], 60, [100 * d for d in fresh], scale=100.0)
    assert percent.is_better == compared.is_better
    assert percent.gain == pytest.approx(100 * compared.gain)


def draw(rng: random.Random, gain: float, count: int) -> list[float]:
    won, lost = 0.15 + max(gain, 0.0), 0.15 + max(-gain, 0.0)
    return rng.choices([1.0, -1.0, 0.0], [won, lost, 1 - won - lost], k=count)


@pytest.mark.parametrize("spread", [0.0, 0.03, 0.15])
def test_what_is_told_is_right_on_average(spread: float) -> None:
    """The best of 20 candidates, whose true gains have a mean of 0 and this deviation, many times."""
    rng, told, true, num_worse = random.Random(1), [], [], 0
    for _ in range(600):
        gains = [rng.gauss(0.0, spread) for _ in range(20)]
        search, gain = max(((draw(rng, gain, 30), gain) for gain in gains), key=lambda pair: sum(pair[0]))
        compared = compare(search, 20, draw(rng, gain, 30))
        told.append(compared.gain)
        true.append(gain if compared.is_better else 0.0)
        num_worse += true[-1] < 0
    assert statistics.fmean(told) == pytest.approx(statistics.fmean(true), abs=0.02)
    assert num_worse <= 0.05 * 600


@pytest.mark.parametrize(
    ("available", "wanted", "budget", "expected"),
    [
        (60, 16, 200, 15),  # the budget's share
        (60, 18, 600, 42),  # all that the search leaves
        (60, 50, 1600, 20),  # a third
        (60, 100, None, 20),
        (400, 100, None, 100),  # as many as a full score has
        (5000, 1000, None, 1000),
        (40, 100, None, 13),
        (28, 100, None, 8),
        (27, 100, None, 0),  # the search needs 20
        (10, 100, None, 0),
        (60, 16, 100, 0),  # 7 pairs
    ],
)
def test_examples_that_are_held_back(available: int, wanted: int, budget: int | None, expected: int) -> None:
    assert held_back(available, wanted, budget) == expected


def test_what_the_search_did_not_spend_makes_more_pairs() -> None:
    assert num_pairs(15, 44, 0, 30) == 15
    assert num_pairs(15, 44, 0, 37) == 18
    assert num_pairs(15, 44, 0, 500) == 30
    assert num_pairs(20, 20, 0, 500) == 20
    assert num_pairs(20, 20, 0) == 20
    assert num_pairs(15, 44, 0, 1) == 0
    assert num_pairs(15, 44, 0, -3) == 0
    assert num_pairs(0, 44, 0, 500) == 0


def test_examples_kept_for_demos_make_more_pairs_where_few_are_held_back() -> None:
    assert num_pairs(16, 16, 16) == 32
    assert num_pairs(25, 25, 25) == 40
    assert num_pairs(100, 100, 64) == 100
    assert num_pairs(22, 30, 25, 200) == 44
    assert num_pairs(22, 30, 25, 60) == 30
    assert num_pairs(0, 0, 25) == 0


# --- ties ------------------------------------------------------------------------------------------------


def trial(text: str, *scores: float, **changes: Any) -> Trial:
    values: dict[str, Any] = {"scores": scores, **changes}
    return Trial(Candidate({"self": text}), mean(scores), len(scores), **values)


STUDENT = trial("S", *[0.0] * 20)
BEST = trial("the best one", *[1.0] * 16, *[0.0] * 4)


@pytest.mark.parametrize(
    ("other", "is_shorter_returned"),
    [
        (trial("as good", *[0.0] * 4, *[1.0] * 16), True),
        (trial("as good, but longer", *[0.0] * 4, *[1.0] * 16), False),
        (trial("worse", *[1.0] * 8, *[0.0] * 12), False),
        (trial("a bit", *[0.0] * 4, *[1.0] * 15, 0.0), False),  # 1 of 20 behind, 0.5 standard errors
        (trial("pruned", *[0.0] * 4, *[1.0] * 16, state="pruned"), False),
    ],
)
def test_of_candidates_that_are_as_good_the_one_with_the_shortest_prompt_is_chosen(
    other: Trial, is_shorter_returned: bool
) -> None:
    for order in ([STUDENT, BEST, other], [STUDENT, other, BEST]):
        assert shortest_tied(Trajectory().add(*order)) is (other if is_shorter_returned else BEST)


def test_the_student_does_not_win_a_tie_for_its_length() -> None:
    student = trial("S", *[0.0] * 4, *[1.0] * 16)
    found = Trajectory().add(student, trial("better", *[1.0] * 17, *[0.0] * 3))
    assert shortest_tied(found).candidate.instructions == {"self": "better"}


def test_a_student_that_is_best_stays() -> None:
    student = trial("the student's own", *[1.0] * 4)
    assert shortest_tied(Trajectory().add(student, trial("new", *[1.0] * 4))) is student


def test_with_a_valset_its_scores_decide() -> None:
    validated = replace(BEST, valset_score=0.5, valset_scores=[0.0, 1.0])
    shorter = trial("short", *[1.0] * 2)  # as many as there are validation examples
    assert shortest_tied(Trajectory().add(STUDENT, validated, shorter)) is validated
    also = replace(trial("short", *[0.5] * 20), valset_score=0.5, valset_scores=[1.0, 0.0])
    assert shortest_tied(Trajectory().add(STUDENT, validated, also)) is also


def test_demos_are_part_of_the_length() -> None:
    demos = Candidate({"self": "short"}, demo_set=0, demos={"self": "[a long demo]"})
    with_demos = replace(trial("", *BEST.scores), candidate=demos)
    assert demos.length == len("short[a long demo]")
    assert shortest_tied(Trajectory().add(STUDENT, BEST, with_demos)) is BEST


def test_a_gain_says_which_examples_it_was_measured_on() -> None:
    """Also during a run, and of a stopped one: its unseen examples are not scored yet."""
    fresh = Gain(True, 0.2, Interval(0.25, 0.1, 0.4, 0.95, 40, "fresh"), 0.3, 0.55)
    numbers = "gain +0.250 (95% interval +0.100 to +0.400, 40 examples)"
    assert str(fresh) == f"unseen examples: 0.300 -> 0.550, {numbers}"
    selected = replace(fresh, interval=replace(fresh.interval, basis="selected"))
    measured = "measured on the examples that also chose the candidate, and corrected for that"
    assert str(selected) == f"{measured}: {numbers}"
