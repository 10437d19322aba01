"""The page of a run that is under way: rewritten while the run goes on, so that a browser can watch a file."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dspy_opro.search.tasks import CandidatesProposed, Event, RoundDecided, TrialFinished, TrialReported
from dspy_opro.search.trajectory import Candidate, Usage

from .report import write_report
from .result import OPROResult
from .run_directory import REPORT, RunDirectory

PAUSE_SECONDS = 3.0
"""The least time between two writes."""
PULSE_SECONDS = 10.0
"""The page is rewritten this often where nothing else happens, so that the time left moves."""
MOST_SHARE = 0.05
"""Writing takes at most this share of the calling thread's time."""


@dataclass(frozen=True)
class Runner:
    """A candidate in the race."""

    candidate: Candidate
    num_scored: int = 0
    """Examples behind `score`."""
    score: float | None = None
    """Estimated from them, within the range of the scores; None before the first checkpoint."""


@dataclass(frozen=True)
class Limit:
    """A budget of the run."""

    name: str
    used: float
    most: float
    seconds: float
    """How long it took to use so much."""

    @property
    def seconds_left(self) -> float | None:
        """The time until it is used up at the same speed; None where nothing is used yet, or it is not known."""
        return (
            max(0.0, self.most - self.used) * self.seconds / self.used if 0 < self.used < math.inf else None
        )


def spending(round: int, usage: Usage, seconds: float) -> dict[str, float]:
    """Name of a budget -> what is used of it."""
    return {
        "rounds": round,
        "examples": usage.metric_calls,
        "tokens": usage.tokens,
        "dollars": usage.cost,
        "seconds": seconds,
    }


@dataclass(frozen=True)
class Live:
    """What the page shows of a run that is under way, beside its result so far."""

    round: int
    """The last decided round; -1 before the student is scored."""
    num_examples: int
    """Train examples of a full score."""
    runners: Sequence[Runner]
    limits: Sequence[Limit]


@dataclass
class LivePage:
    """`report.html` in the run's directory. The thread that reports events keeps and writes it."""

    directory: RunDirectory
    num_examples: int
    """Train examples of a full score."""
    limits: Mapping[str, float | None]
    """Name of a budget, as in `spending` -> its limit, None without one."""
    clock: Callable[[], float] = time.monotonic
    _runners: dict[str, Runner] = field(default_factory=dict)  # candidate id -> candidate
    _round: int = -1
    _is_new: bool = False
    _written: float = -math.inf  # when the last write ended
    _took: float = 0.0  # seconds of the last write

    def is_due(self, event: Event | None) -> bool:
        """Take in an event, or None. Whether `write` should follow."""
        if isinstance(event, CandidatesProposed):
            self._runners |= {c.id: Runner(c) for c in event.candidates}
        elif isinstance(event, TrialReported):
            self._runners[event.candidate.id] = Runner(event.candidate, event.step, event.value)
        elif isinstance(event, TrialFinished):
            self._runners.pop(event.trial.id, None)
        elif isinstance(event, RoundDecided):
            self._round = event.round
            self._is_new = True
        waited = self.clock() - self._written
        return waited >= max(PAUSE_SECONDS if self._is_new else PULSE_SECONDS, self._took / MOST_SHARE)

    def write(self, result: OPROResult, seconds: float, is_racing: bool = True) -> None:
        """Write the page. `seconds` is how long the run has been at work, with its earlier processes.

        `is_racing` says whether the run still looks for candidates. A budget ends races without an event.
        """
        started = self.clock()
        if not is_racing:
            self._runners.clear()
        used = spending(max(0, self._round), result.usage, result.seconds)
        limits = [
            Limit(name, used[name], most, result.seconds if name == "seconds" else seconds)
            for name, most in self.limits.items()
            if most
        ]
        low, high = result.trajectory.score_range
        runners = [
            runner if runner.score is None else replace(runner, score=min(max(runner.score, low), high))
            for runner in self._runners.values()
        ]
        runners.sort(key=lambda runner: -math.inf if runner.score is None else runner.score, reverse=True)
        live = Live(self._round, self.num_examples, runners, limits)
        self.directory.write(REPORT, lambda path: write_report(result, path, live))
        self._written, self._is_new = self.clock(), False
        self._took = self._written - started

    def close(self, result: OPROResult) -> None:
        """Write the page of a run that has ended."""
        self.directory.write(REPORT, lambda path: write_report(result, path))
