"""`compile(..., dry_run=True)`: what a run would spend, for the price of the student's first examples."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from .config.arguments import OPROConfig
from .config.assembly import make_estimate, make_evaluator, make_writer, measured_budget
from .config.estimate import NUM_EXAMPLES
from .config.preflight import check_inputs
from .programs.awaiting import EventLoop
from .programs.failures import FirstExamples
from .reporting.progress import announce


def dry_run(config: OPROConfig, student: Any, loop: asyncio.AbstractEventLoop | None = None) -> Any:
    """Score the student on its first examples, and print what a run would spend. Returns a copy of the student.

    Raises:
        ValueError, TypeError, MetricError, TooManyErrors: As at the start of a run.
    """
    inputs = check_inputs(config, student)
    config, program, train = inputs.config, inputs.program, inputs.splits["train"][:NUM_EXAMPLES]
    events = EventLoop(loop)
    try:
        evaluator = make_evaluator(inputs, events, is_async=loop is not None)
        writer = make_writer(inputs, events)
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
    said = make_estimate(inputs, writer.meta_prompt, results, seconds)
    announce(str(said))
    copied = program.build(program.candidate)
    copied.opro_estimate = said
    return copied
