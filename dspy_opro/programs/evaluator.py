"""One example through program and metric. Whatever the two raise becomes an outcome with its cause."""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable
from typing import Any

import dspy

from dspy_opro.search.tasks import TaskResult
from dspy_opro.search.trajectory import Candidate, Outcome, Usage

from .awaiting import EventLoop, as_exception
from .compat import called_by
from .metering import metered
from .metric import Metric, MetricError, to_score
from .program import Program, output_text, shorten

logger = logging.getLogger("dspy_opro")

ONE_EXAMPLE = Usage(metric_calls=1)


class MetricRaised(Exception):
    """The metric itself raised; the exception is the cause."""


class Evaluator:
    """Runs candidates' programs on examples.

    Args:
        program: The student.
        metric: Scores a prediction.
        loop: Awaits async programs and metrics.
        task_model: The scorer LM, or None for what the program and `dspy.settings` say.
        failure_score: What a failed example counts.
        is_awaited: Whether the program is awaited. Otherwise it is called in this thread.
        timeout_seconds: Wall time of an awaited program. Others can't be cut from within.
        provide_traceback: Whether failures are logged with their traceback.
    """

    def __init__(
        self,
        program: Program,
        metric: Metric,
        loop: EventLoop,
        task_model: Any = None,
        failure_score: float = 0.0,
        is_awaited: bool = False,
        timeout_seconds: float | None = None,
        provide_traceback: bool = False,
    ) -> None:
        self._program = program
        self._metric = metric
        self._loop = loop
        self._settings = {} if task_model is None else {"lm": task_model}
        self._failure_score = failure_score
        self._is_awaited = is_awaited
        self._timeout_seconds = timeout_seconds
        self._provide_traceback = provide_traceback
        self._built: dict[str, dspy.Module] = {}  # candidate id -> its program, for the candidates at work
        self._lock = threading.Lock()  # for building

    def build(self, candidate: Candidate) -> dspy.Module:
        """The candidate's program. It is kept until `forget`."""
        with self._lock:
            program = self._built.get(candidate.id)
            if program is None:
                program = self._built[candidate.id] = self._program.build(candidate)
        return program

    def forget(self, candidate: Candidate) -> None:
        """The candidate's race is over."""
        self._built.pop(candidate.id, None)

    def evaluate(
        self,
        candidate: Candidate,
        example: Any,
        book: Callable[[Usage], None] = lambda usage: None,
        call_id: str | None = None,
    ) -> tuple[TaskResult, Any]:
        """Score a candidate on an example.

        Args:
            candidate: The instructions.
            example: One example of the data.
            book: Told of every LM call as it ends, so that a call that is left behind is counted too.
            call_id: What DSPy's callbacks see as the parent of the calls.

        Returns:
            The result, and the prediction (None where the example failed).

        Raises:
            MetricError: The metric returned something that is not a score.
        """
        program, prediction, error = self.build(candidate), None, None
        with metered("scorer", book, ONE_EXAMPLE, trace=[], **self._settings) as meter, called_by(call_id):
            try:
                prediction = self._predict(program, dict(example.inputs().items()))
                outcome = self._judge(example, prediction)
            except MetricError:
                raise
            except BaseException as caught:  # a program that wants to end the process has failed, no more
                error = as_exception(caught)
                cause = str(caught) if isinstance(caught, MetricRaised) else in_brief(error)
                outcome = Outcome(self._failure_score, error=cause)
                detail = "".join(traceback.format_exception(error)) if self._provide_traceback else cause
                logger.warning("Failed on an example: %s", detail)
        return TaskResult(outcome, meter.usage, error=error), prediction

    def _predict(self, program: dspy.Module, inputs: dict[str, Any]) -> Any:
        if self._is_awaited:
            return self._loop.resolve(program.acall(**inputs), self._timeout_seconds)
        return program(**inputs)

    def _judge(self, example: Any, prediction: Any) -> Outcome:
        try:
            value = self._loop.resolve(self._metric(example, prediction))
        except Exception as caught:
            raise MetricRaised(f"metric raised {in_brief(caught)}") from caught
        score = to_score(value)
        feedback = shorten(score.feedback, 1000)
        return Outcome(score.value, output_text(prediction), feedback, None, score.subscores)


def in_brief(error: BaseException | None) -> str:
    """An error as one short text."""
    return shorten(f"{type(error).__name__}: {error}", 500)
