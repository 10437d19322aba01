"""What the search hands out, takes back and tells: frozen values, so that any order of arrival means the same."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .stopping import Usage
from .trajectory import Candidate, Outcome, Trajectory, Trial

Split = Literal["train", "val"]
Strategy = Literal["all", "round_robin", "joint"]


@dataclass(frozen=True)
class Plan:
    """What a search is told at the start."""

    num_train: int
    num_val: int = 0
    num_rounds: int | None = None
    num_candidates: int = 8
    num_trials: int | None = None
    """Candidates in all, the student apart; the last round has what is left."""
    num_demo_sets: int = 0
    """Candidates of the first round that have the student's instructions and demos of their own."""
    predictor_strategy: Strategy = "all"
    max_metric_calls: int | None = None
    lag: int = 2
    """Rounds that may be undecided when the next one's proposals are asked for; see `usual_lag`."""
    block_size: int = 16
    """Examples in the unit of work that is handed out, recorded and kept, at most."""
    max_waves: int = 3
    """How often a round asks for proposals, the first time included, before it goes on with fewer."""
    seed: int = 0


@dataclass(frozen=True)
class View:
    """What was known when a round's proposals were asked for."""

    trajectory: Trajectory
    base: Candidate
    outcomes: Sequence[Outcome | None]
    """The base's outcomes by position in the race's order; None where it is not scored yet."""


@dataclass(frozen=True)
class Ask:
    """Work: one call of the proposer."""

    round: int
    slot: int
    wave: int
    predictors: tuple[str, ...]
    """Names of the predictors that this call rewrites."""
    view: View = field(repr=False)
    is_for_demos: bool = False
    """Whether it asks for a set of demos, which is answered with a predictor's demos in place of its text."""


@dataclass(frozen=True)
class Block:
    """Work: score `candidate` on positions `start` to `stop` (exclusive) of a split."""

    candidate: Candidate
    round: int
    split: Split
    start: int
    stop: int


@dataclass(frozen=True)
class Proposal:
    """The answer to an `Ask`, cleaned and checked."""

    texts: Mapping[str, str]
    """Predictor name -> usable text."""
    problems: tuple[str, ...] = ()
    """Why texts were not usable, one entry each."""
    error: str | None = None
    """The cause, where the call itself failed."""


@dataclass(frozen=True)
class Proposed:
    """Event: a round's candidates are known, in the order of their trials."""

    round: int
    candidates: tuple[Candidate, ...]
    dropped: tuple[str, ...]
    """Why proposals were not used, one entry each."""


@dataclass(frozen=True)
class Reported:
    """Event: a candidate's comparable reward after `step` examples."""

    candidate: Candidate
    step: int
    value: float


@dataclass(frozen=True)
class Finished:
    """Event: a candidate's race has ended."""

    trial: Trial


@dataclass(frozen=True)
class Decided:
    """Event: a round is over."""

    round: int
    best: Trial
    best_score: float


@dataclass(frozen=True)
class Failure:
    """A program error on one example, which counted as `failure_score`."""

    candidate: str
    """Id of the candidate."""
    split: str
    """The data it belongs to, `train` or `val`."""
    example: int
    """Index into the trainset or valset as it was given."""
    error: str


Work = Ask | Block
Event = Proposed | Reported | Finished | Decided


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


def work_key(work: Work) -> str:
    """Equal for equal work, in this process and in every other."""
    if isinstance(work, Ask):
        what = "/demos" if work.is_for_demos else ",".join(work.predictors)
        return f"ask/{work.round}/{work.slot}/{work.wave}/{what}"
    return f"block/{work.candidate.id}/{work.split}/{work.start}/{work.stop}"


@dataclass(frozen=True)
class Answer:
    """What a piece of work gave."""

    work: Work
    content: Proposal | tuple[Outcome, ...]
    """For an `Ask` the proposal, for a `Block` the outcomes in the order of its positions."""
    usage: Usage
    seconds: float = 0.0
    """How long the run had been at work by then, all its processes so far one after the other."""


def rng(seed: int, *parts: object) -> random.Random:
    """A generator for one purpose, the same in every run: seeded by the run's seed and the purpose's name."""
    return random.Random("/".join(map(str, (seed, *parts))))
