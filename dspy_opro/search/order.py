"""The order in which a round's race scores the train examples: first those that the candidates so far disagree on.

On most examples two prompts score the same, so a race over those tells nothing. docs/decisions/0019-contested-first.md
has the figures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from .trajectory import Trajectory, scores_by_example, squared_distances

NUM_TRIALS = 64
"""The last so many trials say where candidates disagree."""
PRIOR = 0.5
"""The usual variance counts as much as this number of further scores of an example."""


@dataclass(frozen=True)
class RaceOrder:
    """The positions of all train examples as a race takes them."""

    positions: Sequence[int]
    expected: Sequence[float]
    """In the same order, how much candidates are expected to differ there: variances of scores, all above 0."""

    @classmethod
    def fixed(cls, num_examples: int) -> RaceOrder:
        """By position, where nothing is known of the disagreement."""
        return cls(range(num_examples), [1.0] * num_examples)

    @classmethod
    def contested_first(cls, trajectory: Trajectory, num_examples: int) -> RaceOrder:
        """By the variance of the known scores, the largest first, and among equals by position.

        An example's variance is averaged with the usual one, which counts as `PRIOR` scores, so that few scores do
        not move an example far.
        """
        columns = scores_by_example(trajectory.trials[-NUM_TRIALS:], num_examples)
        squares, freedom = [squared_distances(c) for c in columns], [max(0, len(c) - 1) for c in columns]
        usual = sum(squares) / max(1, sum(freedom))
        if usual <= 0.0:
            return cls.fixed(num_examples)
        variances = [(s + PRIOR * usual) / (f + PRIOR) for s, f in zip(squares, freedom, strict=True)]
        positions = sorted(range(num_examples), key=lambda p: -variances[p])
        return cls(positions, [variances[p] for p in positions])

    def arrange(self, scores: Mapping[int, float]) -> list[float]:
        """Scores by position in the order of the race, as far as there are any."""
        known = (scores[position] for position in self.positions if position in scores)
        # A race scores the first positions, so this rarely looks at all of them.
        return list(islice(known, len(scores)))

    def difference(self, scores: Sequence[float], incumbent: Sequence[float]) -> float:
        """The mean difference to the incumbent on all examples, estimated from the first ones of the race.

        The ratio estimator: the differences spread over the examples as the expected ones do. (Cochran, "Sampling
        Techniques", 1977, chapter 6.) With a fixed order it is the mean difference on the first ones.
        """
        seen = math.fsum(s - r for s, r in zip(scores, incumbent, strict=False))
        average = math.fsum(self.expected) / len(self.expected)
        return seen * average / math.fsum(self.expected[: len(scores)])
