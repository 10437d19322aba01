"""Reports a run while it goes on and at its end: the progress line, the files in its directory, and its result."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dspy_opro.programs.compat import forget_secrets
from dspy_opro.programs.errors import in_brief
from dspy_opro.programs.metering import Ledger
from dspy_opro.programs.program import Program
from dspy_opro.programs.prompts import prompts
from dspy_opro.search import Search
from dspy_opro.search.shared import SPLITS
from dspy_opro.search.tasks import Event, RoundDecided, Split
from dspy_opro.search.trajectory import Usage
from dspy_opro.storage.run_storage import RunStorage

from .attach import attach
from .examples import Examples, ExampleText, as_texts
from .live import LivePage
from .progress import Progress, announce
from .result import OPROResult, cost, known_cost
from .run_directory import BEST, RESULT, RunDirectory

logger = logging.getLogger("dspy_opro")


@dataclass
class Reporter:
    """What people see of one run. The thread that called `compile` tells it every event."""

    started: float
    """`time.monotonic()` at the start of the call."""
    search: Search
    storage: RunStorage
    ledger: Ledger
    program: Program
    """The student."""
    splits: Mapping[str, Sequence[Any]]
    """Split -> examples by position in the run's order."""
    orders: Mapping[str, Sequence[int]]
    """Split -> index into the user's dataset, by position in the run's order."""
    settings: Mapping[str, Any]
    """The run's settings as readable values."""
    progress: Progress
    directory: RunDirectory | None
    limits: Mapping[str, float | None]
    """Name of a budget -> its limit, None without one."""

    def __post_init__(self) -> None:
        num_train = self.search.plan.num_train
        self._page = None if self.directory is None else LivePage(self.directory, num_train, self.limits)
        self._saved = ""  # id of the candidate in `best.json`
        self._error = ""  # what ended the run, in brief
        self._ended: float | None = None  # `time.monotonic()` at the end of the run
        self._earlier_usage = sum((result.usage for _, result in self.storage.results_to_replay()), Usage())

    def announce_resume(self) -> None:
        """Print what earlier processes of this run recorded."""
        if self.storage.has_no_results:
            return
        lost = self.storage.lost_usage()
        if lost.metric_calls:
            logger.warning(
                "Killed processes of this run may have paid for up to %d examples more than are on record: about %d "
                "tokens, %s. The budgets leave room for that.",
                *(lost.metric_calls, lost.tokens, cost(lost, brief=True)),
            )
        num_rounds = max(0, len(self.search.best_scores) - 1)
        self.progress.resume(num_rounds)
        if not (self.settings["display_progress"] or self.settings["verbose"]):
            return
        usage, most_rounds = self.ledger.usage, self.search.plan.num_rounds
        rounds = f"{num_rounds}{'' if most_rounds is None else f' of {most_rounds}'}"
        spent = ("" if known_cost(usage) is None else "spent ") + cost(usage, 2, brief=True)
        name = self.settings["log_dir"] or self.storage.study.study_name
        announce(f"Resuming {name}: {rounds} rounds, {usage.metric_calls:,} examples on record, {spent}.")

    def show(self, event: Event | None, trouble: str) -> None:
        """Show an event (or None), and what holds calls back at the moment."""
        self.progress.show(event, self.ledger.usage, trouble)
        if self.directory is not None and isinstance(event, RoundDecided):
            self.directory.log("round %d decided, best score %.4f", event.round, event.best_score)
            self._save_best(self.directory)
        if self._page is not None and self._page.is_due(event):
            result = self.result()
            is_racing = not self.search.is_confirming
            self._page.write(result, max(result.seconds, self.search.seconds), is_racing)

    def fail(self, error: Exception) -> None:
        """An error ends the run."""
        self._error, self._ended = in_brief(error), time.monotonic()

    def close(self) -> None:
        """Show the end of the run, and write the rest of its files."""
        self._ended = self._ended or time.monotonic()
        with ExitStack() as rest:
            if self.directory is not None:
                rest.callback(self.directory.close)
                rest.callback(self._write_last, self.directory)
            self.progress.close(has_failed=bool(self._error))
            if len(self.search.trajectory) and (
                self.settings["display_progress"] or self.settings["verbose"]
            ):
                announce(f"OPRO ended ({self.search.stop_reason or 'error'}): {self.result().headline()}")

    def _write_last(self, directory: RunDirectory) -> None:
        self._save_best(directory)
        if self._page is not None:
            self._page.close(self.result())
        directory.write(RESULT, lambda path: self._finished()[1].save(path))
        directory.log("ended: %s", ": ".join(filter(None, (self.search.stop_reason or "error", self._error))))

    def _save_best(self, directory: RunDirectory) -> None:
        """Write `best.json`, unless it has the best program already."""
        if not len(self.search.trajectory):
            return
        best = self.search.returned.candidate

        def save(path: Path) -> None:
            program = self.program.build(best)
            forget_secrets(program)
            program.save(path)

        if best.id != self._saved and directory.write(BEST, save):
            self._saved = best.id

    def best_program(self) -> Any:
        """The best program so far, with its result attached."""
        best, result = self._finished()
        attach(best, result, self.program.build, self.settings["track_stats"])
        return best

    def _finished(self) -> tuple[Any, OPROResult]:
        """The best program so far, and the result with its prompts."""
        result, program = self.result(), self.program
        best = program.build(result.best.candidate if len(result.trajectory) else program.candidate)
        return best, replace(result, messages=prompts(best, program.names))

    def result(self) -> OPROResult:
        """The result of the run so far."""
        search = self.search
        failures = sorted(search.failures, key=lambda f: (f.candidate, f.split, f.example))
        return OPROResult(
            trajectory=search.trajectory,
            curve=tuple(search.best_scores),
            stop_reason=search.stop_reason or "error",
            error=self._error,
            usage=self.ledger.usage,
            earlier_usage=self._earlier_usage,
            seconds=(self._ended or time.monotonic()) - self.started,
            failures=tuple(replace(f, example=self.orders[f.split][f.example]) for f in failures[:1000]),
            num_failures=len(failures),
            selected_on="valset" if search.plan.num_val else "trainset",
            config=self.settings,
            study_name=self.storage.study.study_name,
            problems=tuple(search.problems),
            returned=search.returned.id if len(search.trajectory) else "",
            gain=search.gain_so_far,
            data=self._examples(),
        )

    def _examples(self) -> Examples:
        search = self.search
        if not len(search.trajectory):
            return Examples()
        trajectory = search.trajectory
        shown = (trajectory.trials[0], trajectory.best, search.chosen, search.returned)
        return Examples(
            self._texts, {t.id: {s: search.outcomes(t.candidate, s) for s in SPLITS} for t in shown}
        )

    @cached_property
    def _texts(self) -> Mapping[Split, Sequence[ExampleText]]:
        plan = self.search.plan
        num_unseen = plan.num_spare + plan.num_unseen
        sizes: Mapping[Split, int] = {"train": plan.num_train, "val": plan.num_val, "unseen": num_unseen}
        return {s: as_texts(self.splits[s][:size], self.orders[s]) for s, size in sizes.items() if size}
