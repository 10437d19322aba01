"""Programs and metrics that worker processes import."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import dspy

from tests.runs import TASK, metric


class Step(dspy.Module):  # type: ignore[misc]
    """The student of `tests/runs.py` with a method around it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TASK.student()

    def forward(self, question: str) -> Any:
        return self.inner(question=question)


class FailsOn(Step):
    """Fails on the examples that have this in the question."""

    def __init__(self, *parts: str) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, question: str) -> Any:
        if any(part in question for part in self.parts):
            raise ValueError(f"can't do {question}")
        return self.inner(question=question)


class HangsAtFirst(FailsOn):
    """Hangs there under the student's own instructions."""

    def forward(self, question: str) -> Any:
        is_first = self.inner.signature.instructions == TASK.student().signature.instructions
        if is_first and any(part in question for part in self.parts):
            time.sleep(8.0)
        return self.inner(question=question)


class AsyncStep(dspy.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.inner = TASK.student()

    async def aforward(self, question: str) -> Any:
        await asyncio.sleep(0)
        return await self.inner.acall(question=question)


class Settings(Step):
    """Answers with a setting of DSPy's and the process."""

    def forward(self, question: str) -> Any:
        self.inner(question=question)
        return dspy.Prediction(answer=f"{dspy.settings.mark} {os.getpid()}")


async def async_metric(example: Any, prediction: Any) -> Any:
    await asyncio.sleep(0)
    return metric(example, prediction)


def says_where(example: Any, prediction: Any) -> Any:
    return dspy.Prediction(score=1.0, feedback=prediction.answer)


def no_score(example: Any, prediction: Any) -> Any:
    return "good"


def raises(example: Any, prediction: Any) -> Any:
    raise KeyError("missing")


def no_score_later(example: Any, prediction: Any) -> Any:
    """A score for the student's first words alone."""
    score = metric(example, prediction)
    return score if prediction.answer and not score else None


def process_id() -> int:
    """A worker's process; it has imported what an example needs."""
    time.sleep(0.2)  # the next one goes to another worker
    return os.getpid()
