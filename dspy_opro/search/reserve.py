"""How many examples the search never sees, so that they can confirm what it found."""

from __future__ import annotations

SHARE = 0.15
"""Of every budget, for the student and the best candidate on the examples that were held back."""
FEWEST_SEARCHED = 20
"""Examples that the search has at least, as far as there are so many."""
FEWEST_FRESH = 8
"""Fewer say too little to be worth their calls."""
USEFUL_FRESH = 40
"""So many validation examples are worth their calls, even if the trainset has fewer."""


def held_back(num_available: int, num_wanted: int, max_metric_calls: int | None = None) -> int:
    """Examples to hold back from the search.

    What the search would not use anyway is free. Beyond that a third is held back, and no more than the budget's share
    pays for twice, once for the student and once for the candidate. Without a budget it is as many as a full score
    has: in a preset that is about the same share.

    Args:
        num_available: Examples that were given.
        num_wanted: Examples that the search would score a winner on.
        max_metric_calls: The run's budget.

    Returns:
        0 where fewer than `FEWEST_FRESH` remain.
    """
    affordable = num_wanted if max_metric_calls is None else int(SHARE * max_metric_calls) // 2
    count = max(num_available - num_wanted, num_available // 3)
    count = min(count, num_available - min(num_wanted, FEWEST_SEARCHED), affordable)
    return count if count >= FEWEST_FRESH else 0


def held_back_of_valset(num_val: int, num_wanted: int, max_metric_calls: int | None = None) -> int:
    """Validation examples that confirm the result. The search sees none of them.

    They are as many as a full score has, or `USEFUL_FRESH` if that is more, and no more than the budget's share pays
    for twice, once for the student and once for the candidate.

    Args:
        num_val: Validation examples that were given.
        num_wanted: Train examples that the search would score a winner on.
        max_metric_calls: The run's budget.

    Returns:
        0 where fewer than `FEWEST_FRESH` remain.
    """
    count = min(num_val, max(num_wanted, USEFUL_FRESH))
    if max_metric_calls is not None:
        count = min(count, int(SHARE * max_metric_calls) // 2)
    return count if count >= FEWEST_FRESH else 0


def num_pairs(num_held_back: int, num_unseen: int, num_spare: int, num_left: int | None = None) -> int:
    """Fresh examples that student and candidate are scored on at the end.

    Args:
        num_held_back: As `held_back` said.
        num_unseen: Examples that the search did not use: with a small budget more than were held back.
        num_spare: Further ones, which were kept for demos. Without a budget they fill up to `USEFUL_FRESH`.
        num_left: Metric calls that the budget has left; what the search did not spend makes up to twice as many pairs.

    Returns:
        0 where nothing is held back, and where the budget has nothing left, as after a stop from outside.
    """
    if not num_held_back:
        return 0
    if num_left is None:
        return min(num_held_back, num_unseen) + min(num_spare, max(0, USEFUL_FRESH - num_held_back))
    return max(0, min(2 * num_held_back, num_unseen + num_spare, num_left // 2))
