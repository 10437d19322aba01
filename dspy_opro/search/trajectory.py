"""The values of a search: usage, outcomes, candidates, trials and the trajectory. None of them ever changes."""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from operator import add, attrgetter, sub
from typing import Any, Literal

State = Literal["complete", "pruned", "failed"]


@dataclass(frozen=True)
class Usage:
    """What was spent. Usages can be added and subtracted."""

    metric_calls: int = 0
    """Examples scored, answered from a cache or not."""
    scorer_calls: int = 0
    """LM calls that the program and an LM metric made and a provider answered."""
    proposer_calls: int = 0
    """LM calls that the proposer made and a provider answered."""
    cached_calls: int = 0
    """LM calls answered from DSPy's cache. They cost nothing and count towards no budget."""
    prompt_tokens: int = 0
    """Tokens that the LMs read, of paid calls."""
    completion_tokens: int = 0
    """Tokens that the LMs wrote, of paid calls."""
    cost: float = 0.0
    """US dollars, as far as the prices of the LMs are known."""
    unpriced_calls: int = field(default=0, compare=False)
    """Paid LM calls whose price is not known. `cost` leaves them out."""

    @property
    def tokens(self) -> int:
        """Tokens read and written."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(*map(add, _values(self), _values(other)))

    def __sub__(self, other: Usage) -> Usage:
        return Usage(*map(sub, _values(self), _values(other)))


_values: Callable[[Usage], tuple[Any, ...]] = attrgetter(*(f.name for f in fields(Usage)))
"""In the order of the fields. Usages are added for every example, so this must be fast."""


@dataclass(frozen=True)
class Outcome:
    """What one example gave: a score in the metric's own scale, and what the meta-prompt shows of it."""

    score: float
    output: str = ""
    """The prediction as short text."""
    feedback: str = ""
    """What the metric said beside the score."""
    error: str | None = None
    """The cause, if the program or the metric failed. `score` is then the failure score."""
    subscores: Mapping[str, float] | None = None
    """Further numbers that the metric returned, name -> value."""
    calls: Mapping[str, Mapping[str, Any]] | None = None
    """Predictor name -> its call, see `programs/tracing.py`. Only train examples have calls."""


def lowest_success(outcomes: Iterable[Outcome | None]) -> float:
    """The lowest score among the examples that did not fail if it is negative, otherwise infinity."""
    lowest = min((o.score for o in outcomes if o is not None and o.error is None), default=math.inf)
    return lowest if lowest < 0 else math.inf


def as_counted(outcome: Outcome, lowest: float) -> Outcome:
    """The outcome as it counts: a failed example scores no more than the student's `lowest_success`."""
    return outcome if outcome.error is None else replace(outcome, score=min(outcome.score, lowest))


@dataclass(frozen=True)
class Candidate:
    """One set of instructions for the whole program."""

    instructions: Mapping[str, str]
    """Predictor name -> task text."""
    round: int = 0
    """The round that proposed it; 0 is the student, and what a run takes over from an earlier plan."""
    parent: str | None = None
    """Id of the candidate that it rewrites."""
    rewritten: tuple[str, ...] = ()
    """Names of the predictors whose text differs from the parent's."""
    demo_set: int | None = None
    """Index of its set of demos; None keeps the student's own."""
    demos: Mapping[str, str] | None = field(default=None, compare=False, repr=False)
    """Predictor name -> the demos of that set, as JSON text."""

    @cached_property
    def id(self) -> str:
        """sha256 over the canonical instructions (and the demo set): equal programs have equal ids."""
        canonical = {name: normalise(text) for name, text in self.instructions.items()}
        content: object = canonical if self.demo_set is None else [canonical, self.demo_set]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def length(self) -> int:
        """Characters of its instructions and of the demos that it has besides the student's own."""
        return sum(map(len, (*self.instructions.values(), *(self.demos or {}).values())))


def normalise(text: str) -> str:
    """The text with single spaces. Two proposals that differ only in white space are the same candidate."""
    return " ".join(text.split())


@dataclass(frozen=True)
class Trial:
    """A candidate whose race has ended."""

    candidate: Candidate
    """What was scored."""
    reward: float
    """Mean train score. If the race ended early, an estimate, which may lie outside the range of the scores: the
    incumbent's mean plus the mean paired difference on all examples, as `RaceOrder.difference` expects it."""
    num_scored: int
    """Train examples behind `reward`."""
    state: State = "complete"
    """"complete": scored on all train examples. "pruned": dropped earlier. "failed": no score."""
    reason: str = ""
    """Why the race ended for it, in words."""
    valset_score: float | None = None
    """Mean score on the valset, if it was scored there."""
    num_failures: int = 0
    """Train and validation examples that failed."""
    scores: Sequence[float] = field(default=(), repr=False)
    """The `num_scored` train scores, by ascending position of their examples."""
    valset_scores: Sequence[float] = field(default=(), repr=False)
    """Validation scores by position; empty without a validation."""
    positions: Sequence[int] = field(default=(), repr=False)
    """Positions of `scores` in the run's order; empty where they are the first `num_scored`."""
    subscores: Mapping[str, float] = field(default_factory=dict, compare=False)
    """Name -> mean over the train examples that have it."""
    usage: Usage = field(default=Usage(), repr=False, compare=False)
    """What scoring it cost."""

    @property
    def id(self) -> str:
        return self.candidate.id

    @property
    def scores_by_position(self) -> Mapping[int, float]:
        """Position of a train example -> its score."""
        return dict(zip(self.positions or range(len(self.scores)), self.scores, strict=True))

    @property
    def score(self) -> float:
        """The score on the valset, or the reward without a validation."""
        return self.reward if self.valset_score is None else self.valset_score


@dataclass(frozen=True)
class Trajectory:
    """Every finished trial, in order."""

    trials: tuple[Trial, ...] = ()
    score_range: tuple[float, float] = (0.0, 1.0)
    """Lowest and highest score of any example. [0, 1] if all scores are between 0 and 1."""
    known_leaders: tuple[Trial | None, Trial | None] | None = field(default=None, repr=False, compare=False)
    """The best fully scored trial on the trainset and the best one on the valset, if they are known already."""

    def __len__(self) -> int:
        return len(self.trials)

    def add(self, *trials: Trial) -> Trajectory:
        seen = [s for t in trials for s in t.scores]
        if self.trials:
            seen.extend(self.score_range)
        low, high = min(seen, default=0.0), max(seen, default=1.0)
        if low >= 0.0 and high <= 1.0:
            low, high = 0.0, 1.0
        # The leaders are found among the new trials alone: looking at all of them every round would be quadratic.
        return Trajectory(self.trials + trials, (low, high), _lead(trials, *self._leaders))

    @cached_property
    def _leaders(self) -> tuple[Trial | None, Trial | None]:
        return self.known_leaders or _lead(self.trials, None, None)

    @property
    def incumbent(self) -> Trial:
        """The best fully scored trial on the trainset. Of equal trials it is the first."""
        incumbent, _ = self._leaders
        if incumbent is None:
            raise ValueError("No trial is scored in full.")
        return incumbent

    @property
    def best(self) -> Trial:
        """The best trial on the valset, or without a valset the incumbent."""
        return self._leaders[1] or self.incumbent

    @cached_property
    def ranked(self) -> Sequence[Trial]:
        """The trials in ascending order of reward. Of equal trials the later one comes last."""
        return sorted(self.trials, key=lambda t: t.reward)

    def top(self, k: int) -> Sequence[Trial]:
        """The `k` best trials, ascending, so that the best comes last (OPRO, section 4.2)."""
        return self.ranked[-k:]

    def top_texts(self, predictor: str, k: int) -> list[tuple[str, float]]:
        """The `k` best texts of one predictor, ascending. A text of several trials has its best reward."""
        rewards: dict[str, float] = {}  # text -> reward
        for trial in reversed(self.ranked):
            rewards.setdefault(trial.candidate.instructions[predictor], trial.reward)
            if len(rewards) == k:
                break
        return list(rewards.items())[::-1]


def _lead(
    trials: Iterable[Trial], on_train: Trial | None, on_val: Trial | None
) -> tuple[Trial | None, Trial | None]:
    """The best on the trainset and on the valset, the given ones included. Of equal trials the first counts."""
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


def scores_by_example(trials: Iterable[Trial], num_examples: int) -> list[list[float]]:
    """For each train example, by position, the scores of the trials that were scored on it."""
    columns: list[list[float]] = [[] for _ in range(num_examples)]
    for trial in trials:
        for position, score in zip(trial.positions or range(len(trial.scores)), trial.scores, strict=True):
            columns[position].append(score)
    return columns


def squared_distances(values: Sequence[float]) -> float:  # statistics.pvariance is 20 times slower
    """The sum of the squared distances from the mean; 0 without values."""
    average = sum(values) / max(1, len(values))
    return sum((value - average) ** 2 for value in values)


def unless_first(positions: Collection[int]) -> Sequence[int]:
    """The value for `Trial.positions`: the given positions, or nothing where they are the first ones."""
    return () if max(positions, default=-1) < len(positions) else tuple(positions)


def to_array(values: Iterable[float]) -> array[float]:
    return array("d", values)


def percent(reward: float, low: float = 0.0, high: float = 1.0) -> int:
    """A reward as an integer score from 0 to 100, the form the paper shows (section 4.2: 100 buckets).

    Where all scores are equal, they are as high as possible if they are above 0, and as low as possible if not.
    """
    share = (reward - low) / (high - low) if high > low else float(reward > 0.0)
    return max(0, min(100, round(100 * share)))
