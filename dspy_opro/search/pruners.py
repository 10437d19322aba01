"""Pruners: they decide at which checkpoints a race compares its candidates, and which of them it drops there."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from .trajectory import paired_difference


@dataclass(frozen=True)
class Race:
    """A round's race at a checkpoint: every candidate still in it has scores for the same prefix."""

    incumbent: Sequence[float]
    """The incumbent's scores on all train examples, in the order of the race."""
    scores: Mapping[str, Sequence[float]]
    """Candidate id -> its scores so far, in the order of proposal."""
    num_started: int
    """Candidates at the start of the race."""
    bounded: bool
    """Whether all scores seen lie within [0, 1]."""

    @property
    def num_scored(self) -> int:
        """Examples that each candidate in the race has been scored on."""
        return len(next(iter(self.scores.values())))

    @property
    def num_examples(self) -> int:
        """Examples of the whole race."""
        return len(self.incumbent)

    def difference(self, candidate: str) -> float:
        """The mean paired difference of a candidate's scores to the incumbent's."""
        return paired_difference(self.scores[candidate], self.incumbent)


class Pruner(Protocol):
    """Decides at fixed checkpoints which candidates leave the race. `Halving` is an example.

    With `independent = True` its decisions depend only on the race that it gets. Rounds then race at the same time, and
    each of them in an order of its own. Without it every race takes the examples in the run's order.

    If it has a method `sure_to_go_on` like `Halving`'s, candidates that it names need not wait at the checkpoint for
    the scores of others.
    """

    def checkpoints(self, num_examples: int, num_candidates: int) -> Sequence[int]:
        """Numbers of examples after which the race calls `drop`, ascending. The last one is `num_examples`.

        Args:
            num_examples: Train examples of the race, at least 1.
            num_candidates: Candidates at its start, at least 1.
        """

    def drop(self, race: Race) -> Mapping[str, str]:
        """Candidate id -> the reason why it leaves now. `race` has the candidates that are still in the race."""

    def most_calls(self, num_examples: int, num_candidates: int) -> int:
        """An upper bound on the examples that one round scores."""


def cannot_win(scores: Sequence[float], incumbent: Sequence[float]) -> bool:
    """Whether perfect answers to the rest would still not lift the sum above the incumbent's.

    Exact for scores within [0, 1]: the remaining examples give at most 1 each. `math.fsum` rounds once and
    is monotone, like the `mean` that decides who wins, so that rounding never drops a winner.
    """
    missing = len(incumbent) - len(scores)
    return math.fsum([*scores, missing]) <= math.fsum(incumbent)


@dataclass(frozen=True)
class Halving:
    """Successive halving on paired differences to the incumbent, with the exact bound on top.

    Karnin et al., "Almost Optimal Exploration in Multi-Armed Bandits" (ICML 2013), on examples shared by
    all candidates, so that the easy and the hard ones cancel in the difference.

    Args:
        first: Examples that every candidate is scored on before the first decision, at least 1.
        keep: Share of the candidates that goes on after a checkpoint, in (0, 1).
        slack: A candidate leaves once its mean paired difference is below `-slack` standard errors, at least 0.

    docs/decisions/0005-racing.md has the figures behind the defaults.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> from dspy_opro import Halving, OPROTeleprompter
        >>> Halving(first=5).checkpoints(num_examples=40, num_candidates=8)
        [5, 10, 20, 40]
        >>> def exact(example, prediction):
        ...     return example.answer == prediction.answer
        >>> teleprompter = OPROTeleprompter(metric=exact, pruner=Halving(first=5))
    """

    first: int = 4
    keep: float = 0.5
    slack: float = 0.0
    independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.first < 1:
            raise ValueError(f"first must be at least 1, but got {self.first}.")
        if not 0.0 < self.keep < 1.0:
            raise ValueError(f"keep must lie between 0 and 1, but got {self.keep}.")
        if not self.slack >= 0.0:
            raise ValueError(f"slack must be at least 0, but got {self.slack}.")

    def checkpoints(self, num_examples: int, num_candidates: int) -> Sequence[int]:
        """`first` examples, and then twice as many each time."""
        ends = [min(self.first, num_examples)]
        while ends[-1] < num_examples:
            ends.append(min(2 * ends[-1], num_examples))
        if len(ends) > 1 and ends[-1] - ends[-2] < ends[-2] // 2:  # no very short last block
            del ends[-2]
        return ends

    def drop(self, race: Race) -> Mapping[str, str]:
        """Those that cannot win, the worse share of the others, and those that are behind the incumbent."""
        dropped = {}
        if race.bounded:
            for candidate, scores in race.scores.items():
                if cannot_win(scores, race.incumbent):
                    dropped[candidate] = "cannot win any more"
        if race.num_scored == race.num_examples:
            return dropped
        alive = [c for c in race.scores if c not in dropped]
        alive.sort(key=race.difference, reverse=True)  # stable: among equals the earlier proposal leads
        places = self._places(race, race.num_scored)
        for rank, candidate in enumerate(alive):
            if rank >= places:
                dropped[candidate] = f"ranked {rank + 1} of {len(alive)} after {race.num_scored} examples"
            elif self._behind(race, candidate):
                dropped[candidate] = f"behind the incumbent after {race.num_scored} examples"
        return dropped

    def sure_to_go_on(self, race: Race, num_examples: int) -> Collection[str]:
        """Who goes on after the checkpoint at `num_examples`, whatever the missing scores within [0, 1] are.

        Args:
            race: With the scores that are known. A candidate that misses some has fewer than `num_examples`, without
                gaps, so that they are in the order of the race but not position by position the incumbent's.
            num_examples: A checkpoint.

        Returns:
            Ids of candidates without missing scores.
        """
        if not race.bounded:
            return ()
        places = self._places(race, num_examples)
        most = {c: math.fsum([*scores, num_examples - len(scores)]) for c, scores in race.scores.items()}
        return [
            candidate
            for candidate, scores in race.scores.items()
            if len(scores) == num_examples
            and not cannot_win(scores, race.incumbent)
            and not self._behind(race, candidate)
            # A tie counts as a lost place, and so does what rounding may turn into one.
            and sum(other >= most[candidate] - 1e-9 for other in most.values()) <= places
        ]

    def _places(self, race: Race, num_examples: int) -> int:
        """How many go on after this checkpoint: a function of its index, whoever left before."""
        ends = self.checkpoints(race.num_examples, race.num_started)
        return max(1, math.ceil(race.num_started * self.keep ** (list(ends).index(num_examples) + 1)))

    def _behind(self, race: Race, candidate: str) -> bool:
        differences = [s - r for s, r in zip(race.scores[candidate], race.incumbent, strict=False)]
        count = len(differences)
        average = sum(differences) / count
        variance = sum((d - average) ** 2 for d in differences) / max(1, count - 1)
        # Rounding does not turn a tie into a loss: 0.1 + 0.2 is not 0.3.
        return average < -(self.slack + 1e-9) * math.sqrt(variance / count)

    def most_calls(self, num_examples: int, num_candidates: int) -> int:
        """As if no candidate left for being behind the incumbent."""
        calls, done = 0, 0
        for index, end in enumerate(self.checkpoints(num_examples, num_candidates)):
            calls += max(1, math.ceil(num_candidates * self.keep**index)) * (end - done)
            done = end
        return calls


@dataclass(frozen=True)
class ScoreAll:
    """Every candidate is scored on every example (`pruner=None`, and the paper)."""

    independent: ClassVar[bool] = True

    def checkpoints(self, num_examples: int, num_candidates: int) -> Sequence[int]:
        return [num_examples]

    def drop(self, race: Race) -> Mapping[str, str]:
        return {}

    def most_calls(self, num_examples: int, num_candidates: int) -> int:
        return num_examples * num_candidates
