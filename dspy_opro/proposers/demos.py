"""Sets of demos, made by DSPy's own BootstrapFewShot; as JSON text they are recorded and shared like proposals."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dspy
from dspy.teleprompt import BootstrapFewShot, LabeledFewShot

from dspy_opro.programs.compat import predictor_state
from dspy_opro.programs.copying import copy_module, uncopyable
from dspy_opro.programs.evaluator import in_brief
from dspy_opro.programs.metering import metered
from dspy_opro.programs.metric import Metric, to_score
from dspy_opro.programs.program import Program, is_async_only
from dspy_opro.programs.values import plain
from dspy_opro.search.tasks import Proposal, ProposalTask, TaskResult, rng
from dspy_opro.search.trajectory import Usage

logger = logging.getLogger("dspy_opro")


@dataclass(frozen=True)
class DemoWriter:
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
    task_model: Any
    """The scorer LM, or None for what the program and `dspy.settings` say."""

    def write(self, task: ProposalTask, book: Callable[[Usage], None] = lambda usage: None) -> TaskResult:
        """The demo set of the task's slot; `book` is told of every LM call as it ends."""
        settings, error = {} if self.task_model is None else {"lm": self.task_model}, None
        with metered("scorer", book, trace=[], **settings) as meter:
            try:
                proposal = Proposal(self.demo_set(task.slot))
            except Exception as caught:
                error = caught
                logger.warning("No demos could be bootstrapped: %s", in_brief(caught))
                proposal = Proposal({}, error=in_brief(caught))
        return TaskResult(proposal, meter.usage, error=error)

    def demo_set(self, number: int) -> dict[str, str]:
        """Predictor name -> its demos in set `number`.

        As in MIPROv2 the sets differ in what they draw from: the first one is BootstrapFewShot's own, the second
        has labeled demos alone where they are wanted, all others see the trainset in another order and have
        fewer demos or as many.

        Raises:
            ValueError: There are none: the metric let none pass, or none can be told to be a predictor's.
        """
        generator = rng(self.seed, "demos", number)
        trainset, most = list(self.trainset), self.max_bootstrapped_demos
        if number > 0:
            generator.shuffle(trainset)
        if most == 0 or (number == 1 and self.max_labeled_demos > 0):
            compiled = self._labeled(self._copy(), trainset)
        else:
            compiled = self._bootstrapped(most if number == 0 else generator.randint(1, most), trainset)
        return {
            name: json.dumps(plain(predictor_state(predictor)["demos"]), default=str)
            for name, predictor in zip(self.program.names, compiled.predictors(), strict=True)
        }

    def _labeled(self, program: dspy.Module, trainset: list[Any]) -> Any:
        optimizer = LabeledFewShot(k=self.max_labeled_demos)
        return _compile(optimizer, program, trainset=trainset)

    def _bootstrapped(self, size: int, trainset: list[Any]) -> Any:
        """The teacher's answers as demos, for a student that differs in nothing but that it has none."""
        optimizer = _Bootstrapping(
            metric=self._judge,
            metric_threshold=self.metric_threshold,
            teacher_settings=dict(self.teacher_settings or {}),
            max_bootstrapped_demos=size,
            max_labeled_demos=self.max_labeled_demos,
            max_rounds=self.max_rounds,
            max_errors=self.max_errors,
        )
        teacher = self._copy()
        if self.max_labeled_demos and not getattr(self.teacher, "_compiled", False):
            teacher = self._labeled(teacher, trainset)
        # Else BootstrapFewShot does the same again, and tells the callbacks of a compile.
        teacher._compiled = True
        compiled = _compile(optimizer, self._copy(), teacher=teacher, trainset=trainset)
        if any(predictor.demos for predictor in compiled.predictors()):
            return compiled
        if optimizer.num_passed:
            raise ValueError(
                "no demo is of the program's own predictors: like BestOfN and Refine it calls copies"
            )
        limit = self.metric_threshold
        raise ValueError(
            "no demo passed the metric" + ("" if limit is None else f" with metric_threshold={limit:g}")
        )

    def _copy(self) -> dspy.Module:
        """The teacher, or the student without one, as BootstrapFewShot takes it: not compiled, with a `forward`."""
        program = self.program.student if self.teacher is None else self.teacher
        shared = uncopyable(program)
        copied = copy_module(program, shared)
        copied._compiled = False
        return _Bootstrappable(copied, shared)

    def _judge(self, example: Any, prediction: Any, trace: Any = None) -> float:
        value = self.metric.with_trace(example, prediction, trace)
        if asyncio.iscoroutine(value):
            value = asyncio.run(value)  # this thread has no loop of its own
        return to_score(value).value


class _Bootstrapping(BootstrapFewShot):
    """BootstrapFewShot, which in DSPy 3.0 to 3.4 draws a progress bar of its own and prints."""

    def _bootstrap(self, *, max_bootstraps: int | None = None) -> None:
        self.name2traces: dict[str, list[Any]] = {name: [] for name in self.name2predictor}
        used: set[int] = set()
        for index, example in enumerate(self.trainset):
            if len(used) >= (max_bootstraps or self.max_bootstrapped_demos):
                break
            if any(self._bootstrap_one_example(example, attempt) for attempt in range(self.max_rounds)):
                used.add(index)
        self.num_passed = len(used)
        self.validation = [example for index, example in enumerate(self.trainset) if index not in used]
        random.Random(0).shuffle(self.validation)


def _compile(optimizer: Any, program: dspy.Module, **arguments: Any) -> Any:
    """`compile` as a step of another one: neither DSPy's callbacks nor mlflow, which both wrap it, are told."""
    return inspect.unwrap(type(optimizer).compile)(optimizer, program, **arguments)


class _Bootstrappable(dspy.Module):
    """A program that BootstrapFewShot can call and copy.

    It calls `forward`, which an async program lacks, and it copies again and again, which a lock in the program
    prevents.
    """

    def __init__(self, program: dspy.Module, shared: Sequence[Any]) -> None:
        super().__init__()
        self.program = program
        self.shared = shared
        self._compiled = False

    def forward(self, **inputs: Any) -> Any:
        if is_async_only(self.program):
            return asyncio.run(self.program.acall(**inputs))
        return self.program(**inputs)

    def deepcopy(self) -> _Bootstrappable:
        copied = _Bootstrappable(copy_module(self.program, self.shared), self.shared)
        copied._compiled = self._compiled
        return copied
