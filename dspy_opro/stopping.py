"""When a run ends: stoppers answer with the reason; the ledger counts what was spent, cache hits apart."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from operator import add, attrgetter, sub
from typing import Any

from .trajectory import Trajectory


@dataclass(frozen=True)
class Usage:
    """What was spent. Adds up."""

    metric_calls: int = 0
    """Examples scored, answered from a cache or not."""
    scorer_calls: int = 0
    """LM calls that the program and an LM metric made and a provider answered."""
    proposer_calls: int = 0
    """LM calls of the proposer that a provider answered."""
    cached_calls: int = 0
    """LM calls answered from DSPy's cache; they cost nothing and count towards no budget."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    """US dollars, as far as the LMs' prices are known."""

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(*map(add, _values(self), _values(other)))

    def __sub__(self, other: Usage) -> Usage:
        return Usage(*map(sub, _values(self), _values(other)))


_values: Callable[[Usage], tuple[Any, ...]] = attrgetter(*(f.name for f in fields(Usage)))
"""In the order of the fields. Four usages are added for every example, so that it should not take long."""


class Ledger:
    """The one count of a run's spending, safe to add to from any thread."""

    def __init__(self, spent: Usage = Usage()) -> None:
        self._usage = spent
        self._lock = threading.Lock()

    @property
    def usage(self) -> Usage:
        return self._usage

    def add(self, usage: Usage) -> None:
        with self._lock:
            self._usage = self._usage + usage


@dataclass(frozen=True)
class RunState:
    """What a stopper sees."""

    round: int
    """The last round that was decided; 0 is the student's own score."""
    trajectory: Trajectory
    best_scores: Sequence[float]
    """Best score after each round so far, from round 0: on the valset where there is one."""
    usage: Usage
    seconds: float
    """Wall time of this run so far."""

    @property
    def best_score(self) -> float:
        return self.best_scores[-1]


Stopper = Callable[[RunState], "str | None"]
"""Answers with the reason to stop (shown as `stop_reason`), or None to go on."""


@dataclass(frozen=True)
class MaxRounds:
    num_rounds: int

    def __call__(self, state: RunState) -> str | None:
        return "num_rounds" if state.round >= self.num_rounds else None


@dataclass(frozen=True)
class Patience:
    """Ends after `patience` rounds in a row that did not lift the best score by more than `min_delta`."""

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
    score: float

    def __call__(self, state: RunState) -> str | None:
        return "stop_at_score" if state.best_score >= self.score else None


@dataclass(frozen=True)
class Budget:
    """Limits that hold between any two calls: nothing new is started once one of them is reached."""

    max_tokens: int | None = None
    max_cost: float | None = None
    timeout_seconds: float | None = None

    def exhausted(self, usage: Usage, seconds: float) -> str | None:
        if self.max_tokens is not None and usage.tokens >= self.max_tokens:
            return "max_tokens"
        if self.max_cost is not None and usage.cost >= self.max_cost:
            return "max_cost"
        if self.timeout_seconds is not None and seconds >= self.timeout_seconds:
            return "timeout_seconds"
        return None


def first_reason(stoppers: Sequence[Stopper], state: RunState) -> str | None:
    """The first stopper's reason, in their order; TypeError where one answers with anything else."""
    for stopper in stoppers:
        answer: object = stopper(state)
        if answer is None or answer is False:
            continue
        if answer is True:
            return getattr(stopper, "__name__", type(stopper).__name__)
        if not isinstance(answer, str):
            raise TypeError(f"A stopper must return a reason or None, but {stopper!r} returned {answer!r}.")
        return answer
    return None
