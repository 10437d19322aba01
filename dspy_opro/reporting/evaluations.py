"""Candidates as evaluations for DSPy's callbacks: a start and an end each, one after the other, in the caller's thread.

mlflow's autologging (read in 3.17) keeps its runs on a stack of the thread that called `compile`: an evaluation
reported from elsewhere would lose its parent, and two open ones would mix.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dspy
from dspy.evaluate.evaluate import EvaluationResult
from dspy.utils.callback import BaseCallback

from dspy_opro.search.tasks import ScoringTask, TaskResult
from dspy_opro.search.trajectory import Candidate, Outcome, Trial

logger = logging.getLogger("dspy_opro")


@dataclass(frozen=True)
class Evaluation:
    """A candidate's scores on one split."""

    call_id: str
    program: Any
    metric_key: str
    """`eval_full`, `eval_minibatch` where the race ended early, or `eval_valset`."""
    score: float
    """Percent, as `dspy.Evaluate` has it."""
    results: list[tuple[Any, Any, float]]
    """(example, prediction, score) each."""


class EvaluationCallbacks:
    """Tells the callbacks in `dspy.settings` of every candidate. It does nothing where none of them listens.

    Args:
        metric: The user's.
        loop: The caller's event loop, on whose thread the callbacks are called; None calls them at once.
    """

    def __init__(self, metric: Callable[..., Any], loop: asyncio.AbstractEventLoop | None) -> None:
        self._metric = metric
        self._loop = loop
        self._listeners = [cb for cb in dspy.settings.callbacks or () if _listens(cb)]
        self._call_ids: dict[str, str] = {}  # candidate id -> the id that its calls have as parent
        self._answers: dict[
            tuple[str, str], dict[int, tuple[Any, float]]
        ] = {}  # candidate id, split -> position -> (prediction, score)

    def call_id(self, candidate: Candidate) -> str | None:
        """The parent of what a candidate calls, or None where nobody listens."""
        return self._call_ids.setdefault(candidate.id, uuid.uuid4().hex) if self._listeners else None

    def keep(self, task: ScoringTask, prediction: Any, result: TaskResult) -> None:
        """Remember a prediction until its candidate is reported."""
        if self._listeners and isinstance(result.content, Outcome) and result.content.error is None:
            predictions = self._answers.setdefault((task.candidate.id, task.split), {})
            predictions[task.position] = (prediction, result.content.score)

    def finished(self, trial: Trial, program: Callable[[], Any], splits: Mapping[str, Sequence[Any]]) -> None:
        """A race has ended: report the candidate, on each split that it was scored on."""
        if not self._listeners:
            return
        key = "eval_full" if trial.state == "complete" else "eval_minibatch"
        for split, metric_key, reward in (
            ("train", key, trial.reward),
            ("val", "eval_valset", trial.valset_score),
        ):
            answers = self._answers.pop((trial.id, split), {})
            if reward is None:
                continue
            if split == "train":  # scores of a resumed run are known without their predictions
                for position, score in enumerate(trial.scores):
                    answers.setdefault(position, (dspy.Prediction(), score))
            results = [(splits[split][position], *answers[position]) for position in sorted(answers)]
            call_id = self._call_ids.pop(trial.id, None) or uuid.uuid4().hex
            evaluation = Evaluation(call_id, program(), metric_key, round(100 * reward, 2), results)
            if self._loop is None:
                self._report(evaluation)
            else:
                asyncio.run_coroutine_threadsafe(self._report_on_loop(evaluation), self._loop).result()

    async def _report_on_loop(self, evaluation: Evaluation) -> None:
        self._report(evaluation)

    def _report(self, evaluation: Evaluation) -> None:
        devset = [example for example, _, _ in evaluation.results]
        instance = dspy.Evaluate(
            devset=devset, metric=self._metric
        )  # what handlers expect; it is never called
        inputs = {
            "program": evaluation.program,
            "metric": None,
            "devset": None,
            "num_threads": None,
            "display_progress": None,
            "display_table": None,
            "callback_metadata": {"metric_key": evaluation.metric_key},
            "save_as_csv": None,
            "save_as_json": None,
        }
        outputs = EvaluationResult(score=evaluation.score, results=evaluation.results)
        call_id = evaluation.call_id
        for callback in self._listeners:
            _call(callback.on_evaluate_start, call_id=call_id, instance=instance, inputs=dict(inputs))
        for callback in self._listeners:
            _call(callback.on_evaluate_end, call_id=call_id, outputs=outputs, exception=None)


def _listens(callback: Any) -> bool:
    names = ("on_evaluate_start", "on_evaluate_end")
    return any(getattr(type(callback), n, None) is not getattr(BaseCallback, n) for n in names)


def _call(handler: Callable[..., None], **arguments: Any) -> None:
    try:
        handler(**arguments)
    except Exception as error:  # as DSPy does: a callback never ends a run
        logger.warning("A callback failed: %s: %s", type(error).__name__, error)
