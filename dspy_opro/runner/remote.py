"""Examples in other processes, through any `concurrent.futures.Executor`.

Program, metric, LMs and data travel once to each worker process, by cloudpickle; an example travels as a few plain
values. DSPy's callbacks and traces stay in their process.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle
import signal
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

import cloudpickle
import dspy

from dspy_opro.programs.awaiting import EventLoop
from dspy_opro.programs.compat import copy_lm
from dspy_opro.programs.evaluator import Evaluator, MetricRaised
from dspy_opro.programs.metric import Metric
from dspy_opro.programs.program import Program, is_async_only
from dspy_opro.search.tasks import ScoringTask, TaskResult
from dspy_opro.search.trajectory import Candidate

from .budget import Ledger

_STAYS = frozenset(
    {
        *("callbacks", "trace", "caller_modules", "usage_tracker", "parallelizer", "main_thread_config"),
        *("send_stream", "stream_listeners", "branch_idx"),
    }
)
"""Settings of DSPy that belong to their process."""


@dataclass(frozen=True)
class Payload:
    """What a worker process needs to score examples."""

    program: dspy.Module
    metric: Any
    lms: Mapping[str, Any]
    """`task_model` and `dspy.settings.lm`, as far as they are set."""
    settings: Mapping[str, Any]
    """The other settings of DSPy."""
    examples: Mapping[str, Sequence[Any]]
    """Split -> examples in the order of the race."""
    failure_score: float
    provide_traceback: bool


class RemoteEvaluator:
    """Scores examples in an executor.

    Args:
        executor: Any `concurrent.futures.Executor` whose workers have this package and the user's own modules.
        program, metric, examples: See `Evaluator`.
        task_model: The scorer LM, or None for what the program and `dspy.settings` say.
        failure_score: What a failed example counts.
        provide_traceback: Whether failures are logged with their traceback, in the worker process.
        ledger: Counts what the examples cost.

    Raises:
        ValueError: Something can't be pickled. The message names it.
    """

    def __init__(
        self,
        executor: Executor,
        program: dspy.Module,
        metric: Any,
        examples: Mapping[str, Sequence[Any]],
        task_model: Any,
        failure_score: float,
        provide_traceback: bool,
        ledger: Ledger,
    ) -> None:
        self._executor = executor
        self._ledger = ledger
        settings = {name: value for name, value in dspy.settings.config.items() if name not in _STAYS}
        lms = {"task_model": task_model, "dspy.settings.lm": settings.pop("lm", None)}
        parts = {
            "the program": program,
            "the metric": metric,
            **{name: copy_lm(lm) for name, lm in lms.items() if lm is not None},
            **{f"dspy.settings.{name}": value for name, value in settings.items()},
            "the examples": examples,
        }
        for name, value in parts.items():
            _check(name, value)
        copied = {name: parts[name] for name in lms if name in parts}
        payload = Payload(program, metric, copied, settings, examples, failure_score, provide_traceback)
        self._payload = cloudpickle.dumps(payload)
        self._name = hashlib.sha256(self._payload).hexdigest()

    def evaluate(self, task: ScoringTask) -> TaskResult:
        """Score an example in a worker process.

        Raises:
            MetricError: The metric returned something that is not a score.
        """
        arguments = (task.candidate, task.split, task.position)
        result: TaskResult | None = self._executor.submit(
            score_example, self._name, None, *arguments
        ).result()
        while result is None:  # a worker process that has not seen the payload yet
            result = self._executor.submit(score_example, self._name, self._payload, *arguments).result()
        self._ledger.add(result.usage)
        return result


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
_workplaces: dict[str, _Workplace] = {}
"""Name of a payload -> what was made of it, for the latest few runs."""


@dataclass(frozen=True)
class _Workplace:
    evaluator: Evaluator
    examples: Mapping[str, Sequence[Any]]
    settings: Mapping[str, Any]


def score_example(
    name: str, payload: bytes | None, candidate: Candidate, split: str, position: int
) -> TaskResult | None:
    """Score one example; None where the payload of that name was never sent to this process."""
    with _lock:
        if name not in _workplaces and payload is None:
            return None
        if name not in _workplaces:
            while len(_workplaces) >= 4:
                del _workplaces[next(iter(_workplaces))]
            _workplaces[name] = _workplace(pickle.loads(payload or b""))
        place = _workplaces[name]
    with dspy.context(**place.settings):
        result, _ = place.evaluator.evaluate(candidate, place.examples[split][position])
    if result.error is None:
        return result
    # The exception itself may not travel.
    kind = MetricRaised if isinstance(result.error, MetricRaised) else RuntimeError
    text = getattr(result.content, "error", None) or str(result.error)
    return replace(result, error=kind(text))


def _workplace(payload: Payload) -> _Workplace:
    _ignore_interrupts()
    program = Program(payload.program)
    evaluator = Evaluator(
        program,
        Metric(payload.metric),
        EventLoop(),
        payload.lms.get("task_model"),
        payload.failure_score,
        is_awaited=is_async_only(payload.program),
        provide_traceback=payload.provide_traceback,
    )
    settings = dict(payload.settings)
    if "dspy.settings.lm" in payload.lms:
        settings["lm"] = payload.lms["dspy.settings.lm"]
    return _Workplace(evaluator, payload.examples, settings)


def _ignore_interrupts() -> None:
    """Ctrl-C reaches all processes of a terminal; here it would be one failed example."""
    if multiprocessing.parent_process() and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
