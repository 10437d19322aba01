"""The log of results: what a run measured, in the order in which the search was told.

It lives in a study of its own on any Optuna storage, one finished trial per batch of results. Of all that Optuna's
storages offer, creating a trial from a template is the one write that is atomic, ordered and final on each of them;
and finished trials are what their caches read only once.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import optuna
from optuna.trial import TrialState, create_trial

from dspy_opro.search.tasks import Proposal, Task, TaskResult, task_key
from dspy_opro.search.trajectory import Outcome, Usage

from .opening import storage_of
from .outage import Outage

Record = dict[str, Any]
"""One entry of the log: plain JSON."""

PART_SIZE = 30_000
"""Characters of one attribute. MySQL's TEXT takes 64 KB, and JSON inside JSON at most doubles."""
ENTRY_SIZE = 1_000_000
"""Characters of one entry, if it has more than one record. gRPC takes 4 MB in one message, MariaDB 16 MB."""
PATIENCE_FOR_ONE_WRITE_SECONDS = 2.0
"""How long a worker thread waits for a slow write before it goes on with the next call."""
TEXT_LIMIT = 1000
"""Characters of an outcome's output, feedback and cause that are kept."""


def clip(text: str, limit: int = TEXT_LIMIT) -> str:
    """Text of at most `limit` characters; where some are missing the last one is an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


class ResultLog:
    """Results are added in order, and written in batches by the threads that added them.

    A thread that has added a result calls `write` and returns from it once the result is kept. So a killed process
    loses nothing but the calls in flight. Whoever writes takes along what others have added meanwhile.

    Args:
        study: Holds the log. None keeps nothing.
        outage: Told when a write fails or works again. While the storage fails nobody waits for it.
    """

    def __init__(self, study: optuna.Study | None, outage: Outage) -> None:
        self._store = None if study is None else storage_of(study)
        self._outage = outage
        self._added: list[Record] = []  # not written yet, in order
        self._failed: list[Record] = []  # the first ones of them, where their write has failed
        self._num_added = 0  # in all, written or not
        self.usage = Usage()
        """The usage of all records, read or added."""
        self._is_writing = False
        self._changed = threading.Condition()  # its lock is held for a moment, never during a write
        self._entry_prefix = uuid.uuid4().hex[:12]
        self._num_entries = 0

    def add(self, task: Task, result: TaskResult) -> None:
        """Take in a result. It is kept once a later `write` has returned."""
        if self._store is not None:
            self.usage += result.usage
            self._keep(encode_result(task, result))

    def add_spent(self, usage: Usage) -> None:
        """Take in what LM calls cost that gave no result, or whose example counts already. Counts no examples."""
        if self._store is not None and (usage.scorer_calls or usage.proposer_calls or usage.cached_calls):
            spent = replace(usage, metric_calls=0)
            self.usage += spent
            self._keep({"spent": encode_usage(spent)})

    def _keep(self, record: Record) -> None:
        with self._changed:
            self._added.append(record)
            self._num_added += 1

    @property
    def _num_written(self) -> int:
        return self._num_added - len(self._added)

    def write(self, must_work: bool = False) -> None:
        """Keep what was added so far: write it, or wait while another thread does.

        Args:
            must_work: Whether an error of the storage is raised. Otherwise the results stay for the next call.

        Raises:
            TimeoutError: With `must_work`, if another thread's write takes longer than two seconds.
        """
        if self._store is None or not self._begins_writing(must_work):
            return
        try:
            # An entry whose write failed is repeated as it was: the storage may have it, and counts it once.
            self._write_entry(self._failed)
            with self._changed:
                batch = self._added.copy()
            for entry in _entries(batch):
                self._write_entry(entry)
            self._outage.worked()
        except Exception as error:
            if must_work:
                raise
            self._outage.failed(error)
        finally:
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()

    def _begins_writing(self, must_work: bool) -> bool:
        """Whether the calling thread is to write: not if others have written its results meanwhile."""
        patience = 0.0 if self._outage.is_under_way and not must_work else PATIENCE_FOR_ONE_WRITE_SECONDS
        with self._changed:
            last = self._num_added
            is_free = self._changed.wait_for(
                lambda: self._num_written >= last or not self._is_writing, timeout=patience
            )
            if self._num_written >= last:
                return False
            if not is_free and must_work:
                raise TimeoutError("A write to the storage takes long.")
            self._is_writing = self._is_writing or is_free
            return is_free

    def _write_entry(self, batch: list[Record]) -> None:
        if batch:
            self._failed = batch
            self.append(*batch)
            self._failed = []
            with self._changed:
                del self._added[: len(batch)]

    def append(self, *records: Record) -> None:
        """Write records as one entry: all of them are there, or none."""
        assert self._store is not None
        storage, study_id = self._store
        text = json.dumps(records)
        if len(text) <= PART_SIZE:
            attrs: dict[str, Any] = {"records": list(records)}
        else:
            parts = [text[i : i + PART_SIZE] for i in range(0, len(text), PART_SIZE)]
            attrs = {f"part{number}": part for number, part in enumerate(parts)}
        # Written again, as after a connection that broke before the answer came, an entry counts once.
        attrs["entry"] = f"{self._entry_prefix}#{self._num_entries}"
        # Pruned is the finished state that needs no value.
        entry = create_trial(state=TrialState.PRUNED, user_attrs=attrs)
        storage.create_new_trial(study_id, template_trial=entry)
        self._num_entries += 1

    def read(self) -> list[Record]:
        """All records, in order."""
        if self._store is None:
            return []
        storage, study_id = self._store
        trials = storage.get_all_trials(study_id, deepcopy=False)
        # Id of an entry -> its attributes. An entry that was written twice keeps its first place.
        entries = {trial.user_attrs["entry"]: trial.user_attrs for trial in trials}
        records = [record for attrs in entries.values() for record in _records(attrs)]
        self.usage = sum((_usage_of(record) for record in records), Usage())
        return records


def _entries(batch: list[Record]) -> Iterator[list[Record]]:
    """The records of a batch, in order, in as many entries as their size needs."""
    start = size = 0
    for end, record in enumerate(batch):
        size += len(json.dumps(record))
        if size > ENTRY_SIZE and end > start:
            yield batch[start:end]
            start, size = end, len(json.dumps(record))
    yield batch[start:]


def _records(attrs: Mapping[str, Any]) -> list[Record]:
    if "records" in attrs:
        return list(attrs["records"])
    return list(json.loads("".join(attrs[f"part{number}"] for number in range(len(attrs) - 1))))


def results_in(records: Iterable[Record]) -> Iterator[tuple[str, TaskResult]]:
    """The results among the records, in order, each with the `task_key` of its task."""
    for record in records:
        if "key" in record:
            yield record["key"], decode_result(record)


def encode_result(task: Task, result: TaskResult) -> Record:
    """A result as a record. Texts are clipped, so that a run and its resumption show the same."""
    content = result.content
    kind = "outcome" if isinstance(content, Outcome) else "proposal"
    said = {
        f.name: value for f in fields(content) if (value := getattr(content, f.name)) not in (None, "", ())
    }
    if isinstance(content, Outcome):
        said = {name: clip(value) if isinstance(value, str) else value for name, value in said.items()}
    return {
        "key": task_key(task),
        kind: said,
        "usage": encode_usage(result.usage),
        "seconds": result.seconds,
    }


def decode_result(record: Mapping[str, Any]) -> TaskResult:
    content: Proposal | Outcome
    if "outcome" in record:
        content = Outcome(**record["outcome"])
    else:
        proposal = record["proposal"]
        content = Proposal(proposal["texts"], tuple(proposal.get("problems", ())), proposal.get("error"))
    return TaskResult(content, Usage(**record["usage"]), record["seconds"])


def _usage_of(record: Mapping[str, Any]) -> Usage:
    return Usage(**(record.get("usage") or record.get("spent") or {}))


def encode_usage(usage: Usage) -> Record:
    """The counts that are not zero."""
    return {f.name: value for f in fields(usage) if (value := getattr(usage, f.name))}
