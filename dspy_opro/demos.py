"""Sets of demos, made by DSPy's own BootstrapFewShot; as JSON text they are recorded and shared like proposals."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dspy
from dspy.teleprompt import BootstrapFewShot, LabeledFewShot

from ._compat import predictor_state
from .metric import Metric, to_score
from .program import Program, is_async_only
from .work import rng


@dataclass(frozen=True)
class Bootstrap:
    """Makes one demo set after the other; see `OPROTeleprompter` for the names that are DSPy's."""

    program: Program
    metric: Metric
    trainset: Sequence[Any]
    max_bootstrapped_demos: int
    max_labeled_demos: int
    max_rounds: int
    metric_threshold: float | None
    max_errors: int | None
    teacher: Any
    teacher_settings: Mapping[str, Any] | None
    seed: int

    def __call__(self, number: int) -> dict[str, str]:
        """Predictor name -> its demos in set `number`.

        As in MIPROv2 the sets differ in what they draw from: the first one is BootstrapFewShot's own, the second
        has labeled demos alone where they are wanted, all others see the trainset in another order and have
        fewer demos or as many.
        """
        generator = rng(self.seed, "demos", number)
        trainset, most = list(self.trainset), self.max_bootstrapped_demos
        if number > 0:
            generator.shuffle(trainset)
        if most == 0 or (number == 1 and self.max_labeled_demos > 0):
            compiled = LabeledFewShot(k=self.max_labeled_demos).compile(self._copy(), trainset=trainset)
        else:
            size = most if number == 0 else generator.randint(1, most)
            compiled = self._optimizer(size).compile(self._copy(), teacher=self._teacher(), trainset=trainset)
        states = [predictor_state(predictor)["demos"] for predictor in compiled.predictors()]
        return {
            name: json.dumps(demos, default=str)
            for name, demos in zip(self.program.names, states, strict=True)
        }

    def _optimizer(self, max_bootstrapped_demos: int) -> Any:
        return BootstrapFewShot(
            metric=self._judge,
            metric_threshold=self.metric_threshold,
            teacher_settings=dict(self.teacher_settings or {}),
            max_bootstrapped_demos=max_bootstrapped_demos,
            max_labeled_demos=self.max_labeled_demos,
            max_rounds=self.max_rounds,
            max_errors=self.max_errors,
        )

    def _copy(self) -> dspy.Module:
        """The student as BootstrapFewShot takes it: not compiled, and with a `forward`."""
        copied = self.program.student.deepcopy()
        copied._compiled = False
        return _with_forward(copied)

    def _teacher(self) -> Any:
        return None if self.teacher is None else _with_forward(self.teacher.deepcopy())

    def _judge(self, example: Any, prediction: Any, trace: Any = None) -> float:
        value = self.metric.with_trace(example, prediction, trace)
        if asyncio.iscoroutine(value):
            value = asyncio.run(value)  # this thread has no loop of its own
        return to_score(value).value


def _with_forward(program: dspy.Module) -> dspy.Module:
    """A program that BootstrapFewShot can call; `dspy.syncify` would bind to the program and not to its copies."""
    if not is_async_only(program):
        return program

    class Synchronous(type(program)):  # type: ignore[misc]
        def forward(self, **inputs: Any) -> Any:
            return asyncio.run(self.aforward(**inputs))

    program.__class__ = Synchronous
    return program
