"""Default sizes that depend on the length of a run or on the size of the data."""

from __future__ import annotations

import math

PAPER_CANDIDATES = 8
"""Proposals per round: section 5.1 of the paper."""
MOST_CANDIDATES = 64
"""The default for candidates per round never exceeds this."""
LEAST_TO_VALIDATE = 512
"""With fewer metric calls, validating each round's winner on 16 examples leaves too few rounds."""


def usual_candidates(num_rounds: float) -> int:
    """Candidates per round for a run that can afford `num_rounds` rounds of 8 (infinite where nobody knows).

    A larger budget gives larger rounds, as long as about eight rounds remain:
    docs/decisions/0010-larger-rounds.md has the figures.
    """
    if num_rounds == math.inf:
        return 2 * PAPER_CANDIDATES
    size = PAPER_CANDIDATES
    while num_rounds >= 15 and size < MOST_CANDIDATES:
        size, num_rounds = 2 * size, num_rounds / 2
    return size


def usual_lag(num_rounds: float) -> int:
    """The lag for a run of at most `num_rounds` rounds.

    Three overlapping rounds keep 16 threads busy. But the first `lag` rounds know little more than the student's
    score, so a short run overlaps fewer rounds: docs/decisions/0006-lag.md has the figures.
    """
    return min(3, int(min(num_rounds, 12)) // 4)


def usual_first(num_examples: int) -> int:
    """`Halving.first` for a race over `num_examples` examples: 4, or less in a short race."""
    return min(4, max(2, num_examples // 6))


def affordable_examples(num_calls: int) -> int:
    """How many train examples a full score has in a run that may score `num_calls` examples.

    Every winner of a round gets a full score. A full score above 1/32 of the budget leaves too few rounds:
    docs/decisions/0007-small-budgets.md has the figures.
    """
    return max(16, num_calls // 32)


def useful_examples(num_calls: int) -> int:
    """How many train examples a full score takes where there are enough besides those that are held back.

    Real instructions give most examples the same answers, so few examples can't tell them apart. The best number grows
    like the square root of the budget, up to 48: docs/decisions/0031-more-examples.md has the figures.
    """
    return max(affordable_examples(num_calls), min(48, round(1.75 * math.sqrt(num_calls))))
