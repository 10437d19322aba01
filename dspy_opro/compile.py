"""One compile call from start to end: propose, evaluate, record, stop."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import dspy

from .config.arguments import OPROConfig, paper
from .config.estimate import NUM_EXAMPLES, estimate
from .config.plan import (
    forecast,
    make_search,
    plan_on_record,
    warn_of_little_to_gain,
    warn_of_percent,
    warn_without_prices,
)
from .config.preflight import Inputs, check
from .config.readable import readable
from .programs.awaiting import EventLoop, ExampleTimeout
from .programs.compat import defines, forget_secrets, model_name
from .programs.errors import clean_record, in_brief
from .programs.evaluator import ONE_EXAMPLE, Evaluator
from .programs.failures import FailureLimit, FirstExamples, TimeLimit, check_budget
from .programs.metering import Ledger
from .programs.program import is_async_only
from .programs.prompts import prompts
from .programs.tracing import PredictorFeedback
from .proposers.cleaning import InstructionRules
from .proposers.demos import DemoWriter
from .proposers.meta_prompt import MetaPrompt, guidance_text
from .proposers.opro import OPROProposer, PaperProposer
from .proposers.reflective import adapt
from .proposers.writer import InstructionWriter, initial_texts
from .reporting.attach import attach
from .reporting.evaluations import EvaluationCallbacks
from .reporting.examples import Examples, ExampleText, as_texts
from .reporting.live import LivePage
from .reporting.progress import Progress, announce
from .reporting.result import OPROResult, cost
from .reporting.run_directory import RunDirectory
from .runner.interrupts import interrupts
from .runner.remote import RemoteEvaluator
from .runner.task_queue import TaskQueue, WorkerPool
from .search.shared import SPLITS
from .search.stoppers import Budget
from .search.tasks import Event, Plan, RoundDecided, ScoringTask, Split, Task, TaskResult, TrialFinished
from .search.trajectory import Outcome, Usage
from .storage.fingerprint import fingerprint
from .storage.run_storage import RESUMABLE, RunStorage, open_run

logger = logging.getLogger("dspy_opro")
logger.addFilter(clean_record)


def optimize(job: Job) -> Any:
    """Run the search and build the best program.

    Raises:
        Exception: The error that ended the run. Its `program` is the best program so far.
    """
    queue = job.queue
    try:
        queue.replay()  # results of earlier processes are not paid for again
        job.announce_resume()
        with interrupts(queue.stop), WorkerPool(queue, job.perform, job.num_threads) as workers:
            for event in queue.events():  # waits; None at least twice a second
                workers.refill()
                job.report(event)
        job.check_proposals()
    except Exception as error:
        raised: Any = error
        with contextlib.suppress(AttributeError):  # an exception may refuse attributes
            raised.program = job.best_program()
        raise
    finally:
        job.close()
    return job.best_program()


def dry_run(config: OPROConfig, student: Any, loop: asyncio.AbstractEventLoop | None = None) -> Any:
    """Score the student on its first examples, and print what a run would spend. Returns a copy of the student.

    Raises:
        ValueError, TypeError, MetricError, TooManyErrors: As at the start of a run.
    """
    inputs = check(config, student)
    config, program, train = inputs.config, inputs.program, inputs.splits["train"][:NUM_EXAMPLES]
    events = EventLoop(loop)
    try:
        evaluator = _evaluator(inputs, events, is_async=loop is not None)
        writer = _writer(inputs, events)
        # The scores are simulated, so nothing of the user's looks at them.
        no_scores = config.model_copy(update={"stoppers": [], "stop_at_score": None})
        search = make_search(no_scores, program.candidate, inputs.sizes)
        first: FirstExamples | None = FirstExamples(len(train), _measured(config))
        started, results = time.monotonic(), []
        for example in train:
            result, _ = evaluator.evaluate(program.candidate, example, keeps_calls=True)
            results.append(result)
            if first is not None and first.passes(result):
                first = None
        seconds = (time.monotonic() - started) / len(train)
    finally:
        events.close()
    lms = [
        predictor.lm or config.task_model or dspy.settings.lm for predictor in program.student.predictors()
    ]
    said = estimate(
        config,
        search,
        replace(writer.meta_prompt, feedback=None),  # a metric's LM calls would cost something
        model_name(inputs.prompt_model),
        {model_name(lm) for lm in lms},
        results,
        seconds / (config.num_threads or dspy.settings.num_threads),
    )
    announce(str(said))
    copied = program.build(program.candidate)
    copied.opro_estimate = said
    return copied


async def optimize_in_thread(job: Job) -> Any:
    """`optimize` in a thread. A program with its own `aforward` is awaited on the caller's event loop."""
    done: Future[tuple[Any, BaseException | None]] = Future()
    done.set_running_or_notify_cancel()  # if the caller is cancelled, the thread still ends without an error
    context = contextvars.copy_context()

    def work() -> None:
        try:
            done.set_result((context.run(optimize, job), None))
        except BaseException as error:  # raised below as it is; `set_exception` would replace a TimeoutError
            done.set_result((None, error))

    threading.Thread(target=work, name="dspy_opro compile", daemon=True).start()
    try:
        with interrupts(job.queue.stop):
            program, error = await asyncio.wrap_future(done)
    finally:
        job.queue.close()  # the caller may have been cancelled
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
        self._started = time.monotonic()
        self.inputs = inputs = check(config, student)
        self.config = config = inputs.config
        with ExitStack() as on_error:  # closes the parts if a later one can't be made
            self.ledger = Ledger()
            self._loop = EventLoop(loop)
            on_error.callback(self._loop.close)
            self.evaluator = _evaluator(inputs, self._loop, is_async=loop is not None)
            self._remote: RemoteEvaluator | None = None
            if config.executor is not None:
                self._remote = RemoteEvaluator(config.executor, self.evaluator, inputs.splits)
            self.writer = _writer(inputs, self._loop)
            self._evaluations = EvaluationCallbacks(inputs.metric.function, loop)
            search = make_search(config, inputs.program.candidate, inputs.sizes)
            self._demo_writer = _demo_writer(inputs, search.plan.max_demo_calls)
            self._directory = None if config.log_dir is None else RunDirectory(config.log_dir)
            if self._directory is not None:
                on_error.callback(self._directory.close)
            self.storage = _storage(inputs)
            carried = self.storage.carried(plan_on_record(config, search), search.student)
            search = make_search(config, search.student, inputs.sizes, carried)
            if self._directory is not None:  # the storage has checked that the directory belongs to this run
                self._directory.write_config(_settings(inputs))
            if config.display_progress or config.verbose:
                announce(forecast(config.auto, search, config.bounds))
            budget = _budget(config, self.storage.lost_usage())
            limits = config.num_rounds, search.plan.max_metric_calls, budget
            self._progress = Progress(config.display_progress, config.verbose, *limits)
            on_error.callback(self._progress.close)
            self._page = None if self._directory is None else _live_page(self._directory, config, search.plan)
            past = (result.usage for _, result in self.storage.results())
            self._earlier_usage = sum(past, Usage())
            self.num_threads = config.num_threads or dspy.settings.num_threads
            self.queue = TaskQueue(
                search,
                self.storage,
                self.ledger,
                budget,
                _failure_limit(config),
                FirstExamples(search.plan.num_train, _measured(config)) if self.storage.is_fresh else None,
                self.num_threads,
                _time_limit(config),
                config.max_outage_seconds,
            )
            self._tries_lm = self.storage.is_fresh and search.plan.lag < 2 and _needs_a_try(inputs)
            on_error.pop_all()

    def check_proposals(self) -> None:
        """Raise `ProposerFailed` if every proposal of a run failed that nobody stopped."""
        search = self.queue.search
        if search.stop_reason not in RESUMABLE and len(search.trajectory) < 2:
            self.writer.check()

    def announce_resume(self) -> None:
        """Print what earlier processes of this run recorded."""
        if self.storage.is_fresh:
            return
        lost = self.storage.lost_usage()
        if lost.metric_calls:
            logger.warning(
                "Killed processes of this run may have paid for up to %d examples more than are on record: about %d "
                "tokens and $%.4f. The budgets leave room for that.",
                *(lost.metric_calls, lost.tokens, lost.cost),
            )
        if not (self.config.display_progress or self.config.verbose):
            return
        usage, num_rounds = self.ledger.usage, max(0, len(self.queue.search.best_scores) - 1)
        planned = "" if self.config.num_rounds is None else f" of {self.config.num_rounds}"
        spent = cost(usage, 2).replace("$", "spent $")
        name = self.config.log_dir or self.storage.study.study_name
        announce(
            f"Resuming {name}: {num_rounds}{planned} rounds, {usage.metric_calls:,} examples on record, {spent}."
        )

    def perform(self, task: Task) -> TaskResult:
        """Do a task, in a worker thread."""
        if not isinstance(task, ScoringTask):
            writer = self._demo_writer if task.is_for_demos else self.writer
            return writer.write(task, self.ledger.add)
        if self._remote is not None:
            return self._with_lm_tried(self._remote.evaluate(task, self.ledger.add))
        example = self.inputs.splits[task.split][task.position]
        call_id = self._evaluations.call_id(task.candidate)
        result, prediction = self.evaluator.evaluate(
            task.candidate, example, self.ledger.add, call_id, keeps_calls=task.split == "train"
        )
        self._evaluations.keep(task, prediction, result)
        return self._with_lm_tried(result)

    def _with_lm_tried(self, result: TaskResult) -> TaskResult:
        """Once the first example has passed, and before any other is scored: try the optimizer LM."""
        if not self._tries_lm or result.error is not None:
            return result
        self._tries_lm = False  # the first example is alone in flight
        check_budget(_measured(self.config), result.usage)
        return replace(result, usage=result.usage + self.writer.try_out(self.ledger.add))

    def report(self, event: Event | None) -> None:
        """Report an event in the calling thread: to trials, callbacks, progress and the run directory."""
        if event is not None:
            self.storage.trials.show(event)
        elif self.storage.outage.is_under_way:
            self.storage.trials.write()
        if isinstance(event, TrialFinished):
            candidate, splits = event.trial.candidate, self.inputs.splits
            self._evaluations.finished(event.trial, lambda: self.evaluator.build(candidate), splits)
            self.evaluator.forget(candidate)
        elif isinstance(event, RoundDecided):
            self._decided(event)
        self._progress.show(event, self.ledger.usage, self.queue.waiting.trouble(time.monotonic()))
        if self.storage.study.is_stopped:
            self.queue.stop("callback")
        if self._directory is not None:
            if self._directory.take_stop():
                self.queue.stop("stop_file")
            self._save_best(self._directory)
        if self._page is not None and self._page.is_due(event):
            result = self.result()
            self._page.write(result, max(result.seconds, self.queue.search.seconds))

    def _decided(self, event: RoundDecided) -> None:
        if event.round == 0:
            student = self.queue.search.trajectory.trials[0]
            warn_of_little_to_gain(student, len(self.inputs.trainset))
            warn_of_percent(self.config.stop_at_score, student)
            warn_without_prices(_measured(self.config).max_cost, self.ledger.usage)
        if self._directory is not None:
            self._directory.log("round %d decided, best score %.4f", event.round, event.best_score)

    def _save_best(self, directory: RunDirectory, wait: bool = False) -> None:
        search = self.queue.search
        if len(search.trajectory):
            best = search.returned.candidate

            def save(path: Path) -> None:
                program = self.inputs.program.build(best)
                forget_secrets(program)
                program.save(path)

            directory.write_best(best.id, save, wait)

    def close(self) -> None:
        """Write the rest of the run, and close everything."""
        search = self.queue.search
        reason = search.stop_reason or "error"
        self.storage.close(reason, search.returned if len(search.trajectory) else None)
        self._progress.close()
        self._loop.close()
        if self._directory is not None:
            self._save_best(self._directory, wait=True)
            if self._page is not None:
                self._page.close(self.result())
            self._directory.write_result(lambda path: self._finished()[1].save(path))
            self._directory.log("ended: %s", reason)
            self._directory.close()

    def best_program(self) -> Any:
        """The best program so far, with its result attached."""
        best, result = self._finished()
        attach(best, result, self.inputs.program.build, self.config.track_stats)
        return best

    def _finished(self) -> tuple[Any, OPROResult]:
        """The best program so far, and the result with its prompts."""
        result, program = self.result(), self.inputs.program
        best = program.build(result.best.candidate if len(result.trajectory) else program.candidate)
        return best, replace(result, messages=prompts(best, program.names))

    def result(self) -> OPROResult:
        """The result of the run so far."""
        search, orders = self.queue.search, self.inputs.orders
        failures = sorted(search.failures, key=lambda f: (f.candidate, f.split, f.example))
        return OPROResult(
            trajectory=search.trajectory,
            curve=tuple(search.best_scores),
            stop_reason=search.stop_reason or "error",
            usage=self.ledger.usage,
            earlier_usage=self._earlier_usage,
            seconds=time.monotonic() - self._started,
            failures=tuple(replace(f, example=orders[f.split][f.example]) for f in failures[:1000]),
            num_failures=len(failures),
            selected_on="valset" if search.plan.num_val else "trainset",
            config=_settings(self.inputs),
            study_name=self.storage.study.study_name,
            problems=tuple(search.problems),
            returned=search.returned.id if len(search.trajectory) else "",
            gain=search.gain_so_far,
            data=self._examples(),
        )

    def _examples(self) -> Examples:
        search = self.queue.search
        if not len(search.trajectory):
            return Examples()
        shown = {c.id: c for c in (search.student, search.chosen.candidate)}
        return Examples(
            self._texts, {id_: {s: search.outcomes(c, s) for s in SPLITS} for id_, c in shown.items()}
        )

    @cached_property
    def _texts(self) -> Mapping[Split, Sequence[ExampleText]]:
        plan, splits, orders = self.queue.search.plan, self.inputs.splits, self.inputs.orders
        sizes: Mapping[Split, int] = {"train": plan.num_train, "val": plan.num_val, "unseen": plan.num_unseen}
        return {s: as_texts(splits[s][:size], orders[s]) for s, size in sizes.items() if size}


# -- the parts of a job --------------------------------------------------------------------------


def _settings(inputs: Inputs) -> dict[str, Any]:
    """The settings in readable form, with the LMs that the run uses where none was given."""
    predictors, default = inputs.program.student.predictors(), dspy.settings.lm
    scorers = [inputs.config.task_model or predictor.lm or default for predictor in predictors]
    names = {"prompt_model": [inputs.prompt_model], "task_model": scorers}
    return readable(inputs.config) | {
        role: ", ".join(dict.fromkeys(filter(None, map(model_name, lms)))) or None
        for role, lms in names.items()
    }


def _evaluator(inputs: Inputs, loop: EventLoop, is_async: bool) -> Evaluator:
    config, student = inputs.config, inputs.program.student
    return Evaluator(
        inputs.program,
        inputs.metric,
        loop,
        config.task_model,
        config.failure_score,
        is_awaited=is_async_only(student) or (is_async and defines(student, "aforward")),
        timeout_seconds=config.example_timeout_seconds,
        prices=config.prices,
    )


def _writer(inputs: Inputs, loop: EventLoop) -> InstructionWriter:
    config, program, train = inputs.config, inputs.program, inputs.splits["train"]
    is_paper = paper(config)
    proposer: Callable[..., Any] = PaperProposer() if is_paper else OPROProposer()
    max_chars, must_keep = config.max_instruction_chars, config.must_keep
    rules = InstructionRules.of(program, train, is_paper, max_chars, must_keep)
    guidance = guidance_text(config.guidance, max_chars, must_keep)
    return InstructionWriter(
        proposer if config.proposer is None else adapt(config.proposer),
        inputs.prompt_model,
        config.init_temperature,
        program,
        MetaPrompt(
            program,
            train,
            config.k_best or 20,
            config.num_exemplars,
            config.seed,
            is_paper,
            guidance,
            PredictorFeedback(program, inputs.metric, loop, config.task_model),
        ),
        rules,
        loop,
        initial_texts(config.initial_instructions, program, rules),
        config.prices,
    )


def _needs_a_try(inputs: Inputs) -> bool:
    """Whether only a request of its own shows that the optimizer LM works before the student is scored.

    The student's first example shows it if the program calls the same LM. A proposer of the user may call no LM, and a
    time limit for the example would count the request.
    """
    config, predictors = inputs.config, inputs.program.student.predictors()
    default = config.task_model or dspy.settings.lm
    is_called = any((predictor.lm or default) is inputs.prompt_model for predictor in predictors)
    is_asked = config.proposer is None or config.prompt_model is not None
    return is_asked and not is_called and config.example_timeout_seconds is None


def _demo_writer(inputs: Inputs, max_tries: int | None) -> DemoWriter:
    """Its demos come from the examples that no candidate is scored on, if there are enough of them."""
    config = inputs.config
    most, labeled = config.max_bootstrapped_demos or 0, config.max_labeled_demos or 0
    scored = {*inputs.orders["train"], *(() if inputs.splits["val"] else inputs.orders["unseen"])}
    others = [example for index, example in enumerate(inputs.trainset) if index not in scored]
    return DemoWriter(
        program=inputs.program,
        metric=inputs.metric,
        trainset=others if len(others) >= 2 * (most + labeled) else inputs.splits["train"],
        max_bootstrapped_demos=most,
        max_labeled_demos=labeled,
        max_rounds=config.max_rounds,
        metric_threshold=config.metric_threshold,
        max_errors=config.max_errors,
        max_tries=max_tries,
        teacher=inputs.teacher,
        teacher_settings=config.teacher_settings,
        seed=config.seed,
        task_model=config.task_model,
        prices=config.prices,
    )


def _live_page(directory: RunDirectory, config: OPROConfig, plan: Plan) -> LivePage:
    limits = {
        "rounds": plan.num_rounds,
        "examples": plan.max_metric_calls and plan.max_metric_calls + 2 * plan.num_held_back,
        "tokens": config.max_tokens,
        "dollars": config.max_cost,
        "seconds": config.timeout_seconds,
    }
    return LivePage(directory, plan.num_train, limits)


def _storage(inputs: Inputs) -> RunStorage:
    config = inputs.config
    return open_run(
        config.storage,
        config.study_name or config.name,
        config.log_dir,
        fingerprint(
            inputs.program.student,
            inputs.splits["train"],
            inputs.splits["val"],
            inputs.metric.function,
            task_model=config.task_model or dspy.settings.lm,
            failure_score=config.failure_score,
            seed=config.seed,
        ),
        config.callbacks,
        config.num_threads or dspy.settings.num_threads,
    )


def _budget(config: OPROConfig, lost: Usage) -> Budget:
    """The limits, less what killed processes may have paid for and not recorded."""
    tokens, cost = config.max_tokens, config.max_cost
    return Budget(
        None if tokens is None else tokens - lost.tokens,
        None if cost is None else cost - lost.cost,
        config.timeout_seconds,
    )


def _measured(config: OPROConfig) -> Budget:
    """The limits that the first example must be measured against.

    If the user says that an LM is free, calls without a cost are no sign of a missing price.
    """
    is_free = (0.0, 0.0) in (config.prices or {}).values()
    return Budget(config.max_tokens, None if is_free else config.max_cost)


def _failure_limit(config: OPROConfig) -> FailureLimit:
    traces, settings = config.provide_traceback, dspy.settings
    if traces is None:
        traces = bool(settings.provide_traceback)
    return FailureLimit(config.max_errors, settings.max_errors, traces)


def _time_limit(config: OPROConfig) -> TimeLimit | None:
    seconds = config.example_timeout_seconds
    if seconds is None:
        return None
    error = ExampleTimeout(f"no score within example_timeout_seconds={seconds:g}")
    outcome = Outcome(config.failure_score, error=in_brief(error))
    return TimeLimit(seconds, TaskResult(outcome, ONE_EXAMPLE, error=error))
