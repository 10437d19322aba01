"""Candidates as DSPy's callbacks know evaluations: a start and an end each, side by side, in the caller's thread.

mlflow's autologging (read in 3.17) keeps its runs on a stack of the thread that called `compile`: an evaluation
reported from elsewhere would lose its parent, and two open ones would mix. So the search's thread hands a finished
candidate over, and `compile`, which waits for the search, reports it.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import dspy
from dspy.evaluate.evaluate import EvaluationResult
from dspy.utils.callback import BaseCallback

from .trajectory import Candidate, Outcome, Trial

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


class Reporter:
    """Tells the callbacks in `dspy.settings` of every candidate; does nothing where none of them listens.

    Args:
        metric: The user's.
        at_once: Whether to report where a candidate finishes, which is the caller's thread in `acompile`.
    """

    def __init__(self, metric: Callable[..., Any], at_once: bool) -> None:
        self._metric = metric
        self._at_once = at_once
        self._listeners = [cb for cb in dspy.settings.callbacks or () if _listens(cb)]
        self._call_ids: dict[str, str] = {}  # candidate id -> the id that its calls have as parent
        self._answers: dict[
            tuple[str, str], dict[int, tuple[Any, float]]
        ] = {}  # candidate id, split -> position -> (prediction, score)
        self._queue: SimpleQueue[Evaluation | None] = SimpleQueue()

    def call_id(self, candidate: Candidate) -> str | None:
        """The parent of what a candidate calls, or None where nobody listens."""
        return self._call_ids.setdefault(candidate.id, uuid.uuid4().hex) if self._listeners else None

    def keep(
        self, candidate: Candidate, split: str, position: int, prediction: Any, outcome: Outcome
    ) -> None:
        """Remember an answer until its candidate is reported."""
        if self._listeners:
            answers = self._answers.setdefault((candidate.id, split), {})
            answers[position] = (prediction, outcome.score)

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
            if self._at_once:
                self._report(evaluation)
            else:
                self._queue.put(evaluation)

    def wait(self, future: Future[Any]) -> Any:
        """The future's result; until then, report what finishes. Stays open to signals."""
        future.add_done_callback(lambda _: self._queue.put(None))
        while True:
            try:
                evaluation = self._queue.get(timeout=0.2)  # without a timeout Windows holds back Ctrl-C
            except Empty:
                continue
            if evaluation is None:
                return future.result()
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
