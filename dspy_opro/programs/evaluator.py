"""Runs program and metric on one example. An error of the program or the metric becomes an outcome with its cause."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import dspy

from dspy_opro.search.tasks import TaskResult
from dspy_opro.search.trajectory import Candidate, Outcome, Usage

from .awaiting import EventLoop, as_exception
from .compat import called_by, copy_lm
from .errors import in_brief
from .metering import Prices, metered
from .metric import Metric, MetricError, to_score
from .program import Program, describe, shorten
from .tracing import FIELD_CHARS, FIELD_CHARS_FOR_METRIC, PROGRAM, Call, plain_fields, read_trace, says_more
from .values import own_copies, shown

ONE_EXAMPLE = Usage(metric_calls=1)
MOST_BUILT = 256
"""Programs of candidates that are kept. In a worker process nobody says which of them are done."""


class MetricRaised(Exception):
    """The metric itself raised an error, which is the `__cause__`."""


@dataclass
class Evaluator:
    """Scores candidates on examples. It can be pickled for a worker process."""

    program: Program
    """The student."""
    metric: Metric
    loop: EventLoop
    """Awaits async programs and metrics."""
    task_model: Any = None
    """The scorer LM, or None for the LM of the program or of `dspy.settings`."""
    failure_score: float = 0.0
    is_awaited: bool = False
    """Whether to await the program. Otherwise the worker thread calls it."""
    timeout_seconds: float | None = None
    """Wall time for an awaited program. The evaluator can't interrupt other programs."""
    prices: Prices | None = None
    """The user's own prices of LMs."""

    def __post_init__(self) -> None:
        # Candidate id -> its program and the program's predictors, until `forget`. A program may make more predictors
        # while it runs.
        self._built: dict[str, tuple[dspy.Module, Sequence[Any]]] = {}
        self._lock = threading.Lock()  # for `_built`

    def __reduce__(self) -> tuple[Any, ...]:
        lm = self.task_model and copy_lm(self.task_model)
        rest = (self.failure_score, self.is_awaited, self.timeout_seconds, self.prices)
        return _unpickled, (self.program.copy(), self.metric, lm, *rest)  # whose LMs have an empty history

    def build(self, candidate: Candidate) -> dspy.Module:
        """The candidate's program. The evaluator keeps it until `forget`."""
        return self._program(candidate)[0]

    def _program(self, candidate: Candidate) -> tuple[dspy.Module, Sequence[Any]]:
        with self._lock:
            built = self._built.get(candidate.id)
            if built is None:
                while len(self._built) >= MOST_BUILT:
                    self._built.pop(next(iter(self._built)), None)
                program = self.program.build(candidate)
                built = self._built[candidate.id] = program, program.predictors()
        return built

    def forget(self, candidate: Candidate) -> None:
        """Drop the program of a candidate whose race is over."""
        self._built.pop(candidate.id, None)

    def evaluate(
        self,
        candidate: Candidate,
        example: Any,
        on_usage: Callable[[Usage], None] = lambda usage: None,
        call_id: str | None = None,
        keeps_calls: bool = False,
    ) -> tuple[TaskResult, Any]:
        """Score a candidate on an example. Returns the result and the prediction (None if the example failed).

        `on_usage` gets the usage of every LM call when the call ends, so that an abandoned call counts, too. DSPy's
        callbacks see `call_id` as the parent of the calls. With `keeps_calls` the outcome has the calls of the
        predictors, as far as the program's own inputs and outputs do not say all.

        Raises:
            MetricError: The metric returned something that is not a score.
        """
        program, predictors = self._program(candidate)
        inputs, trace = dict[str, Any](), list[Any]()
        prediction, calls, error = None, None, None
        settings = {} if self.task_model is None else {"lm": self.task_model}
        meters = metered("scorer", on_usage, ONE_EXAMPLE, self.prices, trace=trace, **settings)
        with meters as meter, called_by(call_id):
            try:
                inputs = own_copies(example.inputs())
                run = program.acall if self.is_awaited else program  # whose `forward` may be async, too
                prediction = self.loop.resolve(run(**inputs), self.timeout_seconds)
                # Before the metric, which may change the prediction and call predictors of its own.
                output = output_text(prediction)
                if keeps_calls:
                    calls = self._calls(predictors, trace, inputs, prediction)
                outcome = self._judge(example, prediction, output)
            except MetricError:
                raise
            except BaseException as caught:  # e.g. SystemExit: only this example fails
                error = as_exception(caught)
                cause = str(caught) if isinstance(caught, MetricRaised) else in_brief(error)
                outcome = Outcome(self.failure_score, error=cause)
                if calls is not None:
                    calls.pop(PROGRAM, None)  # a metric that failed is not asked for feedback
                elif keeps_calls:
                    calls = self._calls(predictors, trace, inputs, None, error)
        return TaskResult(replace(outcome, calls=calls), meter.usage, error=error), prediction

    def _calls(
        self, predictors: Sequence[Any], trace: Sequence[Any], inputs: Any, prediction: Any, error: Any = None
    ) -> dict[str, Call] | None:
        gave = _fields(prediction)
        if len(predictors) == 1:
            is_shown = not says_more(trace, {**inputs, **(gave or {})})
            return None if is_shown else read_trace(self.program.names, predictors, trace, None, FIELD_CHARS)
        limit = FIELD_CHARS_FOR_METRIC if self.metric.takes_predictor else FIELD_CHARS
        calls = read_trace(self.program.names, predictors, trace, error, limit)
        if self.metric.takes_predictor and gave is not None:
            calls[PROGRAM] = {"outputs": plain_fields(gave, limit)}
        return calls

    def _judge(self, example: Any, prediction: Any, output: str) -> Outcome:
        try:
            value = self.loop.resolve(self.metric(example, prediction))
        except BaseException as caught:
            raise MetricRaised(f"metric raised {in_brief(caught)}") from caught
        score = to_score(value)
        return Outcome(score.value, output, shorten(score.feedback, 1000), None, score.subscores)


def output_text(prediction: Any) -> str:
    """A prediction as short text for the meta-prompt."""
    try:
        gave = _fields(prediction)
        return shorten(shown(prediction) if gave is None else describe(gave), 1000)
    except Exception as caught:  # a prediction without a readable text has its score all the same
        return f"(can't be shown: {in_brief(caught)})"


def _fields(prediction: Any) -> dict[str, Any] | None:
    return dict(prediction.items()) if isinstance(prediction, (Mapping, dspy.Example)) else None


def _unpickled(student: dspy.Module, metric: Metric, *rest: Any) -> Evaluator:
    return Evaluator(Program(student), metric, EventLoop(), *rest)
