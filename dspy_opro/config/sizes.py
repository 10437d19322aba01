"""Sizes that a run has where the user gives none."""

from __future__ import annotations

import math

PAPER_CANDIDATES = 8
"""Proposals a round: section 5.1 of the paper."""
MOST_CANDIDATES = 64
"""Candidates a round that are chosen without being asked for."""


def usual_candidates(num_rounds: float) -> int:
    """Candidates a round for a run that can have so many rounds of 8; infinite where only time will tell.

    What a larger budget buys is larger rounds, as long as there are eight or so:
    docs/decisions/0010-larger-rounds.md has the figures.
    """
    if num_rounds == math.inf:
        return 2 * PAPER_CANDIDATES
    size = PAPER_CANDIDATES
    while num_rounds >= 15 and size < MOST_CANDIDATES:
        size, num_rounds = 2 * size, num_rounds / 2
    return size


def usual_lag(num_rounds: float) -> int:
    """A lag for a run of so many rounds at most.

    Three rounds under way keep 16 threads busy. But the first `lag` rounds know little more than the student's
    score, so that of few rounds few may overlap: docs/decisions/0006-lag.md has the figures.
    """
    return min(3, int(min(num_rounds, 12)) // 4)


def usual_first(num_examples: int) -> int:
    """`Halving.first` for so many examples: 4, and fewer where a whole race has few of them."""
    return min(4, max(2, num_examples // 6))


def affordable_examples(num_calls: int) -> int:
    """How many examples are "all of them" for a run that may score so many.

    Every winner is scored on all: one that costs more than a 32nd of the budget leaves too few rounds.
    docs/decisions/0007-small-budgets.md has the figures.
    """
    return max(16, num_calls // 32)
