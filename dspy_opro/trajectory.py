"""The values of a search: candidates, trials and the trajectory; none of them changes once made."""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

State = Literal["complete", "pruned", "failed"]


@dataclass(frozen=True)
class Outcome:
    """What one example gave: a score in the metric's own scale, and what the meta-prompt shows of it."""

    score: float
    output: str = ""
    """The prediction as short text."""
    feedback: str = ""
    """What the metric said beside the score."""
    error: str | None = None
    """The cause, where program or metric failed and `score` is the failure score."""
    subscores: Mapping[str, float] | None = None
    """Further numbers that the metric returned, name -> value."""


@dataclass(frozen=True)
class Candidate:
    """One set of instructions for the whole program."""

    instructions: Mapping[str, str]
    """Predictor name -> task text."""
    round: int = 0
    """The round that proposed it; 0 is the student itself."""
    parent: str | None = None
    """Id of the candidate that it rewrites."""
    rewritten: tuple[str, ...] = ()
    """Names of the predictors whose text differs from the parent's."""
    demo_set: int | None = None
    """Index of its set of demos; None keeps the student's own."""

    @cached_property
    def id(self) -> str:
        """sha256 over the canonical instructions (and the demo set): equal programs have equal ids."""
        canonical = {name: normalise(text) for name, text in self.instructions.items()}
        content: object = canonical if self.demo_set is None else [canonical, self.demo_set]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def normalise(text: str) -> str:
    """Text with runs of white space folded: two proposals that differ in nothing else are one."""
    return " ".join(text.split())


@dataclass(frozen=True)
class Trial:
    """A candidate whose race has ended."""

    candidate: Candidate
    reward: float
    """Mean train score, or where the race ended early the incumbent's mean plus the mean paired difference."""
    num_scored: int
    """Train examples behind `reward`."""
    state: State = "complete"
    reason: str = ""
    """Why the race ended for it, in words."""
    valset_score: float | None = None
    num_failures: int = 0
    scores: Sequence[float] = field(default=(), repr=False)
    """Train scores by position in the race's order, the first `num_scored`."""

    @property
    def id(self) -> str:
        return self.candidate.id


@dataclass(frozen=True)
class Trajectory:
    """Every finished trial, in order."""

    trials: tuple[Trial, ...] = ()
    score_range: tuple[float, float] = (0.0, 1.0)
    """Lowest and highest score of any example, and at least [0, 1] where all scores lie within it."""

    def __len__(self) -> int:
        return len(self.trials)

    def add(self, *trials: Trial) -> Trajectory:
        seen = [s for t in trials for s in t.scores]
        if self.trials:
            seen.extend(self.score_range)
        low, high = min(seen, default=0.0), max(seen, default=1.0)
        if low >= 0.0 and high <= 1.0:
            low, high = 0.0, 1.0
        grown = Trajectory(self.trials + trials, (low, high))
        # Found among the new trials alone: a search over all of them in every round would be quadratic.
        grown.__dict__["_leaders"] = _lead(trials, *self._leaders)
        return grown

    @cached_property
    def _leaders(self) -> _Leaders:
        return _lead(self.trials)

    @property
    def incumbent(self) -> Trial:
        """The best fully scored trial on the trainset; among equals the first."""
        incumbent, _ = self._leaders
        if incumbent is None:
            raise ValueError("No trial is scored in full.")
        return incumbent

    @property
    def best(self) -> Trial:
        """What a run returns: best on the valset where there is one, else the incumbent."""
        return self._leaders[1] or self.incumbent

    @cached_property
    def ranked(self) -> Sequence[Trial]:
        """The trials in ascending order of reward; among equals the later one last."""
        return sorted(self.trials, key=lambda t: t.reward)

    def top(self, k: int) -> Sequence[Trial]:
        """The `k` best trials, ascending, so that the best comes last (OPRO, section 4.2)."""
        return self.ranked[-k:]

    def top_texts(self, predictor: str, k: int) -> list[tuple[str, float]]:
        """The `k` best texts of one predictor, ascending; a text in several trials has its best reward."""
        rewards: dict[str, float] = {}  # text -> reward
        for trial in reversed(self.ranked):
            rewards.setdefault(trial.candidate.instructions[predictor], trial.reward)
            if len(rewards) == k:
                break
        return list(rewards.items())[::-1]


_Leaders = tuple["Trial | None", "Trial | None"]


def _lead(trials: Iterable[Trial], on_train: Trial | None = None, on_val: Trial | None = None) -> _Leaders:
    """The best on the trainset and on the valset, the given ones included; among equals the first."""
    for trial in trials:
        if trial.state == "complete" and (on_train is None or trial.reward > on_train.reward):
            on_train = trial
        if trial.valset_score is not None and (
            on_val is None or trial.valset_score > (on_val.valset_score or 0.0)
        ):
            on_val = trial
    return on_train, on_val


def mean(values: Sequence[float]) -> float:
    """By `fsum`: equal scores in another order have an equal mean, so that ties are ties."""
    return math.fsum(values) / len(values)


def paired_difference(scores: Sequence[float], reference: Sequence[float]) -> float:
    """Mean of `scores[i] - reference[i]` over the examples that `scores` covers."""
    return math.fsum(s - r for s, r in zip(scores, reference, strict=False)) / len(scores)


def to_array(values: Iterable[float]) -> array[float]:
    return array("d", values)


def percent(reward: float, low: float = 0.0, high: float = 1.0) -> int:
    """A reward as an integer score from 0 to 100, the form the paper shows (section 4.2: 100 buckets)."""
    share = (reward - low) / (high - low) if high > low else 0.0
    return max(0, min(100, round(100 * share)))
