"""Reports every candidate to DSPy's callbacks as an evaluation: its start and its end, in the caller's thread.

mlflow's autologging (read in 3.17) keeps its runs on a stack of the thread that called `compile`. In another thread an
evaluation would lose its parent, and two open evaluations would mix.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import dspy
from dspy.evaluate.evaluate import EvaluationResult
from dspy.utils.callback import BaseCallback

from dspy_opro.search.tasks import CandidatesProposed, Event, ScoringTask, TaskResult, TrialFinished
from dspy_opro.search.trajectory import Candidate, Outcome, Trial

from .autologging import name_run
from .result import counted

logger = logging.getLogger("dspy_opro")


# The other arguments of `dspy.Evaluate.__call__`, which handlers expect in `inputs`.
_EMPTY_INPUTS: Mapping[str, Any] = dict.fromkeys(
    ["metric", "devset", "num_threads", "display_progress", "display_table", "save_as_csv", "save_as_json"]
)


class EvaluationCallbacks:
    """Reports candidates to the callbacks in `dspy.settings` that listen to evaluations.

    `build` makes a candidate's program, `splits` has the examples in the order of the scores. `loop` is the caller's
    event loop, whose thread calls the callbacks. Without one they are called at once.
    """

    def __init__(
        self,
        metric: Callable[..., Any],
        build: Callable[[Candidate], Any],
        splits: Mapping[str, Sequence[Any]],
        loop: asyncio.AbstractEventLoop | None,
    ) -> None:
        self._metric, self._build, self._splits, self._loop = metric, build, splits, loop
        self._listeners = [cb for cb in dspy.settings.callbacks or () if _listens(cb)]
        self._call_ids: dict[str, str] = {}  # candidate id -> the id that its calls have as parent
        self._predictions: dict[tuple[str, str], dict[int, Any]] = {}  # (candidate id, split) -> by position
        self._numbers: dict[str, int] = {}  # candidate id -> its number, in the order of proposal

    def call_id(self, candidate: Candidate) -> str | None:
        """The parent of a candidate's calls; None if no callback listens."""
        return self._call_ids.setdefault(candidate.id, uuid.uuid4().hex) if self._listeners else None

    def keep(self, task: ScoringTask, prediction: Any, result: TaskResult) -> None:
        """Keep a prediction until the report of its candidate."""
        if self._listeners and isinstance(result.content, Outcome) and result.content.error is None:
            self._predictions.setdefault((task.candidate.id, task.split), {})[task.position] = prediction

    def show(self, event: Event | None) -> None:
        """Report a candidate whose race has ended, once for each split with a score."""
        if not self._listeners:
            return
        if isinstance(event, CandidatesProposed):
            for candidate in event.candidates:
                self._numbers.setdefault(candidate.id, len(self._numbers))
        elif isinstance(event, TrialFinished):
            self._finished(event.trial)

    def _finished(self, trial: Trial) -> None:
        key = "eval_full" if trial.state == "complete" else "eval_minibatch"
        for split, metric_key, scores in (
            ("train", key, trial.scores_by_position),
            ("val", "eval_valset", dict(enumerate(trial.valset_scores))),
        ):
            predictions = self._predictions.pop((trial.id, split), {})
            results = [  # a resumed run has scores without predictions
                (self._splits[split][i], predictions.get(i, dspy.Prediction()), score)
                for i, score in scores.items()
            ]
            if not results:
                continue
            name = f"candidate {self._numbers[trial.id]}, {counted(len(results), f'{split} example')}"
            call_id = self._call_ids.pop(trial.id, None) or uuid.uuid4().hex
            program, metadata = self._build(trial.candidate), {"metric_key": metric_key, "candidate": name}
            outputs = EvaluationResult(score=round(100 * fmean(scores.values()), 2), results=results)
            report = partial(self._report, call_id, program, metadata, outputs)
            if self._loop is None:
                report()
            else:
                asyncio.run_coroutine_threadsafe(_call_on_loop(report), self._loop).result()

    def _report(
        self, call_id: str, program: Any, metadata: dict[str, str], outputs: EvaluationResult
    ) -> None:
        devset = [example for example, _, _ in outputs.results]
        instance = dspy.Evaluate(devset=devset, metric=self._metric)  # handlers expect one; nothing calls it
        inputs = {**_EMPTY_INPUTS, "program": program, "callback_metadata": metadata}
        for callback in self._listeners:
            _call(callback.on_evaluate_start, call_id=call_id, instance=instance, inputs=dict(inputs))
        _call(name_run, metric_key=metadata["metric_key"], name=metadata["candidate"])
        for callback in self._listeners:
            _call(callback.on_evaluate_end, call_id=call_id, outputs=outputs, exception=None)


async def _call_on_loop(function: Callable[[], None]) -> None:
    function()


def _listens(callback: Any) -> bool:
    names = ("on_evaluate_start", "on_evaluate_end")
    return any(getattr(type(callback), n, None) is not getattr(BaseCallback, n) for n in names)


def _call(handler: Callable[..., None], **arguments: Any) -> None:
    try:
        handler(**arguments)
    except Exception as error:  # DSPy does the same: a callback never ends a run
        logger.warning("A callback failed: %s: %s", type(error).__name__, error)
