"""Where a run is kept: its visible study, and beside it the log of results in the study `<study_name>/log`.

The log is the truth, and the study shows it. What the study lacks after a kill, the resumed run writes: it takes the
same decisions again and finds each of their traces, or makes it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from tenacity import Retrying, retry_if_not_exception_type, stop_after_attempt, stop_after_delay, wait_random

from dspy_opro.search.tasks import TaskResult, asks_proposer
from dspy_opro.search.trajectory import Candidate, Outcome, Trial, Usage

from . import outage
from .carrying import choose, goes_on
from .fingerprint import Fingerprint, differences
from .opening import JOURNAL_NAME, journal_storage, opened, quiet_optuna
from .outage import Outage
from .result_log import Record, ResultLog, results_in
from .trials import ATTR_LIMIT, RunStudy, TrialWriter

logger = logging.getLogger("dspy_opro")

FORMAT = "4"
"""Version of the log's records."""

LOG_SUFFIX = "/log"
"""The name of the log's study is that of the run's study with this at the end."""

OPENED_BY, LOST_CALLS = "opened_by", "lost_calls"
"""Attributes of the study: the process that has the run open; calls in flight when earlier ones were killed."""

RESUMABLE = frozenset({
    *("interrupted", "error", "max_tokens", "max_cost", "timeout_seconds", "callback", "stop_file"),
    *("max_outage_seconds", "storage_lost"),
})  # fmt: skip
"""Reasons after which the next process may go on with the trials that were under way."""


@dataclass(frozen=True)
class RunStorage:
    """An open run."""

    study: RunStudy
    log: ResultLog
    trial_writer: TrialWriter
    outage: Outage
    past: Sequence[Record]
    """The log's records when it was opened."""
    is_kept: bool
    """Whether the run outlives its process."""
    num_lost_calls: int = 0
    """The most calls that killed processes of this run paid for and could not record."""

    def results(self) -> Iterator[tuple[str, TaskResult]]:
        """The results that earlier processes left: (`task_key`, result), in the order of the log."""
        return iter(self._results)

    @cached_property
    def _results(self) -> Sequence[tuple[str, TaskResult]]:
        return tuple(results_in(self.past))

    def results_to_replay(self) -> Iterator[tuple[str, TaskResult]]:
        """The results as a resumed run counts them.

        If every call of the proposer failed, the calls are made again, because the cause may be gone. Their results,
        and all but the last result of one task, have an empty key: they only count as spent. So does what late calls
        cost.
        """
        has_proposal = self.has_proposal
        last = {key: number for number, (key, _) in enumerate(self._results)}
        for number, (key, result) in enumerate(self._results):
            counts = has_proposal or not asks_proposer(key)
            yield key if counts and last[key] == number else "", result
        for record in self.past:
            if "spent" in record:
                yield "", TaskResult(Outcome(0.0), Usage(**record["spent"]))

    @property
    def has_proposal(self) -> bool:
        """Whether a call of the proposer worked in an earlier process."""
        proposals = (result.content for key, result in self.results() if asks_proposer(key))
        return any(proposal.error is None for proposal in proposals)

    def lost_usage(self) -> Usage:
        """What killed processes may have paid for and not recorded.

        At most: the mean usage of a recorded example, times the lost calls.
        """
        spent = [result.usage for _, result in self.results() if isinstance(result.content, Outcome)]
        if not spent:
            return Usage()
        total, calls = sum(spent, Usage()), self.num_lost_calls
        names = "scorer_calls", "prompt_tokens", "completion_tokens", "unpriced_calls"
        counts = {name: math.ceil(calls * getattr(total, name) / len(spent)) for name in names}
        return Usage(metric_calls=calls, cost=calls * total.cost / len(spent), **counts)

    @property
    def has_no_results(self) -> bool:
        """Whether nothing was measured yet."""
        return not any("key" in record for record in self.past)

    @cached_property
    def _last_plan(self) -> Record | None:
        return next((record for record in reversed(self.past) if "plan" in record), None)

    def plan_record(self, plan: Record, student: Candidate) -> Record:
        """A plan with what its run takes over from the record, see `carrying.decode`. The first takes over nothing."""
        last = self._last_plan
        if last is None or plan == last["plan"]:
            return last or {"plan": plan, "candidates": [], "returned": None}
        carried = choose(self.study, student)
        if goes_on(plan, last["plan"]):
            carried["candidates"] = last["candidates"]
        return {"plan": plan, **carried}

    def begin(self, plan_record: Record) -> None:
        """Keep the plan with which the run goes on."""
        if self.is_kept and plan_record != self._last_plan:
            self.log.append(plan_record)

    def release(self) -> None:
        """Note that no process has the run open."""
        if self.is_kept:
            self.study.set_user_attr(OPENED_BY, None)

    def close(self, stop_reason: str, returned: Trial | None = None, is_confirmed: bool = False) -> None:
        """Write what is left, why the run ended and what it returned; try for `LAST_PATIENCE_SECONDS`."""

        def write() -> None:
            self.log.write(must_work=True)
            is_final = not self.is_kept or stop_reason not in RESUMABLE
            self.trial_writer.close(stop_reason, is_final, returned, is_confirmed)
            self.release()

        if self.outage.is_lost:
            return
        try:
            attempts = Retrying(
                stop=stop_after_delay(outage.LAST_PATIENCE_SECONDS), wait=wait_random(0.1, 1.0), reraise=True
            )
            attempts(write)
        except Exception as error:
            self.outage.lose(error)


def open_run(
    storage: str | BaseStorage | None = None,
    study_name: str | None = None,
    log_dir: str | os.PathLike[str] | None = None,
    fingerprint: Fingerprint | None = None,
    callbacks: Sequence[Callable[[Any, Any], None]] = (),
    num_threads: int = 1,
) -> RunStorage:
    """Open a run, or begin it.

    Args:
        storage: Any Optuna storage or URL; None keeps the run in memory, or in `log_dir` where that is given.
        study_name: Names the run. Default with `log_dir`: `"opro"`, or that directory's name where there is
            also a `storage`; without it a new unique name.
        log_dir: Directory of the run's journal file.
        fingerprint: Part of the run that gives a score its meaning -> its hash or value.
        callbacks: Optuna's convention, called with `(study, trial)`.
        num_threads: Calls that may be in flight if the process is killed.

    Raises:
        ValueError: The study is another run's, or was not made by dspy_opro.
    """
    if study_name is None and log_dir is not None:
        study_name = "opro" if storage is None else Path(log_dir).resolve().name
    place = None if log_dir is None else f"{Path(log_dir).absolute()} on {socket.gethostname()}"
    if storage is None and log_dir is not None:
        storage, place = journal_storage(log_dir), JOURNAL_NAME  # the directory is moved with its lock
    # Processes that start together find a new database half made: Optuna 4.0 to 5.0 looks whether its tables are
    # there, then makes them, and fails where another process did so in between.
    attempts = Retrying(
        retry=retry_if_not_exception_type((ValueError, ImportError)),
        stop=stop_after_attempt(6),
        wait=wait_random(0.0, 1.5),
        reraise=True,
    )
    study, log_study = attempts(_open_studies, storage, study_name)
    under_way = Outage()
    log = ResultLog(log_study, under_way)
    past = [] if log_study is None else _checked(study, log, dict(fingerprint or {}))
    is_kept = log_study is not None
    writer = TrialWriter(study, callbacks, with_notes=is_kept, outage=under_way)
    num_lost = _mark_opened(study, num_threads, place) if is_kept else 0
    return RunStorage(study, log, writer, under_way, past, is_kept, num_lost)


def _mark_opened(study: RunStudy, num_threads: int, place: str | None) -> int:
    """Note this process in the study, until the run is closed. Returns how many calls killed processes may have lost.

    Whether a process that has not closed the run still runs can be known only if it had the lock that this one has
    now. That is the lock of its `log_dir`, and `place` names it.
    """
    attrs = study.user_attrs
    opened_by, num_lost = attrs.get(OPENED_BY), attrs.get(LOST_CALLS, 0)
    if opened_by is not None:
        num_lost += opened_by["num_threads"]
        study.set_user_attr(LOST_CALLS, num_lost)
        if place is None or opened_by.get("place") != place:
            logger.warning(
                "Process %s opened study %r at %s and has not closed it. If it still runs, end one of the two: they "
                "pay for the same examples. If it was killed, ignore this warning.",
                *(opened_by["process"], study.study_name, opened_by["time"]),
            )
    me = f"{os.getpid()} on {socket.gethostname()}"
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    study.set_user_attr(OPENED_BY, {"process": me, "time": now, "num_threads": num_threads, "place": place})
    return int(num_lost)


def _open_studies(
    storage: str | BaseStorage | None, study_name: str | None
) -> tuple[RunStudy, optuna.Study | None]:
    """The visible study and the one of the log."""
    with quiet_optuna():
        kept = opened(storage)
        made = optuna.create_study(
            storage=kept, study_name=study_name, direction="maximize", load_if_exists=True
        )
        study, name = RunStudy(made.study_name, kept), made.study_name + LOG_SUFFIX
        if storage is None:
            return study, None
        if study.directions != [StudyDirection.MAXIMIZE]:
            raise ValueError(f"Study {study.study_name!r} must be maximized. Use another study_name.")
        if not study.get_trials(deepcopy=False):
            return study, optuna.create_study(storage=kept, study_name=name, load_if_exists=True)
        try:
            return study, optuna.load_study(study_name=name, storage=kept)
        except KeyError:
            raise ValueError(
                f"Study {study.study_name!r} has trials that were not made by dspy_opro. Use another study_name."
            ) from None


def _checked(study: RunStudy, log: ResultLog, fingerprint: Fingerprint) -> list[Record]:
    """The log's records. A new run is stamped with its fingerprint, another one must have the same.

    A log without a result is new, too: the metric or the program did not get past the first example and was changed
    since.
    """
    mine = {"format": FORMAT, **fingerprint}
    records = log.read()
    stamps = [record["fingerprint"] for record in records if "fingerprint" in record]
    # Results have a `key`. All records of format 2 or older have a `kind`.
    is_new = not any("key" in record or "kind" in record for record in records)
    if is_new and stamps[-1:] != [mine]:
        log.append({"fingerprint": mine})
        # All parts of a large program are more than a database column holds.
        small = {part: what for part, what in mine.items() if len(json.dumps(what)) < ATTR_LIMIT // 5}
        study.set_user_attr("fingerprint", small)
        stamps.append(mine)
    theirs: Fingerprint = stamps[-1] if stamps else {"format": "2 or older"}
    name, differing = study.study_name, list(differences(theirs, mine))
    if differing:
        parts = "; ".join(differing)
        raise ValueError(
            f"Study {name!r} holds a different run: {parts}. Use another study_name or log_dir, "
            f"or delete the studies {name!r} and '{name}{LOG_SUFFIX}'."
        )
    if not is_new and mine.get("unknown code"):
        unknown = ", ".join(mine["unknown code"])
        logger.warning("Resuming %r: whether this code has changed can't be checked: %s.", name, unknown)
    return records
