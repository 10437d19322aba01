"""The tasks that wait for a provider, and how fast it can take them: rate limits, outages and retries."""

from __future__ import annotations

import heapq
import logging
import math
from dataclasses import dataclass, field, replace
from itertools import count

from dspy_opro.search.tasks import ScoringTask, Task, TaskResult, task_key, urgency
from dspy_opro.search.trajectory import Usage

from .errors import in_brief
from .provider import Verdict

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 10.0
NUM_TRIES = 3
"""How often the run calls again after an error that may be the program's own, if other tasks work."""
WARNING_PAUSE_SECONDS = 60.0
"""Between two warnings about calls that are tried again."""

logger = logging.getLogger("dspy_opro")


class Pace:
    """How many calls may be in flight: additive increase and multiplicative decrease, as in TCP (RFC 5681, 3.1).

    A rate limit halves the number, every answer adds a little: one call for each round of answers. A second failure in
    a row pauses all calls, longer each time, and then one call tries whether the provider is back.

    Args:
        most: Calls in flight at most.
    """

    def __init__(self, most: int) -> None:
        self._most = float(most)
        self._limit = float(most)
        self._resume = -math.inf
        self._last_cut = -math.inf
        self._num_cuts = 0  # since the last answer
        self._is_down = False  # whether the last cut or pause was for no rate limit
        self.down_since: float | None = None
        """The time of the first failure since the last answer."""
        self.last_answer = -math.inf

    def allowed(self, now: float) -> int:
        """Calls that may be in flight."""
        if now < self._resume:
            return 0
        return 1 if self._num_cuts > 1 else int(self._limit)

    def pause(self, now: float) -> float:
        """Seconds until the next call may start."""
        return max(0.0, self._resume - now)

    def answered(self, now: float) -> bool:
        """A call was answered. Returns whether more calls may be in flight than before."""
        before = self.allowed(now)
        self.last_answer = now
        self._limit = min(self._most, self._limit + 1 / self._limit)
        self._num_cuts, self._is_down, self.down_since = 0, False, None
        return self.allowed(now) > before

    def trouble(self, now: float) -> str:
        """What holds calls back, in words; empty if nothing does."""
        pause = self.pause(now)
        reason = "no answer from the provider" if self._is_down else "rate limit"
        if pause > 0:
            return f"{reason}, next call in {pause:.1f} s"
        if self._is_down:
            return reason
        return f"{reason}, {int(self._limit)} calls at a time" if self._limit < self._most else ""

    def failed(self, verdict: Verdict, started: float, now: float) -> None:
        """A call that began at `started` met a transient error. A call that began before the last cut cuts nothing."""
        is_first = self.down_since is None
        self.down_since = now if self.down_since is None else self.down_since
        pause = verdict.retry_after or 0.0
        is_cut = started >= self._last_cut and (verdict.is_rate_limit or not is_first)
        if is_cut:
            if verdict.retry_after is None:
                pause = pause_after(self._num_cuts)
            elif self._num_cuts > 0:  # the advice did not help
                pause = max(pause, pause_after(1))
            self._last_cut = now
            self._num_cuts += 1
            if verdict.is_rate_limit:
                self._limit = max(1.0, self._limit / 2)
        if is_cut or pause:
            self._is_down = not verdict.is_rate_limit
        self._resume = max(self._resume, now + pause)


def pause_after(num_failures: int) -> float:
    """Seconds to wait after so many earlier failures."""
    return float(min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(num_failures, 10)))


@dataclass
class _Retry:
    """A task whose calls have met nothing but transient errors."""

    since: float
    num_calls: int = 0
    spent: Usage = field(default=Usage())


class Lane:
    """Tasks of one kind, proposals or examples. The two may have different providers, so each kind has its pace.

    Args:
        num_threads: Calls in flight at most.
        max_outage_seconds: How long the provider may be down.
    """

    def __init__(self, num_threads: int, max_outage_seconds: float) -> None:
        self.pace = Pace(num_threads)
        self.num_in_flight = 0
        self._max_outage_seconds = max_outage_seconds
        self._waiting: list[tuple[tuple[bool, int], int, Task]] = []  # heap: urgency, number, task
        self._later: list[tuple[float, int, Task]] = []  # heap: when it may start, number, task
        self._retries: dict[str, _Retry] = {}  # task key -> its calls so far
        self._numbers = count()
        self._last_warning = -math.inf

    def push(self, task: Task) -> None:
        heapq.heappush(self._waiting, (urgency(task), next(self._numbers), task))

    def pop(self, now: float) -> Task | None:
        """The most urgent task, if one may start now."""
        while self._later and self._later[0][0] <= now:
            self.push(heapq.heappop(self._later)[2])
        if not self._waiting or self.num_in_flight >= self.pace.allowed(now):
            return None
        self.num_in_flight += 1
        return heapq.heappop(self._waiting)[2]

    def pause(self, now: float) -> float:
        """Seconds until a task may start, if time is all that is missing; otherwise infinity."""
        pause = self.pace.pause(now)
        if not self._waiting:
            pause = max(pause, self._later[0][0] - now) if self._later else math.inf
        return pause if pause > 0 else math.inf

    def settled(self, task: Task, spent: Usage) -> Usage:
        """A task is over. Returns what all its calls cost; the last one cost `spent`."""
        retry = self._retries.pop(task_key(task), None)
        return spent if retry is None else spent + retry.spent

    def put_off(self, task: Task, result: TaskResult, verdict: Verdict, started: float, now: float) -> bool:
        """Try a task again later, whose call met a transient error.

        Returns:
            False where other tasks work, but this one fails for `max_outage_seconds`, or more than `NUM_TRIES` times
            with an error that may be the program's own: the task has failed.
        """
        self.pace.failed(verdict, started, now)
        retry = self._retries.setdefault(task_key(task), _Retry(now))
        is_old = now - retry.since > self._max_outage_seconds
        is_tried = retry.num_calls >= NUM_TRIES and not verdict.is_of_provider
        others_work = self.pace.last_answer > retry.since or self._only_one_fails
        if others_work and (is_old or is_tried) and not verdict.is_rate_limit:
            return False
        wait = 0.0 if verdict.is_rate_limit else pause_after(retry.num_calls)
        retry.num_calls += 1
        retry.spent += replace(result.usage, metric_calls=0)  # an example counts once it has a score
        heapq.heappush(self._later, (now + wait, next(self._numbers), task))
        if now - self._last_warning > WARNING_PAUSE_SECONDS:
            self._last_warning = now
            reason, error = self.pace.trouble(now) or "later", in_brief(result.error)
            logger.warning("A call failed and is tried again (%s): %s", reason, error)
        return True

    @property
    def _only_one_fails(self) -> bool:
        """Whether all tasks but one were answered. If the provider is down, the next task fails, too."""
        return len(self._retries) == 1 and self.pace.last_answer > -math.inf

    def is_down_for_too_long(self, verdict: Verdict, now: float) -> bool:
        """Whether the next call would come more than `max_outage_seconds` after the provider's last answer.

        If only one task fails, `put_off` ends it in time, unless it meets a rate limit.
        """
        fails_alone = self._only_one_fails and not verdict.is_rate_limit
        since = now if fails_alone else self.pace.down_since
        return since is not None and now + self.pace.pause(now) - since > self._max_outage_seconds


class WaitingTasks:
    """All tasks that wait: proposals first, then examples, each kind in the order of its urgency."""

    def __init__(self, num_threads: int, max_outage_seconds: float) -> None:
        self._proposals = Lane(num_threads, max_outage_seconds)
        self._examples = Lane(num_threads, max_outage_seconds)
        self.lanes = self._proposals, self._examples

    def lane(self, task: Task) -> Lane:
        return self._examples if isinstance(task, ScoringTask) else self._proposals

    def push(self, task: Task) -> None:
        self.lane(task).push(task)

    def pop(self, now: float, only_examples: bool = False) -> Task | None:
        """The most urgent task, if one may start now. It is in flight then."""
        task = None if only_examples else self._proposals.pop(now)
        return task or self._examples.pop(now)

    def ended(self, task: Task) -> None:
        """A task is not in flight any more."""
        self.lane(task).num_in_flight -= 1

    def pause(self, now: float) -> float | None:
        """Seconds until a task may start; None if more than time is missing."""
        pause = min(self._proposals.pause(now), self._examples.pause(now))
        return None if math.isinf(pause) else pause

    def trouble(self, now: float) -> str:
        """What holds calls back, in words; empty if nothing does."""
        return self._examples.pace.trouble(now) or self._proposals.pace.trouble(now)
