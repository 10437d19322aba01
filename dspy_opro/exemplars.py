"""Which examples the meta-prompt shows: those that tell the candidates apart, failures and successes mixed."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .trajectory import Outcome, Trajectory
from .work import View


def choose(view: View, count: int, generator: random.Random, at_random: bool = False) -> list[int]:
    """Positions of up to `count` examples.

    Args:
        view: What is known when the proposals are asked for.
        count: How many to show.
        generator: Seeded; two slots of a round see different examples.
        at_random: The paper's choice (section 4.2): uniformly, whatever their scores.
    """
    positions = list(range(len(view.outcomes)))
    generator.shuffle(positions)
    scored = {p: o for p in positions if (o := view.outcomes[p]) is not None}
    if at_random or not scored:
        return positions[:count]
    spread = disagreement(view.trajectory, len(positions))
    # Of the examples that the leading candidates disagree on most, a random half: enough to differ by slot.
    ranked = sorted(scored, key=lambda p: spread[p] + 0.25 * generator.random(), reverse=True)
    ceiling = max(o.score for o in scored.values())
    failures = [p for p in ranked if scored[p].score < ceiling]
    successes = [p for p in ranked if scored[p].score >= ceiling]
    num_failures = min(len(failures), max((count + 1) // 2, count - len(successes)))
    return failures[:num_failures] + successes[: count - num_failures]


def disagreement(trajectory: Trajectory, num_positions: int, leaders: int = 8) -> list[float]:
    """Variance of the best candidates' scores, by position; 0 where fewer than two were scored there."""
    columns: list[list[float]] = [[] for _ in range(num_positions)]
    for trial in trajectory.top(leaders):
        for column, score in zip(columns, trial.scores, strict=False):
            column.append(score)
    return [_variance(column) for column in columns]


def _variance(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    average = sum(values) / len(values)
    return sum((v - average) ** 2 for v in values) / len(values)


def verdict(outcome: Outcome | None, low: float, high: float) -> str:
    """An outcome's score in the words of the meta-prompt."""
    if outcome is None:
        return "not scored yet"
    if outcome.error is not None:
        return f"failed: {outcome.error}"
    if high > low and outcome.score >= high:
        return "correct"
    return "wrong" if outcome.score <= low else f"score {100 * (outcome.score - low) / (high - low):.0f}"
