"""`compile(..., dry_run=True)`: what a run would spend, for the price of the student's first examples."""

from __future__ import annotations

import asyncio
import time
from statistics import fmean
from typing import Any

from .config.arguments import OPROConfig
from .config.assembly import make_estimate, make_evaluator, make_writer, measured_budget
from .config.estimate import NUM_EXAMPLES
from .config.preflight import check_inputs
from .programs.awaiting import EventLoop
from .programs.failures import NUM_FIRST, FirstExamples
from .reporting.progress import announce
from .search.tasks import TaskResult


def dry_run(config: OPROConfig, student: Any, loop: asyncio.AbstractEventLoop | None = None) -> Any:
    """Score the student on its first examples, and print what a run would spend. Returns a copy of the student.

    A failed example says nothing about what an example costs, so another one takes its place.

    Raises:
        ValueError, TypeError, MetricError, TooManyErrors: As at the start of a run.
    """
    inputs = check_inputs(config, student)
    config, program, train = inputs.config, inputs.program, inputs.splits["train"][:NUM_FIRST]
    events = EventLoop(loop)
    try:
        evaluator = make_evaluator(inputs, events, is_async=loop is not None)
        writer = make_writer(inputs, events)
        first: FirstExamples | None = FirstExamples(len(train), measured_budget(config))
        seconds, results = list[float](), list[TaskResult]()
        for example in train:
            started = time.monotonic()
            result, _ = evaluator.evaluate(program.candidate, example, keeps_calls=True)
            if first is not None and first.passes(result):
                first = None
            results.append(result)
            if result.error is None:
                seconds.append(time.monotonic() - started)
            if len(seconds) == NUM_EXAMPLES:
                break
    finally:
        events.close()
    said = make_estimate(inputs, writer.meta_prompt, results, fmean(seconds))
    announce(str(said))
    copied = program.build(program.candidate)
    copied.opro_estimate = said
    return copied
