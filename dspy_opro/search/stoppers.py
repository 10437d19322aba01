"""Stoppers: each looks at the state of a run after every round, and answers with a reason to stop or with None."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .trajectory import Trajectory, Usage


@dataclass(frozen=True)
class RunState:
    """What a stopper sees.

    Example:
        >>> from dspy_opro import OPROTeleprompter, RunState
        >>> def good_and_cheap(state: RunState):
        ...     if state.best_score >= 0.9 and state.usage.cost < 1.0:
        ...         return "good enough for less than a dollar"
        >>> def exact(example, prediction):
        ...     return example.answer == prediction.answer
        >>> teleprompter = OPROTeleprompter(metric=exact, stoppers=[good_and_cheap])
    """

    round: int
    """The last round that was decided; 0 is the student's own score."""
    trajectory: Trajectory
    """All decided trials so far, in order."""
    best_scores: Sequence[float]
    """Best score after each round so far, from round 0. If the valset chooses the result, these are valset scores."""
    usage: Usage
    """What all processes of the run have spent so far."""
    seconds: float
    """Wall time of this run so far."""

    @property
    def best_score(self) -> float:
        """The best score so far."""
        return self.best_scores[-1]


Stopper = Callable[[RunState], "str | None"]
"""Returns the reason to stop, which becomes `stop_reason`, or None to go on."""


@dataclass(frozen=True)
class Patience:
    """Ends the run after `patience` rounds in a row that did not raise the best score by more than `min_delta`."""

    patience: int
    min_delta: float = 0.0

    def __call__(self, state: RunState) -> str | None:
        mark, last_gain = state.best_scores[0], 0
        for number, score in enumerate(state.best_scores):
            if score > mark + self.min_delta:
                mark, last_gain = score, number
        return "patience" if state.round - last_gain >= self.patience else None


@dataclass(frozen=True)
class StopAtScore:
    """Ends the run when the best score reaches `score`, in the metric's own scale."""

    score: float

    def __call__(self, state: RunState) -> str | None:
        return "stop_at_score" if state.best_score >= self.score else None


def first_reason(stoppers: Sequence[Stopper], state: RunState) -> str | None:
    """The reason of the first stopper that has one. Another answer is a TypeError."""
    for stopper in stoppers:
        answer: Any = stopper(state)
        if hasattr(answer, "item"):  # a bool of numpy
            answer = answer.item()
        if answer is None or answer is False or answer == "":
            continue
        if answer is True:
            return getattr(stopper, "__name__", type(stopper).__name__)
        if not isinstance(answer, str):
            raise TypeError(f"A stopper must return a reason or None, but {stopper!r} returned {answer!r}.")
        return answer
    return None
