"""`OptunaStore`: the log is the truth and the study shows it; what the study lacks, a replay writes.

A kill between two writes therefore leaves nothing to repair: the resumed run takes the same decisions and
finds each of their traces, or makes it.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import optuna
from optuna.storages import BaseStorage
from optuna.study import StudyDirection

from dspy_opro.stopping import Usage
from dspy_opro.trajectory import Outcome
from dspy_opro.work import Answer, Block, Event, Finished, Proposed, Reported, Work

from .liveness import new_worker
from .memory import Memory
from .quiet import quiet_optuna
from .records import Record, answer_record, decode_usage, record_key
from .storage import Log, journal_storage, opened, patiently, storage_of
from .trials import Tally, TrialBoard

logger = logging.getLogger("dspy_opro")

FORMAT = "2"
"""Version of the log's records."""

RESUMABLE = frozenset(
    {
        "interrupted",
        "error",
        "max_tokens",
        "max_cost",
        "timeout_seconds",
        "callback",
        "stop_file",
        "storage_lost",
    }
)
"""Reasons after which the next process may go on with the trials that were under way."""


class OptunaStore:
    """Keeps a run in an Optuna study, and beside it in the study `<study_name>/log`.

    Args:
        storage: Any Optuna storage or URL; None keeps the run in memory, or in `log_dir` where that is given.
        study_name: Names the run. Default with `log_dir`: `"opro"`, or that directory's name where there is
            also a `storage`; without it a new unique name.
        log_dir: Directory of the run's journal file.
        fingerprint: Part of the run that gives a score its meaning -> its hash or value.
        callbacks: Optuna's convention, called with `(study, trial)`.

    Raises:
        ValueError: The study is another run's, or was not made by dspy_opro.
    """

    is_alone: ClassVar[bool] = True
    """Whether no other process works on the run at the same time."""

    def __init__(
        self,
        storage: str | BaseStorage | None = None,
        study_name: str | None = None,
        log_dir: str | os.PathLike[str] | None = None,
        fingerprint: Mapping[str, str] | None = None,
        callbacks: Sequence[Callable[[Any, Any], None]] = (),
    ) -> None:
        if study_name is None and log_dir is not None:
            study_name = "opro" if storage is None else Path(log_dir).resolve().name
        if storage is None and log_dir is not None:
            storage = journal_storage(log_dir)
        self.study, self._log = patiently(lambda: self._open(storage, study_name))
        self.study.stop = lambda: self.on_stop()  # type: ignore[method-assign]  # it works in `optimize` only
        self.on_stop: Callable[[], None] = lambda: None
        """What a callback's `study.stop()` calls."""
        self.worker = new_worker()
        self._entry_prefix = f"{self.worker}#"
        self._callbacks = callbacks
        self._memory = Memory()
        self._unread: deque[Record] = deque()  # read from the log and not yet loaded
        self._num_entries = 0
        self._tallies: dict[str, Tally] = {}  # candidate id -> what its blocks add up to
        self._unshown: deque[tuple[Event, Tally]] = deque()
        self._unfinished: deque[str] = deque()  # candidate ids, in the order of their trials' numbers
        self._held: dict[str, tuple[Finished, Tally]] = {}  # candidate id -> finished before an earlier one
        self._board: TrialBoard | None = None
        self._check(dict(fingerprint or {}))

    # -- opening ---------------------------------------------------------------------------------

    @staticmethod
    def _open(storage: str | BaseStorage | None, study_name: str | None) -> tuple[optuna.Study, Log | None]:
        with quiet_optuna():
            study = optuna.create_study(
                storage=opened(storage), study_name=study_name, direction="maximize", load_if_exists=True
            )
            if storage is None:
                return study, None
            if study.direction != StudyDirection.MAXIMIZE:
                raise ValueError(f"Study {study.study_name!r} must be maximized. Use another study_name.")
            name, kept = f"{study.study_name}/log", storage_of(study)[0]
            if not study.get_trials(deepcopy=False):
                return study, Log(optuna.create_study(storage=kept, study_name=name, load_if_exists=True))
            try:
                return study, Log(optuna.load_study(study_name=name, storage=kept))
            except KeyError:
                raise ValueError(
                    f"Study {study.study_name!r} has trials that were not made by dspy_opro. "
                    "Use another study_name."
                ) from None

    def _check(self, fingerprint: dict[str, str]) -> None:
        """Stamp a new run, or compare with the one that is there; the log's first record decides.

        A log without an answer is new, too: the metric or the program did not get past the first example, and was
        mended since. Not so where others may be at work on it.
        """
        if self._log is None:
            return
        mine = {"format": FORMAT, **fingerprint}
        records = list(self._log.read())
        stamps = [record["parts"] for record in records if record["kind"] == "fingerprint"]
        is_new = not stamps or (self.is_alone and all(record_key(record) is None for record in records))
        if is_new and stamps[-1:] != [mine]:
            self._append({"kind": "fingerprint", "parts": mine})
            records.extend(self._log.read())
            self.study.set_user_attr("fingerprint", mine)
        stamps = [record["parts"] for record in records if record["kind"] == "fingerprint"]
        theirs: dict[str, str] = stamps[-1] if self.is_alone else stamps[0]
        differing = [name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name)]
        if differing:
            parts = "; ".join(f"{n} was {theirs.get(n)!r} and is now {mine.get(n)!r}" for n in differing)
            name = self.study.study_name
            raise ValueError(
                f"Study {name!r} holds a different run: {parts}. Use another study_name or log_dir, "
                f"or delete the studies {name!r} and '{name}/log'."
            )
        self._unread.extend(records)

    def _append(self, *records: Record) -> None:
        assert self._log is not None
        self._log.append(f"{self._entry_prefix}{self._num_entries}", *records)
        self._num_entries += 1  # not before: repeated after a failure, it is the same entry

    # -- the past --------------------------------------------------------------------------------

    @property
    def is_fresh(self) -> bool:
        """Whether nothing was answered yet."""
        return all(record_key(record) is None for record in self._unread)

    def load_next(self) -> tuple[str, Usage] | None:
        """Take in the log's next record: the key of the work that it answers ("" for none) and what that cost."""
        if not self._unread:
            return None
        record = self._unread.popleft()
        self._load(record)
        key = record_key(record)
        return ("", Usage()) if key is None else (key, decode_usage(record["usage"]))

    def _load(self, record: Record) -> None:
        self._memory.load(record)

    def recall(self, work: Work) -> Answer | None:
        """The answer to a piece of work, where the records loaded so far have it."""
        return self._memory.recall(work)

    def parts(self, work: Work) -> Mapping[int, tuple[Outcome, Usage]]:
        """Position -> what is known of a block that is not complete."""
        return self._memory.parts(work) if isinstance(work, Block) else {}

    @property
    def used(self) -> Usage:
        """What the answers loaded and recorded so far cost."""
        return self._memory.used

    # -- the present: what takes no time ---------------------------------------------------------

    def told(self, answer: Answer) -> None:
        """The search knows this answer now."""
        if isinstance(answer.work, Block):
            tally = self._tallies.setdefault(answer.work.candidate.id, Tally())
            tally.add(answer.work, answer.content, answer.usage)  # type: ignore[arg-type]  # a block's outcomes

    def note(self, event: Event) -> None:
        """Have an event shown by the next `draw`.

        Trials finish in the order of their numbers: callbacks that log by the number, as that of Weights & Biases,
        drop what comes later with a lower one.
        """
        if isinstance(event, Finished):
            self._held[event.trial.id] = event, self._tallies.pop(event.trial.id, Tally())
            self._memory.forget(event.trial.candidate)
            while self._unfinished and self._unfinished[0] in self._held:
                self._unshown.append(self._held.pop(self._unfinished.popleft()))
            return
        if isinstance(event, Proposed):
            self._unfinished.extend(candidate.id for candidate in event.candidates)
        self._unshown.append((event, Tally()))

    # -- the present: what waits for the storage -------------------------------------------------

    def record(self, answers: Sequence[Answer]) -> None:
        """Write answers to the log, as one entry."""
        if self._log is not None:
            self._append(*(answer_record(answer) for answer in answers))
        self._memory.used = sum((answer.usage for answer in answers), self._memory.used)

    def draw(self) -> None:
        """Bring the visible study up to date. May be called again after it failed."""
        board, self._board = self._board, None  # after a failure it is read anew
        if board is None:
            board = TrialBoard(self.study, self._callbacks, with_notes=self._log is not None)
        while self._unshown:
            event, tally = self._unshown[0]
            if isinstance(event, Proposed):
                for candidate in event.candidates:
                    board.propose(candidate)
            elif isinstance(event, Reported):
                board.report(event.candidate, event.step, event.value)
            elif isinstance(event, Finished):
                board.finish(event.trial, tally)
            self._unshown.popleft()
        self._board = board

    # -- the end ---------------------------------------------------------------------------------

    def close(self, stop_reason: str) -> None:
        """Write the reason; trials under way are left for the next process where it may go on with them."""
        self._unshown.extend(self._held.values())
        self._held.clear()
        self.draw()
        self.study.set_user_attr("stop_reason", stop_reason)
        if self._board is not None and (self._log is None or stop_reason not in RESUMABLE):
            self._board.close(stop_reason)
