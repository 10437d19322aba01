"""Examples in other processes, through any `concurrent.futures.Executor`.

Evaluator, settings and data travel once to each worker process, by cloudpickle; an example travels as a few plain
values. DSPy's callbacks and traces stay in their process.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import replace
from typing import Any

import cloudpickle
import dspy

from dspy_opro.programs.compat import copy_lm
from dspy_opro.programs.evaluator import Evaluator, MetricRaised
from dspy_opro.programs.provider import ErrorElsewhere, judge
from dspy_opro.search.tasks import ScoringTask, TaskResult
from dspy_opro.search.trajectory import Candidate, Usage

Payload = tuple[Evaluator, Mapping[str, Sequence[Any]], Mapping[str, Any]]
"""What a worker process needs: the evaluator, split -> examples in the order of the race, and DSPy's settings."""

_STAYS = {
    *("callbacks", "trace", "caller_modules", "caller_predict", "usage_tracker", "parallelizer"),
    *("send_stream", "stream_listeners", "branch_idx"),
}
"""Settings of DSPy that belong to their process."""


class RemoteEvaluator:
    """Scores examples in an executor.

    Args:
        executor: Any `concurrent.futures.Executor` whose workers have this package and the user's own modules.
        evaluator: What scores an example.
        examples: Split -> examples in the order of the race.

    Raises:
        ValueError: Something can't be pickled. The message names it.
    """

    def __init__(
        self, executor: Executor, evaluator: Evaluator, examples: Mapping[str, Sequence[Any]]
    ) -> None:
        self._executor = executor
        settings = {name: value for name, value in dspy.settings.config.items() if name not in _STAYS}
        settings["lm"] = dspy.settings.lm and copy_lm(dspy.settings.lm)
        _check("the program", evaluator.program.copy())
        _check("the metric", evaluator.metric.function)
        _check("task_model", evaluator.task_model and copy_lm(evaluator.task_model))
        _check("the examples", examples)
        for name, value in settings.items():
            _check(f"dspy.settings.{name}", value)
        payload: Payload = (evaluator, examples, settings)
        self._payload = cloudpickle.dumps(payload)
        self._name = hashlib.sha256(self._payload).hexdigest()
        self._calls: set[Future[TaskResult | None]] = set()
        self._is_closed = False

    def evaluate(self, task: ScoringTask, on_usage: Callable[[Usage], None]) -> TaskResult:
        """Score an example in a worker process; `on_usage` is told what it cost.

        Raises:
            MetricError: The metric returned something that is not a score.
        """
        work = (task.candidate, task.split, task.position)
        result = self._result_of(None, *work)
        while result is None:  # a worker process that has not seen the payload yet
            result = self._result_of(self._payload, *work)
        on_usage(result.usage)
        return result

    def _result_of(self, payload: bytes | None, *work: Any) -> TaskResult | None:
        call = self._executor.submit(score_example, self._name, payload, *work)
        self._calls.add(call)
        try:
            if self._is_closed:
                call.cancel()
            return call.result()
        finally:
            self._calls.discard(call)

    def close(self) -> None:
        """Take back the examples that have not begun: nobody waits for them any more."""
        self._is_closed = True
        for call in tuple(self._calls):
            call.cancel()


def _check(name: str, value: Any) -> None:
    try:
        cloudpickle.dumps(value)
    except Exception as error:
        raise ValueError(
            f"executor needs everything that an example uses to be picklable, but {name} is not: "
            f"{type(error).__name__}: {error}. Make it in a module, without locks, connections or open files, "
            "or give it a __reduce__."
        ) from error


# -- in the worker process -----------------------------------------------------------------------

_lock = threading.Lock()
_payloads: dict[str, Payload] = {}
"""Name of a payload -> the payload, for the latest few runs."""


def score_example(
    name: str, pickled: bytes | None, candidate: Candidate, split: str, position: int
) -> TaskResult | None:
    """Score one example; None where the payload of that name was never sent to this process."""
    with _lock:
        if name not in _payloads:
            if pickled is None:
                return None
            _ignore_interrupts()
            while len(_payloads) >= 4:
                del _payloads[next(iter(_payloads))]
            _payloads[name] = pickle.loads(pickled)
        evaluator, examples, settings = _payloads[name]
    with dspy.context(**settings):
        result, _ = evaluator.evaluate(candidate, examples[split][position], keeps_calls=split == "train")
    if result.error is None:
        return result
    text = str(getattr(result.content, "error", None))
    if isinstance(result.error, MetricRaised) and judge(result.error).kind == "other":
        return replace(result, error=MetricRaised(text))
    return replace(result, error=ErrorElsewhere(text, judge(result.error)))


def _ignore_interrupts() -> None:
    """Ctrl-C reaches all processes of a terminal. Here it would be a failed example."""
    if multiprocessing.parent_process() and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
