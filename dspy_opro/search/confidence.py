"""How sure a gain is: intervals of paired differences, and whether a candidate is better than the student.

`compare` is the rule: score differences go in, and figures come out. It does not know where the scores are from. A
difference is the candidate's score minus the student's on one example, so that easy and hard examples cancel. What the
search chose a candidate by flatters it; examples that the search never used do not.
docs/decisions/0014-honest-scores.md has the reasons, 0025-lower-bar.md the figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal, NamedTuple

from .reserve import FEWEST_FRESH
from .trajectory import Outcome, Trajectory, Trial, mean

Basis = Literal["fresh", "selected"]

PROOF = 0.75
"""How probable a gain must be for the candidate to be returned, given fresh examples. Decision 0025 has the figures."""
PROOF_WITHOUT_FRESH = 0.90
"""The same without fresh examples."""
ADDED = 0.6
"""How much of a pair `standard_error` adds."""

TIE = 0.25
"""Standard errors of the mean paired difference up to which two candidates are as good as each other."""

_NORMAL = NormalDist()


@dataclass(frozen=True)
class Interval:
    """A candidate's gain over the student, and a range that holds the true gain with a probability of `level`."""

    estimate: float
    """The expected gain, in the metric's own scale."""
    low: float
    """The lower end of the range."""
    high: float
    """The upper end of the range."""
    level: float
    """The probability that the range holds the true gain, in (0, 1)."""
    num_examples: int
    """The examples on which both were scored."""
    basis: Basis
    """"fresh": on examples that the search never used. "selected": on the search's own examples, corrected for that."""


class Comparison(NamedTuple):
    """What `compare` says of a candidate: whether it is returned, what to expect beyond the student, its interval."""

    is_better: bool
    gain: float
    interval: Interval


@dataclass(frozen=True)
class Gain:
    """The best candidate's gain over the student, as far as it is known at the end of a run."""

    is_proven: bool
    """Whether the evidence favours the candidate, so that a run that confirms its result returns it. Otherwise such a
    run returns the student."""
    value: float
    """The expected gain of the returned program: 0 for the student itself, and where unseen scores are equal. It is the
    interval's estimate where the run confirms nothing, because the candidate is then returned in any case."""
    interval: Interval
    """The interval of the best candidate, whether the run returned it or not."""
    student_score: float
    """The student's mean score on the examples behind the interval."""
    candidate_score: float
    """The candidate's mean score on the same examples."""

    def __str__(self) -> str:
        i = self.interval
        bounds = f"{i.level:.0%} interval {i.low:+.3f} to {i.high:+.3f}"
        gain = f"gain {i.estimate:+.3f} ({bounds}, {i.num_examples} examples)"
        if i.basis == "fresh":
            return f"unseen examples: {self.student_score:.3f} -> {self.candidate_score:.3f}, {gain}"
        return f"measured on the examples that also chose the candidate, and corrected for that: {gain}"


def measured_gain(
    trajectory: Trajectory,
    best: Trial,
    student: Sequence[Outcome | None],
    candidate: Sequence[Outcome | None],
    *,
    confirms: bool,
) -> Gain | None:
    """The gain of a trial over the student; None if the trial is the student's.

    Args:
        trajectory: The student's trial is the first.
        best: The trial that `shortest_tied` found.
        student: The student's outcomes on unseen examples, by position.
        candidate: Those of the chosen trial.
        confirms: Whether the run confirms its result. Otherwise it returns the candidate in any case.
    """
    first, tried = trajectory.trials[0], trajectory.trials[1:]
    if best.id == first.id:
        return None
    on_valset = best.valset_score is not None
    if on_valset:
        tried = tuple(t for t in tried if t.valset_score is not None)
    share = 1.0 if on_valset else mean([t.num_scored for t in tried]) / first.num_scored
    searched = (first.valset_scores, best.valset_scores) if on_valset else (first.scores, best.scores)
    unseen = zip(student, candidate, strict=False)
    pairs = [(s.score, c.score) for s, c in unseen if s is not None and c is not None]
    is_fresh = len(pairs) >= FEWEST_FRESH
    rows: Sequence[Sequence[float]] = list(zip(*pairs, strict=True)) if is_fresh else searched
    low, high = trajectory.score_range
    compared = compare(
        _differences(*searched),
        len(tried),
        _differences(*rows) if is_fresh else (),
        share=share,
        scale=max(high - low, 1e-9),
    )
    gain = Gain(*compared, mean(rows[0]), mean(rows[1]))
    return gain if confirms else replace(gain, value=gain.interval.estimate)


def _differences(student: Sequence[float], candidate: Sequence[float]) -> list[float]:
    return [c - s for s, c in zip(student, candidate, strict=True)]


def compare(
    search: Sequence[float],
    num_tried: int,
    fresh: Sequence[float] = (),
    *,
    share: float = 1.0,
    level: float = 0.95,
    scale: float = 1.0,
) -> Comparison:
    """Decide whether the best candidate is returned or the student.

    Two estimates are averaged by their precision: the mean of the fresh differences, and the mean of the search's
    less `luck(num_tried, share)` of its standard errors. The candidate is returned where a gain is at least `PROOF`
    probable and the fresh mean is not below 0.

    The fresh mean is reported only when it is high, so on average it is too high. The gain is less by what the mean of
    a normal distribution that is cut off at the bar lies above that of the whole one: the average's standard error
    times pdf(x) / cdf(x), x being how far the average lies above the bar in standard errors. (The average's covariance
    with the fresh mean is its own variance, so that no further factor is needed.)

    Args:
        search: Differences on the examples that the search chose by: the valset's where it decided, else the
            trainset's. At least one.
        num_tried: Candidates that were compared on them at least in part, the student apart; with a valset those
            that were scored on it.
        fresh: Differences on examples that the search never used; none where there are none.
        share: Of the search's examples, what these candidates were scored on, on average.
        level: Of the interval.
        scale: The most that a difference can be; 1 for scores within [0, 1].

    Raises:
        ValueError: There are no differences of the search, or a number is out of its range.
    """
    error = standard_error(search, scale)
    estimate = mean(search) - luck(num_tried, share) * error
    if fresh:
        interval, fresh_error = paired_interval(fresh, level, scale), standard_error(fresh, scale)
        weight = error**2 / (error**2 + fresh_error**2)  # of the fresh mean
        average = weight * interval.estimate + (1 - weight) * estimate
        error, told, proof = fresh_error * math.sqrt(weight), interval.estimate, PROOF
    else:
        interval = selected_interval(search, num_tried, share=share, level=level, scale=scale)
        average = told = estimate
        proof = PROOF_WITHOUT_FRESH
    above = average / error - _NORMAL.inv_cdf(proof)
    if above <= 0 or told < 0:
        return Comparison(False, 0.0, interval)
    return Comparison(True, max(0.0, told - error * _NORMAL.pdf(above) / _NORMAL.cdf(above)), interval)


def shortest_tied(trajectory: Trajectory) -> Trial:
    """The best trial, or of the candidates that are as good the one with the shortest prompt.

    A candidate is as good if the best one's mean is at most `TIE` standard errors above its own, over the examples that
    decide. docs/decisions/0017-shorter-among-equals.md has the figures. The student is no such candidate: `compare`
    compares it with what is found here. Nor is a candidate whose score is not above the student's.
    """
    best, student = trajectory.best, trajectory.trials[0]
    if best.id == student.id:
        return best
    tied, (low, high) = [best], trajectory.score_range
    for trial in trajectory.trials[1:]:
        on_valset = trial.valset_score is not None
        if (
            trial.state != "complete"
            or on_valset != (best.valset_score is not None)
            or trial.score <= student.score
        ):
            continue
        pairs = zip(*((t.valset_scores if on_valset else t.scores) for t in (best, trial)), strict=True)
        behind = [b - s for b, s in pairs]
        if mean(behind) <= TIE * standard_error(behind, max(high - low, 1e-9)):
            tied.append(trial)
    return min(tied, key=lambda trial: trial.candidate.length)


def luck(num_tried: int, share: float = 1.0) -> float:
    """By how many standard errors the best of many flatters itself where they hardly differ.

    The best of n that are scored in full are `expected_best(n)` above what they truly are. In a race most leave
    early: who is chosen by a share of the examples has, on all of them, the root of that share of the luck, as that is
    the correlation of the two means.

    Args:
        num_tried: Candidates, at least 1.
        share: Of the examples, what they were scored on, on average; in (0, 1].

    Raises:
        ValueError: A number is out of its range.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must be above 0 and at most 1, but got {share!r}.")
    return expected_best(num_tried) * math.sqrt(share)


def paired_interval(differences: Sequence[float], level: float = 0.95, scale: float = 1.0) -> Interval:
    """The interval of a mean paired difference on examples that nothing was chosen by.

    The mean plus and minus Student's t (one degree of freedom less than pairs) times `standard_error`. Of differences
    of -1, 0 and 1 it covers 93 to 97% if 6 or more pairs can be expected to differ (n up to 45, exactly computed). If
    fewer differ it covers 83 to 100%: few outcomes are possible then, and the steps between them are coarse.

    Args:
        differences: At least one.
        level: In (0, 1).
        scale: The most that a difference can be. The interval is cut there, unless a difference lies beyond.

    Raises:
        ValueError: There are no differences, or a number is out of its range.
    """
    _check(level)
    error, count = standard_error(differences, scale), len(differences)
    reach = t_quantile((1 + level) / 2, count - 1) * error if count > 1 else math.inf
    return _interval("fresh", differences, mean(differences), (reach, reach), level, scale)


def selected_interval(
    differences: Sequence[float],
    num_tried: int,
    *,
    share: float = 1.0,
    level: float = 0.95,
    scale: float = 1.0,
) -> Interval:
    """The interval of the best of many on the very examples that it was chosen by.

    Its lower end is that of intervals that hold for all that were tried at once (Šidák, "Rectangular confidence regions
    for the means of multivariate normal distributions", Journal of the American Statistical Association 62, 1967); its
    upper end is as usual, as luck only flatters. Races that end early make it wider than it need be: it covers 96 to
    100%. Its estimate is the mean less `luck(num_tried, share)` standard errors, which is right where instructions
    hardly differ and too low where they differ much.

    Args:
        differences: At least one.
        num_tried: Candidates that were compared, at least 1.
        share: Of the examples, what they were scored on, on average; in (0, 1].
        level: In (0, 1).
        scale: The most that a difference can be.

    Raises:
        ValueError: There are no differences, or a number is out of its range.
    """
    _check(level)
    error, side = standard_error(differences, scale), (1 + level) / 2
    lucky = luck(num_tried, share) * error
    below = _NORMAL.inv_cdf(math.pow(side, 1 / num_tried)) * error
    reach = (below - lucky, _NORMAL.inv_cdf(side) * error + lucky)
    return _interval("selected", differences, mean(differences) - lucky, reach, level, scale)


def standard_error(differences: Sequence[float], scale: float = 1.0) -> float:
    """The standard error of a mean paired difference, above 0 for any data.

    0.6 of a pair is added, one half of it as a gain and one half as a loss, of the size of the differences that are not
    0 (their root mean square), or of `scale` if all are 0. Agresti and Min, "Simple improved confidence intervals for
    comparing matched proportions" (Statistics in Medicine 24, 2005), add whole pairs, which makes intervals too wide
    here. For graded scores the result is hardly more than the usual standard error.

    Args:
        differences: At least one.
        scale: The most that a difference can be, above 0.

    Raises:
        ValueError: There are no differences, one is no finite number, or `scale` is not above 0.
    """
    if not differences or not all(map(math.isfinite, differences)):
        raise ValueError(f"There must be differences, and all finite, but got {list(differences)!r}.")
    if not 0.0 < scale < math.inf:
        raise ValueError(f"scale must be above 0, but got {scale!r}.")
    count, squares = len(differences), math.fsum(d * d for d in differences)
    num_unequal = sum(d != 0 for d in differences)
    size = squares / num_unequal if squares else scale**2
    weight = count + ADDED
    variance = (squares + ADDED * size) / weight - (math.fsum(differences) / weight) ** 2
    return math.sqrt(variance / count)


def expected_best(num_draws: int) -> float:
    """About the mean of the largest of so many standard normal draws; 0 for one.

    Blom, "Statistical Estimates and Transformed Beta-Variables" (1958): the normal quantile of
    (n - 3/8) / (n + 1/4).

    Raises:
        ValueError: `num_draws` is below 1.
    """
    if num_draws < 1:
        raise ValueError(f"There must be at least 1 draw, but got {num_draws!r}.")
    return _NORMAL.inv_cdf((num_draws - 0.375) / (num_draws + 0.25))


def t_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t.

    Exact up to 60 degrees of freedom, by the finite series of Abramowitz and Stegun, "Handbook of Mathematical
    Functions" (1964), 26.7.3 and 26.7.4; beyond by their expansion 26.7.5, whose error there is below 1e-5 for
    probabilities from 0.0001 to 0.9999.

    Args:
        probability: Of a smaller value, in (0, 1).
        freedom: Degrees of freedom, at least 1.

    Raises:
        ValueError: A number is out of its range.
    """
    if not 0.0 < probability < 1.0 or freedom < 1:
        raise ValueError(f"There is no quantile of {probability!r} with {freedom!r} degrees of freedom.")
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    if freedom > 60:
        z = _NORMAL.inv_cdf(probability)
        first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
        third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
        return z + first / freedom + second / freedom**2 + third / freedom**3
    low, high = 0.0, math.pi / 2  # of the angle whose tangent is t / sqrt(freedom)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 2 * probability - 1 else (low, middle)
    return math.tan((low + high) / 2) * math.sqrt(freedom)


def _within(angle: float, freedom: int) -> float:
    """P(|t| < sqrt(freedom) * tan(angle))."""
    odd, cosine = freedom % 2, math.cos(angle)
    term, total = cosine if odd else 1.0, 0.0
    for power in range(2 + odd, freedom + 1, 2):
        total += term
        term *= cosine**2 * (power - 1) / power
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total


def _check(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, but got {level!r}.")


def _interval(
    basis: Basis,
    differences: Sequence[float],
    estimate: float,
    reach: tuple[float, float],
    level: float,
    scale: float,
) -> Interval:
    """The interval from `reach` below the estimate to `reach` above it, within what differences can be."""
    most = scale if all(abs(d) <= scale for d in differences) else math.inf
    low, high = max(-most, estimate - reach[0]), min(most, estimate + reach[1])
    return Interval(estimate, low, high, level, len(differences), basis)
