"""One example through program and metric: whatever the program or the metric raises is an outcome with its cause."""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import anyio
import dspy

from ._compat import called_by
from .events import Reporter
from .failures import in_brief
from .metering import NOTHING, Meter, metered
from .metric import Metric, MetricError, to_score
from .options import Options
from .program import Program, output_text, shorten
from .stopping import Ledger, Usage
from .threads import DaemonThreads, as_exception
from .trajectory import Candidate, Outcome

logger = logging.getLogger("dspy_opro")


ONE_EXAMPLE = Usage(metric_calls=1)


class MetricRaised(Exception):
    """The metric itself raised; the exception is the cause."""


class Scored(NamedTuple):
    """What one example gave."""

    outcome: Outcome
    usage: Usage
    error: Exception | None
    """What was raised, where the example failed."""


@dataclass
class _Attempt:
    """An example that is being scored."""

    program: dspy.Module
    example: Any
    answer: tuple[Any, Any] = (None, None)
    """The prediction and what the metric said of it."""
    error: Exception | None = None
    scored: Scored = field(init=False)


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
        self._lock = threading.Lock()  # for building

    @property
    def stays_in_thread(self) -> bool:
        """Whether `score_here` can do all there is to an example."""
        return not self._options.native_async and self._options.example_timeout_seconds is None

    def build(self, candidate: Candidate) -> dspy.Module:
        """The candidate's program; kept while the candidate is at work, see `forget`."""
        with self._lock:
            program = self._built.get(candidate.id)
            if program is None:
                program = self._built[candidate.id] = self._program.build(candidate)
        return program

    def forget(self, candidate: Candidate) -> None:
        self._built.pop(candidate.id, None)

    def metered(self, entry: Usage = NOTHING) -> AbstractContextManager[Meter]:
        """The settings under which the program runs, with its calls counted, beginning with `entry`."""
        settings = {} if self._task_model is None else {"lm": self._task_model}
        return metered("scorer", self._ledger.add, entry, trace=[], **settings)

    def score_here(self, candidate: Candidate, split: str, position: int) -> Scored:
        """Run a candidate on one example, in this thread, which is one of `threads`.

        Raises:
            MetricError: The metric returned no score.
        """
        with self._attempt(candidate, split, position) as attempt:
            try:
                attempt.answer = self._call(attempt.program, attempt.example)
            except Exception:
                raise
            except BaseException as caught:  # a program that wants to end the process has failed, no more
                raise as_exception(caught) from caught
        return attempt.scored

    async def score(self, candidate: Candidate, split: str, position: int) -> Scored:
        """The same from the loop: programs that are awaited, and examples with a time limit."""
        with self._attempt(candidate, split, position) as attempt, self._time_limit():
            attempt.answer = await self._answer(attempt.program, attempt.example)
        return attempt.scored

    @contextmanager
    def _attempt(self, candidate: Candidate, split: str, position: int) -> Iterator[_Attempt]:
        """One example on the ledger: an answer becomes a score, and what is raised within a failure."""
        attempt = _Attempt(self.build(candidate), self._splits[split][position])
        with self.metered(ONE_EXAMPLE) as meter, called_by(self._reporter.call_id(candidate)):
            try:
                yield attempt
                prediction, value = attempt.answer
                score = to_score(value)
                feedback = shorten(score.feedback, 1000)
                outcome = Outcome(score.value, output_text(prediction), feedback, None, score.subscores)
                self._reporter.keep(candidate, split, position, prediction, outcome)
            except MetricError:
                raise
            except Exception as caught:
                attempt.error = caught
                cause = str(caught) if isinstance(caught, MetricRaised) else in_brief(caught)
                outcome = Outcome(self._options.failure_score, error=cause)
                self._log(caught, cause, split)
        attempt.scored = Scored(outcome, meter.usage, attempt.error)

    @contextmanager
    def _time_limit(self) -> Iterator[None]:
        limit = self._options.example_timeout_seconds
        with anyio.move_on_after(limit) as scope:
            yield
        if scope.cancelled_caught:
            raise TimeoutError(f"no score within example_timeout_seconds={limit:g}")

    async def _answer(self, program: dspy.Module, example: Any) -> tuple[Any, Any]:
        """The prediction and what the metric says of it."""
        if not self._options.native_async:
            return await self._threads.run(lambda: self._call(program, example))
        prediction = await program.acall(**_inputs(example))
        return prediction, await self._threads.run(lambda: self._judge(example, prediction))

    def _call(self, program: dspy.Module, example: Any) -> tuple[Any, Any]:
        prediction = program(**_inputs(example))
        return prediction, self._judge(example, prediction)

    def _judge(self, example: Any, prediction: Any) -> Any:
        try:
            return self._threads.resolve(self._metric(example, prediction))
        except Exception as caught:
            raise MetricRaised(f"metric raised {in_brief(caught)}") from caught

    def _log(self, error: Exception, cause: str, split: str) -> None:
        """Without a number: the race's order is not the dataset's, and `result.failures` has the dataset's."""
        detail = "".join(traceback.format_exception(error)) if self._options.provide_traceback else cause
        logger.warning("Failed on a %s example: %s", split, detail)


def _inputs(example: Any) -> dict[str, Any]:
    """`toDict` would turn images and pydantic models into text."""
    return dict(example.inputs().items())
