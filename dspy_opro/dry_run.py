"""`compile(..., dry_run=True)`: what a run would spend, for the price of the student's first examples."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import dspy

from .config.arguments import OPROConfig
from .config.assembly import make_evaluator, make_writer, measured_budget
from .config.estimate import NUM_EXAMPLES, estimate
from .config.plan import make_search
from .config.preflight import check
from .programs.awaiting import EventLoop
from .programs.compat import model_name
from .programs.failures import FirstExamples
from .reporting.progress import announce


def dry_run(config: OPROConfig, student: Any, loop: asyncio.AbstractEventLoop | None = None) -> Any:
    """Score the student on its first examples, and print what a run would spend. Returns a copy of the student.

    Raises:
        ValueError, TypeError, MetricError, TooManyErrors: As at the start of a run.
    """
    inputs = check(config, student)
    config, program, train = inputs.config, inputs.program, inputs.splits["train"][:NUM_EXAMPLES]
    events = EventLoop(loop)
    try:
        evaluator = make_evaluator(inputs, events, is_async=loop is not None)
        writer = make_writer(inputs, events)
        # The scores are simulated, so nothing of the user's looks at them.
        no_scores = config.model_copy(update={"stoppers": [], "stop_at_score": None})
        search = make_search(no_scores, program.candidate, inputs.sizes)
        first: FirstExamples | None = FirstExamples(len(train), measured_budget(config))
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
