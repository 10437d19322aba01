"""When failures end a run: one is data, `max_errors` of them or whole rounds of nothing else are an error."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NoReturn

from .options import Options
from .program import shorten
from .trajectory import Candidate, Trial

NUM_DEAD = 4
"""Candidates in a row that fail on every example and are taken for a broken program or LM."""


class TooManyErrors(RuntimeError):
    """The program failed on `max_errors` examples, or on everything for a while; the first failure is the cause."""


class Failures:
    """The count of failed examples in this process.

    Args:
        options: `max_errors` and what counts where it is not given.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._num_failures = 0
        self._failed: set[str] = set()  # ids of candidates with a failure in this process
        self._dead: list[Trial] = []  # trials of the last rounds in which every example failed
        self._first_cause: Exception | None = None
        self._lock = threading.Lock()

    def count(self, candidate: Candidate, error: Exception | None) -> None:
        """An example has failed; from any thread.

        Raises:
            TooManyErrors: It was the last of `max_errors`.
        """
        with self._lock:
            self._num_failures += 1
            self._first_cause = self._first_cause or error
            self._failed.add(candidate.id)
        max_errors = self._options.max_errors
        if max_errors is not None and self._num_failures >= max_errors:
            self._give_up(f"on {self._num_failures} examples (max_errors={max_errors})")

    def decided(self, trials: Sequence[Trial]) -> None:
        """A round is over: end the run where nothing works any more and `max_errors` is not given.

        Single failures are data, and so is a candidate that fails on everything: instructions break formats. But
        when whole rounds fail, the cause is elsewhere. What is looked at is the same whatever the order of arrival.

        Raises:
            TooManyErrors: Not one example succeeded in the last rounds, of `NUM_DEAD` candidates or more.
        """
        if any(t.num_failures < t.num_scored for t in trials):
            self._dead.clear()
        else:
            self._dead.extend(trials)
        failures = sum(t.num_failures for t in self._dead)
        is_over = len(self._dead) >= NUM_DEAD and failures >= self._options.default_max_errors
        # Failures of an earlier process, recalled from its storage, may have had a cause that is gone.
        if self._options.max_errors is None and is_over and any(t.id in self._failed for t in self._dead):
            self._give_up(f"on each of the last {failures} examples, under {len(self._dead)} candidates")

    def _give_up(self, where: str) -> NoReturn:
        text = f"The program failed {where}. First cause: {in_brief(self._first_cause)}"
        raise TooManyErrors(text) from self._first_cause


def in_brief(error: BaseException | None) -> str:
    """An error as one short text."""
    return shorten(f"{type(error).__name__}: {error}", 500)
