"""What goes in and out of a search: its plan, tasks, results and events. All are frozen values.

So the order in which results arrive changes nothing.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .trajectory import Candidate, Outcome, Trajectory, Trial, Usage

Split = Literal["train", "val", "unseen"]
"""`unseen` are examples that the search never used. They confirm what it found."""
Strategy = Literal["all", "round_robin", "joint"]


@dataclass(frozen=True)
class Plan:
    """The sizes and limits of a search."""

    num_train: int
    num_val: int = 0
    num_rounds: int | None = None
    num_candidates: int = 8
    num_trials: int | None = None
    """Candidates in all, without the student. The last round has what is left."""
    num_demo_sets: int = 0
    """Candidates of the first round that have the student's instructions and demos of their own."""
    initial: Sequence[str] = ()
    """Hashes of the user's own instructions. Each is a candidate of the first round, before those with demos."""
    max_demo_calls: int = 0
    """Examples that making all the demo sets may try at most. They count towards `max_metric_calls`."""
    predictor_strategy: Strategy = "all"
    max_metric_calls: int | None = None
    """Examples that the rounds score at most. Confirming the result comes on top."""
    num_held_back: int = 0
    """Unseen examples that are kept for confirming the result; 0 confirms nothing."""
    num_unseen: int = 0
    """Unseen examples that there are, `num_held_back` or more."""
    num_spare: int = 0
    """Examples that were kept for demos, and come before those in the split "unseen". They confirm a candidate without
    demos, too."""
    confirms: bool = False
    """Whether the student is returned where no gain over it is proven."""
    lag: int = 2
    """Rounds whose race may still run when the next one asks for its proposals."""
    max_waves: int = 3
    """How often a round asks for proposals, the first time included, before it goes on with fewer."""
    seed: int = 0


@dataclass(frozen=True)
class View:
    """What the search knew when a round asked for its proposals."""

    trajectory: Trajectory
    base: Candidate
    outcomes: Sequence[Outcome | None]
    """The base's outcomes by position in the run's order; None where it is not scored yet."""
    problems: frozenset[str] = field(default=frozenset(), repr=False)
    """Why proposals were not used: in the rounds up to that of the base, and in earlier waves of the own round."""


@dataclass(frozen=True)
class ProposalTask:
    """One call of the proposer."""

    round: int
    slot: int
    wave: int
    predictors: tuple[str, ...]
    """Names of the predictors that this call rewrites."""
    view: View = field(repr=False)
    is_for_demos: bool = False
    """Whether it asks for a set of demos. Its proposal then has demos in place of texts."""
    initial: int | None = None
    """Index of the user's own instructions that it gives, without a call of the proposer."""
    initial_hash: str = ""
    """Their hash. Other instructions are another task."""


@dataclass(frozen=True)
class ScoringTask:
    """One example of one candidate."""

    candidate: Candidate
    round: int
    split: Split
    position: int
    """Position of the example in the run's order: the examples of its split, shuffled by the run's seed."""


Task = ProposalTask | ScoringTask


def task_key(task: Task) -> str:
    """The name of a task. Equal tasks have equal names, in this process and in every other."""
    if isinstance(task, ScoringTask):
        return f"score/{task.candidate.id}/{task.split}/{task.position}"
    if task.is_for_demos:
        return demo_set_key(task.slot)
    if task.initial is not None:
        return f"propose/1/{task.slot}/0//initial/{task.initial_hash}"
    return f"propose/{task.round}/{task.slot}/{task.wave}/{','.join(task.predictors)}"


def asks_proposer(key: str) -> bool:
    """Whether the task of this name calls the proposer: the user's own instructions and demos need no call."""
    return key.startswith("propose/") and "//" not in key


def scored_example(key: str) -> tuple[str, str, int]:
    """The candidate's id, the split and the position that the key of a `ScoringTask` names."""
    _, candidate, split, position = key.split("/")
    return candidate, split, int(position)


def demo_set_key(slot: int) -> str:
    """The name of the task that makes the demo set of a slot. Only the first round makes demo sets."""
    return f"propose/1/{slot}/0//demos"


def urgency(task: Task) -> tuple[bool, int]:
    """Tasks are done in ascending order of this: proposals first, then older rounds."""
    return isinstance(task, ScoringTask), task.round


@dataclass(frozen=True)
class Proposal:
    """What a `ProposalTask` gave, cleaned and checked."""

    texts: Mapping[str, str]
    """Predictor name -> usable text."""
    problems: tuple[str, ...] = ()
    """Why texts were not usable, one entry each."""
    error: str | None = None
    """The cause, where the call itself failed."""


@dataclass(frozen=True)
class TaskResult:
    """What a task gave."""

    content: Proposal | Outcome
    """The proposal of a `ProposalTask`, the outcome of a `ScoringTask`."""
    usage: Usage = field(default=Usage())
    seconds: float = 0.0
    """How long the run had been at work by then, the time of its earlier processes included."""
    error: Exception | None = field(default=None, compare=False, repr=False)
    """What the call raised. It is not recorded."""


@dataclass(frozen=True)
class Failure:
    """A program error on one example, which counted as `failure_score`."""

    candidate: str
    """Id of the candidate."""
    split: str
    """`train`, `val` or `unseen`."""
    example: int
    """Position in the run's order; in `OPROResult.failures` the index in the dataset as given."""
    error: str


@dataclass(frozen=True)
class CandidatesProposed:
    """Event: a round's candidates are known, in the order of their trials."""

    round: int
    candidates: tuple[Candidate, ...]
    dropped: tuple[str, ...]
    """Why proposals were not used, one entry each."""


@dataclass(frozen=True)
class TrialReported:
    """Event: a candidate's comparable reward after `step` examples."""

    candidate: Candidate
    step: int
    value: float


@dataclass(frozen=True)
class TrialFinished:
    """Event: a candidate's race has ended."""

    trial: Trial
    failures: tuple[Failure, ...] = ()
    """Its first failed examples, by position in the run's order."""


@dataclass(frozen=True)
class RoundDecided:
    """Event: a round is over."""

    round: int
    best: Trial
    best_score: float


Event = CandidatesProposed | TrialReported | TrialFinished | RoundDecided


def rng(seed: int, *parts: object) -> random.Random:
    """A generator for one purpose, the same in every run: seeded by the run's seed and the purpose's name."""
    return random.Random("/".join(map(str, (seed, *parts))))
