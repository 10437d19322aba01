"""One compile call from start to end: propose, evaluate, record, stop."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import threading
import time
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from .config import assembly
from .config.arguments import OPROConfig
from .config.plan import forecast, make_search, warn_after_student
from .config.preflight import check_inputs
from .programs.awaiting import EventLoop
from .programs.errors import clean_record
from .programs.failures import FirstExamples, check_program
from .programs.metering import Ledger
from .reporting.evaluations import EvaluationCallbacks
from .reporting.progress import Progress, announce
from .reporting.reporter import Reporter
from .reporting.run_directory import REPORT, RunDirectory
from .runner.interrupts import interrupts
from .runner.remote import RemoteEvaluator
from .runner.task_queue import TaskQueue, WorkerPool
from .search.proposals import NO_ROOM
from .search.tasks import (
    CandidatesProposed,
    Event,
    RoundDecided,
    ScoringTask,
    Task,
    TaskResult,
    TrialFinished,
)
from .storage.run_storage import RESUMABLE

logger = logging.getLogger("dspy_opro")
logger.addFilter(clean_record)


def optimize(job: Job) -> Any:
    """Run the search and build the best program.

    Raises:
        Exception: The error that ended the run. Its `program` is the best program so far.
    """
    queue = job.queue
    with interrupts(queue.stop):
        try:
            queue.replay()  # results of earlier processes are not paid for again
            job.reporter.announce_resume()
            with WorkerPool(queue, job.perform, job.inputs.num_threads) as workers:
                for event in queue.events():  # waits; None at least twice a second
                    workers.refill()
                    job.report(event)
            job.check_proposals()
        except Exception as error:
            raised: Any = error
            job.reporter.fail(error)
            with contextlib.suppress(AttributeError):  # an exception may refuse attributes
                raised.program = job.reporter.best_program()
            raise
        finally:
            job.close()
        return job.reporter.best_program()


async def optimize_in_thread(job: Job) -> Any:
    """`optimize` in a thread. A program with its own `aforward` is awaited on the caller's event loop.

    If the caller is cancelled, the run ends as after Ctrl-C: running calls are waited for and kept. Cancelled again,
    or after another stop, it ends at once.
    """
    done: Future[tuple[Any, BaseException | None]] = Future()
    done.set_running_or_notify_cancel()  # if nobody waits any more, the thread still ends without an error
    context = contextvars.copy_context()

    def work() -> None:
        try:
            done.set_result((context.run(optimize, job), None))
        except BaseException as error:  # raised below as it is; `set_exception` would replace a TimeoutError
            done.set_result((None, error))

    threading.Thread(target=work, name="dspy_opro compile", daemon=True).start()
    ended = asyncio.wrap_future(done)
    with interrupts(job.queue.stop):
        try:
            program, error = await asyncio.shield(ended)
        except asyncio.CancelledError:
            try:
                if job.queue.stop("interrupted"):
                    await ended
            finally:
                ended.cancel()
                job.queue.close()
            raise
    if error is not None:
        raise error
    return program


class Job:
    """One compile call: its inputs, the work on its tasks, and the reports on its events.

    `loop` is the caller's event loop in `acompile`.

    Raises:
        ValueError: A dataset, the program or a setting is not usable. Nothing was spent.
        TypeError: An input has the wrong type. Nothing was spent.
        RuntimeError: Another process uses `log_dir`. Nothing was spent.
    """

    def __init__(
        self, config: OPROConfig, student: Any, loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        started = time.monotonic()
        self.inputs = inputs = check_inputs(config, student)
        self.config = config = inputs.config
        settings = assembly.settings(inputs)
        with ExitStack() as on_error:  # closes the parts if a later one can't be made
            self.ledger = Ledger()
            self._loop = EventLoop(loop)
            on_error.callback(self._loop.close)
            self.evaluator = assembly.make_evaluator(inputs, self._loop, is_async=loop is not None)
            self._remote: RemoteEvaluator | None = None
            if config.executor is not None:
                self._remote = RemoteEvaluator(config.executor, self.evaluator, inputs.splits)
            self.writer = assembly.make_writer(inputs, self._loop)
            build = self.evaluator.build
            self._evaluations = EvaluationCallbacks(inputs.metric.function, build, inputs.splits, loop)
            # It says whether the plan differs from the one on record, and whether the budget pays for the student.
            planned = make_search(config, inputs.program.candidate, inputs.sizes)
            self._directory = None if config.log_dir is None else RunDirectory(config.log_dir)
            if self._directory is not None:
                on_error.callback(self._directory.close)
            self.storage = assembly.make_storage(inputs)
            on_error.callback(self.storage.release)
            search = assembly.resumed_search(inputs, self.storage, planned)
            self._demo_writer = assembly.make_demo_writer(inputs, search.plan, self._loop)
            if self._directory is not None:  # the storage has checked that the directory belongs to this run
                self._directory.write_config(settings)
            is_shown = config.display_progress or config.verbose
            if is_shown:
                announce(forecast(config.auto, search, config.bounds))
                if self._directory is not None:
                    announce(f"Open {self._directory.path / REPORT} in a browser to watch the run.")
            budget = assembly.budget(config, self.storage.lost_usage())
            limits = assembly.limits(search.plan, budget)
            progress = Progress(config.display_progress, config.verbose, limits)
            on_error.callback(progress.close)
            self.reporter = Reporter(
                started=started,
                search=search,
                storage=self.storage,
                ledger=self.ledger,
                program=inputs.program,
                splits=inputs.splits,
                orders=inputs.orders,
                settings=settings,
                progress=progress,
                directory=self._directory,
                limits=limits,
            )
            self._measured = assembly.measured_budget(config)
            is_new = self.storage.has_no_results
            self.queue = TaskQueue(
                search=search,
                storage=self.storage,
                ledger=self.ledger,
                budget=budget,
                failures=assembly.failure_limit(config),
                first=FirstExamples(search.plan.num_train, self._measured) if is_new else None,
                num_threads=inputs.num_threads,
                time_limit=assembly.time_limit(config),
                max_outage_seconds=config.max_outage_seconds,
            )
            # With a larger lag round 1 asks without waiting for the student's score, so a broken LM shows early.
            self._tries_lm = is_new and search.plan.lag < 2 and assembly.needs_a_try(inputs)
            is_wanted = is_new and is_shown
            self._estimate = assembly.RunEstimate(inputs, self.writer.meta_prompt, search.plan, is_wanted)
            on_error.pop_all()

    def perform(self, task: Task) -> TaskResult:
        """Do a task, in a worker thread."""
        if not isinstance(task, ScoringTask):
            writer = self._demo_writer if task.is_for_demos else self.writer
            return writer.write(task, self.ledger.add_calls)
        started = time.monotonic()
        if self._remote is not None:
            result = self._remote.evaluate(task, self.ledger.add_calls)
        else:
            example = self.inputs.splits[task.split][task.position]
            call_id = self._evaluations.call_id(task.candidate)
            result, prediction = self.evaluator.evaluate(
                task.candidate, example, self.ledger.add_calls, call_id, keeps_calls=task.split == "train"
            )
            self._evaluations.keep(task, prediction, result)
        self._estimate.add(task, result, time.monotonic() - started)
        return self._with_lm_tried(result)

    def _with_lm_tried(self, result: TaskResult) -> TaskResult:
        """Once the first example has passed, and before any other is scored: try the optimizer LM."""
        if not self._tries_lm or result.error is not None:
            return result
        self._tries_lm = False  # the first example is alone in flight
        check_program(self._measured, result.usage)
        return replace(result, usage=result.usage + self.writer.try_out(self.ledger.add_calls))

    def report(self, event: Event | None) -> None:
        """Report an event in the calling thread: to trials, callbacks, progress and the run directory."""
        if event is not None:
            self.storage.trial_writer.show(event)
        elif self.storage.outage.is_under_way:
            self.storage.trial_writer.write()
        self._evaluations.show(event)
        if isinstance(event, TrialFinished):
            self.evaluator.forget(event.trial.candidate)
        elif isinstance(event, CandidatesProposed):
            if left := sum(problem.endswith(NO_ROOM) for problem in event.dropped):
                logger.warning(
                    "The budget pays for a small first round: the last %d of initial_instructions are not tried. "
                    "Give fewer of them or a larger budget.",
                    left,
                )
        elif isinstance(event, RoundDecided) and event.round == 0:
            student = self.queue.search.trajectory.trials[0]
            num_train, measured = len(self.inputs.trainset), self._measured
            warn_after_student(self.config, student, num_train, measured, self.ledger.usage)
        if (said := self._estimate.take()) is not None:
            announce(str(said))
        self.reporter.show(event, self.queue.waiting.trouble(time.monotonic()))
        if self.storage.study.is_stopped:
            self.queue.stop("callback")
        if self._directory is not None and self._directory.take_stop():
            self.queue.stop("stop_file")

    def check_proposals(self) -> None:
        """Raise `ProposerFailed` if every call of the proposer failed in a run that nobody stopped."""
        if self.queue.search.stop_reason not in RESUMABLE and not self.storage.has_proposal:
            self.writer.check()

    def close(self) -> None:
        """Write the rest of the run, and close everything, also after an error or a second Ctrl-C in here."""
        search = self.queue.search
        with ExitStack() as rest:  # from last to first
            rest.callback(self.reporter.close)
            rest.callback(self._loop.close)
            if self._remote is not None:
                rest.callback(self._remote.close)
            reason = search.stop_reason or "error"
            returned = search.returned if len(search.trajectory) else None
            self.storage.close(reason, returned, search.plan.confirms)
