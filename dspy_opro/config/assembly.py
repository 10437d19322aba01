"""Makes what a run consists of out of its checked inputs: evaluator, writers, storage, and its limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from statistics import fmean
from typing import Any

import dspy

from dspy_opro.programs.awaiting import EventLoop, ExampleTimeout
from dspy_opro.programs.compat import model_name
from dspy_opro.programs.errors import in_brief
from dspy_opro.programs.evaluator import ONE_EXAMPLE, Evaluator
from dspy_opro.programs.failures import FailureLimit, TimeLimit
from dspy_opro.programs.metering import Budget
from dspy_opro.programs.program import is_awaited
from dspy_opro.programs.tracing import PredictorFeedback
from dspy_opro.proposers.cleaning import InstructionRules
from dspy_opro.proposers.demos import DemoWriter, num_bootstrapped
from dspy_opro.proposers.meta_prompt import MetaPrompt, guidance_text
from dspy_opro.proposers.opro import OPROProposer, PaperProposer
from dspy_opro.proposers.reflective import adapt
from dspy_opro.proposers.writer import InstructionWriter, initial_texts
from dspy_opro.search import Search
from dspy_opro.search.tasks import Plan, ScoringTask, TaskResult
from dspy_opro.search.trajectory import Outcome, Usage
from dspy_opro.storage.carrying import decode
from dspy_opro.storage.fingerprint import fingerprint
from dspy_opro.storage.run_storage import RunStorage, open_run

from .arguments import OPROConfig, paper
from .estimate import MOST_IN_A_RUN, NUM_EXAMPLES, Estimate, estimate
from .plan import budget_problem, make_search, plan_on_record, warn_of_small_budget
from .preflight import Inputs, program_models
from .readable import readable


def settings(inputs: Inputs) -> dict[str, Any]:
    """The settings in readable form, with the LMs that the run uses where none was given."""
    predictors, default = inputs.program.student.predictors(), dspy.settings.lm
    scorers = [inputs.config.task_model or predictor.lm or default for predictor in predictors]
    names = {"prompt_model": [inputs.prompt_model], "task_model": scorers}
    return readable(inputs.config) | {
        role: ", ".join(dict.fromkeys(filter(None, map(model_name, lms)))) or None
        for role, lms in names.items()
    }


def make_evaluator(inputs: Inputs, loop: EventLoop, is_async: bool) -> Evaluator:
    """What scores an example. `is_async` says that the caller has an event loop, which awaits an `aforward`."""
    config, student = inputs.config, inputs.program.student
    return Evaluator(
        inputs.program,
        inputs.metric,
        loop,
        config.task_model,
        config.failure_score,
        is_awaited=is_awaited(student, config.task_model or dspy.settings.lm, is_async),
        timeout_seconds=config.example_timeout_seconds,
        prices=config.prices,
    )


def make_writer(inputs: Inputs, loop: EventLoop) -> InstructionWriter:
    """What asks the proposer for instructions.

    Raises:
        ValueError: The proposer does not go with the strategy, or the user's own instructions are not usable.
    """
    config, program, train = inputs.config, inputs.program, inputs.splits["train"]
    is_paper = paper(config)
    own: Any = PaperProposer() if is_paper else OPROProposer()
    is_joint = config.predictor_strategy == "joint" and len(program.names) > 1
    if is_joint and getattr(config.proposer, "writes_one", False):
        raise ValueError(
            f'predictor_strategy="joint" needs another proposer: {type(config.proposer).__name__} writes one '
            "instruction at a time. Pass another proposer or another predictor_strategy."
        )
    max_chars, must_keep = config.max_instruction_chars, config.must_keep
    written = [
        given.values() if isinstance(given, Mapping) else [given] for given in config.initial_instructions
    ]
    rules = InstructionRules.of(program, train, is_paper, max_chars, must_keep, chain.from_iterable(written))
    guidance = guidance_text(config.guidance, max_chars, must_keep)
    # The paper's requests stay as they are.
    on_length = guidance if is_paper else guidance_text(config.guidance, rules.max_length, must_keep)
    return InstructionWriter(
        own if config.proposer is None else adapt(config.proposer),
        inputs.prompt_model,
        config.init_temperature,
        program,
        MetaPrompt(
            program,
            train,
            config.k_best,
            config.num_exemplars,
            config.seed,
            is_paper,
            guidance,
            on_length,
            PredictorFeedback(program, inputs.metric, loop, config.task_model),
            getattr(own if config.proposer is None else config.proposer, "induces", False),
            rules.max_length,
        ),
        rules,
        loop,
        initial_texts(config.initial_instructions, program, rules),
        config.prices,
        measured_budget(config),
    )


def needs_a_try(inputs: Inputs) -> bool:
    """Whether only a request of its own shows that the optimizer LM works before the student is scored.

    The student's first example shows it if the program calls the same LM. A proposer of the user may call no LM, and a
    time limit for the example would count the request.
    """
    config, predictors = inputs.config, inputs.program.student.predictors()
    default = config.task_model or dspy.settings.lm
    is_called = any((predictor.lm or default) is inputs.prompt_model for predictor in predictors)
    is_asked = config.proposer is None or config.prompt_model is not None
    return is_asked and not is_called and config.example_timeout_seconds is None


def make_demo_writer(inputs: Inputs, plan: Plan, loop: EventLoop) -> DemoWriter:
    """What makes demo sets, from the examples that are kept for them, or else from those that score the candidates."""
    config = inputs.config
    most, labeled = config.max_bootstrapped_demos or 0, config.max_labeled_demos or 0
    return DemoWriter(
        program=inputs.program,
        metric=inputs.metric,
        loop=loop,
        trainset=inputs.for_demos or inputs.splits["train"][: plan.num_train],
        max_bootstrapped_demos=most,
        max_labeled_demos=labeled,
        max_rounds=config.max_rounds,
        metric_threshold=config.metric_threshold,
        max_errors=config.max_errors,
        max_tries=plan.max_demo_calls // max(1, num_bootstrapped(plan.num_demo_sets, most, labeled)),
        teacher=inputs.teacher,
        teacher_settings=config.teacher_settings,
        seed=config.seed,
        task_model=config.task_model,
        prices=config.prices,
        first_slot=len(plan.initial),
    )


def limits(plan: Plan, budget: Budget) -> dict[str, float | None]:
    """Name of a budget -> its limit, None without one."""
    return {
        "rounds": plan.num_rounds,
        "examples": plan.max_metric_calls and plan.max_metric_calls + 2 * plan.num_held_back,
        "tokens": budget.max_tokens,
        "dollars": budget.max_cost,
        "seconds": budget.timeout_seconds,
    }


def make_storage(inputs: Inputs) -> RunStorage:
    """Open the run in its storage, or begin it there."""
    config = inputs.config
    return open_run(
        config.storage,
        config.study_name or config.name,
        config.log_dir,
        fingerprint(
            inputs.program.student,
            inputs.splits["train"],
            inputs.valset,  # a larger budget may use what a small one leaves out
            inputs.metric.function,
            task_model=config.task_model or dspy.settings.lm,
            whole_trainset=inputs.trainset,
            failure_score=config.failure_score,
            seed=config.seed,
            # What is on record was checked by these.
            max_instruction_chars=config.max_instruction_chars,
            must_keep=list(config.must_keep),
        ),
        config.callbacks,
        inputs.num_threads,
    )


def resumed_search(inputs: Inputs, storage: RunStorage, planned: Search) -> Search:
    """The planned search, with what an earlier plan of the run leaves to it.

    Raises:
        ValueError: The budget does not pay for what a resumed run scores first.
    """
    config, student = inputs.config, inputs.program.candidate
    plan = storage.plan_record(plan_on_record(config, planned), student)
    carried = decode(plan, student, storage.past)
    recorded = {key: result.usage for key, result in storage.results()}
    search = make_search(config, student, inputs.sizes, carried, inputs.seen(recorded))
    if (problem := budget_problem(search, carried, recorded)) is not None:
        raise ValueError(problem)
    storage.begin(plan)
    warn_of_small_budget(search)
    return search


def make_estimate(
    inputs: Inputs,
    meta_prompt: MetaPrompt,
    results: Sequence[TaskResult],
    seconds: float,
    most_examples: float = math.inf,
) -> Estimate:
    """The estimate of a run from the student's first results, each of which took so many seconds."""
    config = inputs.config
    # The scores are simulated, so nothing of the user's looks at them.
    pruner = None if config.pruner is None else "auto"
    no_scores = config.model_copy(update={"stoppers": [], "stop_at_score": None, "pruner": pruner})
    return estimate(
        config,
        make_search(no_scores, inputs.program.candidate, inputs.sizes),
        replace(meta_prompt, feedback=None),  # a metric's LM calls would cost something
        model_name(inputs.prompt_model),
        program_models(config, inputs.program.student),
        results,
        seconds / inputs.num_threads,
        most_examples,
    )


class RunEstimate:
    """The estimate that a run shows once the student's first examples are scored.

    Worker threads add results, and one thread takes the estimate. Nothing is estimated unless `is_wanted`.
    """

    def __init__(self, inputs: Inputs, meta_prompt: MetaPrompt, plan: Plan, is_wanted: bool) -> None:
        self._inputs = inputs
        self._meta_prompt = meta_prompt
        self._num_needed = min(NUM_EXAMPLES, plan.num_train)
        self._first: list[tuple[TaskResult, float]] = []  # the student's results with their seconds
        # With a pruner of the user's it would be the estimate of another race.
        self._is_due = is_wanted and inputs.config.pruner in (None, "auto")

    def add(self, task: ScoringTask, result: TaskResult, seconds: float) -> None:
        """Keep a result of the student."""
        if self._is_due and result.error is None and task.candidate == self._inputs.program.candidate:
            self._first.append((result, seconds))

    def take(self) -> Estimate | None:
        """The estimate, once: as soon as there are enough results."""
        if not self._is_due or len(self._first) < self._num_needed:
            return None
        self._is_due = False
        results, seconds = zip(*self._first[:NUM_EXAMPLES], strict=True)
        found = make_estimate(self._inputs, self._meta_prompt, results, fmean(seconds), MOST_IN_A_RUN)
        return None if found.expected is None else found


def budget(config: OPROConfig, lost: Usage) -> Budget:
    """The limits, less what killed processes may have paid for and not recorded."""
    tokens, cost = config.max_tokens, config.max_cost
    return Budget(
        None if tokens is None else tokens - lost.tokens,
        None if cost is None else cost - lost.cost,
        config.timeout_seconds,
    )


def measured_budget(config: OPROConfig) -> Budget:
    """The limits that the first example, or the first proposal, must be measured against."""
    return Budget(config.max_tokens, config.max_cost)


def failure_limit(config: OPROConfig) -> FailureLimit:
    traces = dspy.settings.provide_traceback if config.provide_traceback is None else config.provide_traceback
    return FailureLimit(config.max_errors, dspy.settings.max_errors, bool(traces))


def time_limit(config: OPROConfig) -> TimeLimit | None:
    seconds = config.example_timeout_seconds
    if seconds is None:
        return None
    error = ExampleTimeout(f"no score within example_timeout_seconds={seconds:g}")
    outcome = Outcome(config.failure_score, error=in_brief(error))
    return TimeLimit(seconds, TaskResult(outcome, ONE_EXAMPLE, error=error))
