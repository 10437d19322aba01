"""One example through program and metric: whatever the program or the metric raises is an outcome with its cause."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import anyio
import dspy

from ._compat import called_by
from .events import Reporter
from .failures import in_brief
from .metering import Meter, metered
from .metric import Metric, MetricError, to_score
from .options import Options
from .program import Program, maybe_await, output_text, shorten
from .stopping import Ledger, Usage
from .threads import DaemonThreads
from .trajectory import Candidate, Outcome

logger = logging.getLogger("dspy_opro")


class MetricRaised(Exception):
    """The metric itself raised; the exception is the cause."""


class Scored(NamedTuple):
    """What one example gave."""

    outcome: Outcome
    usage: Usage
    error: Exception | None
    """What was raised, where the example failed."""


class Scoring:
    """Runs candidates' programs on examples.

    Args:
        program: The student.
        metric: Scores a prediction.
        splits: "train" and "val" -> examples in the order of the race's positions.
        task_model: The scorer LM, or None for what the program and `dspy.settings` say.
        ledger: Told of every call's cost as it is known.
        options: What a failure counts, and how a program is called.
        reporter: Told of every answer.
        threads: Where programs and metrics are called.
    """

    def __init__(
        self,
        program: Program,
        metric: Metric,
        splits: Mapping[str, Sequence[Any]],
        task_model: Any,
        ledger: Ledger,
        options: Options,
        reporter: Reporter,
        threads: DaemonThreads,
    ) -> None:
        self._program = program
        self._metric = metric
        self._splits = splits
        self._task_model = task_model
        self._ledger = ledger
        self._options = options
        self._reporter = reporter
        self._threads = threads
        self._built: dict[str, dspy.Module] = {}  # candidate id -> its program, for the candidates at work

    def build(self, candidate: Candidate) -> dspy.Module:
        """The candidate's program; kept while the candidate is at work, see `forget`."""
        program = self._built.get(candidate.id)
        if program is None:
            program = self._built[candidate.id] = self._program.build(candidate)
        return program

    def forget(self, candidate: Candidate) -> None:
        self._built.pop(candidate.id, None)

    def metered(self) -> AbstractContextManager[Meter]:
        """The settings under which the program runs, with its calls counted."""
        settings = {} if self._task_model is None else {"lm": self._task_model}
        return metered("scorer", self._ledger.add, trace=[], **settings)

    async def score(self, candidate: Candidate, split: str, position: int) -> Scored:
        """Run a candidate on one example.

        Raises:
            MetricError: The metric returned no score.
        """
        example = self._splits[split][position]
        program = self.build(candidate)
        error: Exception | None = None
        parent = called_by(self._reporter.call_id(candidate))
        with self.metered() as meter, parent:
            try:
                with self._time_limit():
                    prediction, value = await self._answer(program, example)
                score = to_score(value)
                feedback = shorten(score.feedback, 1000)
                outcome = Outcome(score.value, output_text(prediction), feedback, None, score.subscores)
                self._reporter.keep(candidate, split, position, prediction, outcome)
            except MetricError:
                raise
            except Exception as caught:
                error = caught
                cause = str(caught) if isinstance(caught, MetricRaised) else in_brief(caught)
                outcome = Outcome(self._options.failure_score, error=cause)
                self._log(caught, split, position)
            finally:
                self._ledger.add(Usage(metric_calls=1))
        return Scored(outcome, replace(meter.usage, metric_calls=1), error)

    @contextmanager
    def _time_limit(self) -> Iterator[None]:
        limit = self._options.example_timeout_seconds
        with anyio.move_on_after(limit) as scope:
            yield
        if scope.cancelled_caught:
            raise TimeoutError(f"no score within example_timeout_seconds={limit:g}")

    async def _answer(self, program: dspy.Module, example: Any) -> tuple[Any, Any]:
        """The prediction and what the metric returned for it."""
        inputs = dict(example.inputs().items())  # `toDict` would turn images and pydantic models into text
        if not self._options.native_async:
            prediction, value = await self._threads.run(lambda: self._call(program, example, inputs))
        else:
            prediction = await program.acall(**inputs)
            value = await self._threads.run(lambda: self._judge(example, prediction))
        try:
            return prediction, await maybe_await(value)
        except Exception as caught:
            raise _metric_raised(caught) from caught

    def _call(self, program: dspy.Module, example: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
        prediction = program(**inputs)
        return prediction, self._judge(example, prediction)

    def _judge(self, example: Any, prediction: Any) -> Any:
        try:
            return self._metric(example, prediction)
        except Exception as caught:
            raise _metric_raised(caught) from caught

    def _log(self, error: Exception, split: str, position: int) -> None:
        detail = (
            "".join(traceback.format_exception(error)) if self._options.provide_traceback else in_brief(error)
        )
        logger.warning("Failed on %s example %d: %s", split, position, detail)


def _metric_raised(error: Exception) -> MetricRaised:
    return MetricRaised(f"metric raised {in_brief(error)}")
