"""One `compile` call: its parts are put together here, told of each other, and closed."""

from __future__ import annotations

import re
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import dspy

from . import study
from .attach import attach
from .config import OPROConfig
from .evaluation import Run
from .events import Reporter
from .executor import DSPyExecutor
from .fingerprint import model_name, settings_of
from .parts import make_executor, make_store
from .planning import forecast, make_search, make_stoppers, warn_of_percent, warn_without_prices
from .preflight import Inputs, check
from .progress import Progress, announce
from .result import OPROResult
from .rundir import RunDirectory
from .search import Search
from .stopping import Budget, Ledger, RunState, first_reason
from .trajectory import Trial
from .work import Block, Decided, Event, Failure, Finished


@dataclass
class Setup:
    """One `compile` call, ready to run."""

    inputs: Inputs
    executor: DSPyExecutor
    store: study.OptunaStore
    progress: Progress
    run: Run
    reporter: Reporter
    directory: RunDirectory | None
    """The files in `log_dir`."""
    started: float
    finished: list[Trial] = field(default_factory=list)
    """Trials since the last round was decided."""

    def __post_init__(self) -> None:
        self.run.on_event, self.run.on_tick = self._on_event, self._on_tick
        self.store.on_stop = lambda: self.run.request_stop("callback")

    @property
    def search(self) -> Search:
        return self.run.search

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Finished):
            candidate = event.trial.candidate
            self.reporter.finished(event.trial, lambda: self.executor.build(candidate), self.inputs.splits)
            self.executor.forget(candidate)
            self.finished.append(event.trial)
        self.progress.on_event(event)
        if self.directory is not None and isinstance(event, Decided):
            self.directory.log("round %d decided, best score %.4f", event.round, event.best_score)
        if isinstance(event, Decided):
            if event.round == 0:
                warn_of_percent(self.inputs.config.stop_at_score, event.best)
                warn_without_prices(self.inputs.config.max_cost, self.run.ledger.usage)
            trials, self.finished = self.finished, []
            self.executor.decided(trials)

    def _on_tick(self) -> None:
        """Look for a wish from outside, and keep `best.json` up to date."""
        if self.directory is None:
            return
        if self.directory.take_stop():
            self.run.request_stop("stop_file")
        self._save_best()

    def _save_best(self, wait: bool = False) -> None:
        if self.directory is not None and len(self.search.trajectory):
            best, build = self.search.trajectory.best.candidate, self.inputs.program.build
            self.directory.write_best(best.id, lambda path: build(best).save(path), wait)

    def close(self) -> None:
        self.progress.close()
        self.executor.close()
        if self.directory is not None:
            self._save_best(wait=True)
            self.directory.log("ended: %s", self.search.stop_reason)
            self.directory.close()

    def result(self) -> OPROResult:
        """What the run found so far."""
        search, run, orders = self.search, self.run, self.inputs.orders
        failures = [
            replace(f, example=orders[f.split][f.example]) for f in sorted(run.told.failures, key=_place)
        ]
        return OPROResult(
            trajectory=search.trajectory,
            curve=tuple(search.best_scores),
            stop_reason=search.stop_reason or "error",
            usage=run.ledger.usage,
            seconds=time.monotonic() - self.started,
            failures=tuple(failures[:1000]),
            num_failures=len(failures),
            selected_on="valset" if search.plan.num_val else "trainset",
            config=readable(self.inputs.config),
            study_name=self.store.study.study_name,
            problems=tuple(search.problems),
        )

    def best_program(self) -> Any:
        """The best program so far, with what the run found attached."""
        result, program = self.result(), self.inputs.program
        best = result.best.candidate if len(result.trajectory) else program.candidate
        built = program.build(best)
        attach(built, result, program.build, self.inputs.config.track_stats)
        return built


def _place(failure: Failure) -> tuple[str, str, int]:
    return failure.candidate, failure.split, failure.example


def set_up(config: OPROConfig, student: Any, is_async: bool) -> Setup:
    """Check every input and put the parts together.

    Raises:
        ValueError: A dataset, the program or a setting can't be used.
        TypeError: Something is not of the type it must be.
    """
    with ExitStack() as on_error:
        setup = _set_up(config, student, is_async, on_error)
        on_error.pop_all()
    return setup


def _set_up(config: OPROConfig, student: Any, is_async: bool, on_error: ExitStack) -> Setup:
    started = time.monotonic()
    inputs = check(config, student)
    config, program, train = inputs.config, inputs.program, inputs.splits["train"]
    ledger = Ledger()
    reporter = Reporter(inputs.metric.function, at_once=is_async)
    executor = make_executor(inputs, ledger, reporter, is_async)
    on_error.callback(executor.close)
    search = make_search(config, program.candidate, len(train), len(inputs.splits["val"]))
    program.demo_sets = search.demo_sets
    directory = None
    if config.log_dir is not None:
        directory = RunDirectory(config.log_dir, is_shared=config.storage is not None)
        on_error.callback(directory.close)
    store = make_store(inputs)
    if directory is not None:  # only now it is known to be this run's
        directory.write_config(readable(config))
    if config.display_progress or config.verbose:
        announce(forecast(config.auto, search, config.bounds))
    progress = Progress(config.display_progress, config.verbose, config.num_rounds, lambda: ledger.usage)
    on_error.callback(progress.close)
    budget = Budget(config.max_tokens, config.max_cost, config.timeout_seconds)
    num_threads = config.num_threads or dspy.settings.num_threads
    shared = store if isinstance(store, study.SharedStore) else None
    run = Run(search, executor, store, ledger, budget, num_threads, shared)
    setup = Setup(inputs, executor, store, progress, run, reporter, directory, started)
    first = Block(program.candidate, 0, "train", 0, min(config.block_size, search.plan.num_train))
    if store.is_fresh if shared is None else shared.join(settings_of(config, search.plan), first):
        run.prepare = lambda: executor.try_one(program.candidate)
    stoppers = make_stoppers(config)

    def stop_rule(state: RunState) -> str | None:
        return first_reason(stoppers, replace(state, usage=run.told.usage, seconds=run.told.seconds))

    search.stop_rule = stop_rule
    return setup


def readable(config: OPROConfig) -> dict[str, Any]:
    """The settings as values that print and pickle."""
    shown: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if name in ("trainset", "valset"):
            value = None if value is None else len(value)
        elif name in ("prompt_model", "task_model"):
            value = model_name(value) or None
        elif callable(value):
            value = getattr(value, "__qualname__", type(value).__name__)
        elif not isinstance(value, (str, int, float, bool, type(None))):
            value = repr(value)
        shown[name] = without_password(value) if name == "storage" else value
    return shown


def without_password(url: Any) -> Any:
    """A storage URL as it may be shown."""
    if not isinstance(url, str):
        return url
    url = re.sub(r"(://[^:/@]*):.*@", r"\1:***@", url)
    return re.sub(r"(?i)([?&][^=&]*(?:pass|secret|token|key)[^=&]*=)[^&]*", r"\1***", url)
