"""Sets of demos, made by DSPy's own BootstrapFewShot. They are JSON text, so the log records them like proposals."""

from __future__ import annotations

import inspect
import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dspy
from dspy.teleprompt import BootstrapFewShot, LabeledFewShot

from dspy_opro.programs.awaiting import EventLoop
from dspy_opro.programs.compat import predictor_state
from dspy_opro.programs.errors import in_brief
from dspy_opro.programs.evaluator import ONE_EXAMPLE
from dspy_opro.programs.metering import Prices, metered
from dspy_opro.programs.metric import Metric, to_score
from dspy_opro.programs.program import Program, copy_module, is_awaited, uncopyable
from dspy_opro.programs.provider import judge
from dspy_opro.programs.values import own_copies, plain
from dspy_opro.search.tasks import Proposal, ProposalTask, TaskResult, rng
from dspy_opro.search.trajectory import Usage

logger = logging.getLogger("dspy_opro")


@dataclass(frozen=True, repr=False)  # DSPy logs the repr when an example fails
class DemoWriter:
    """Makes the demo sets. `OPROTeleprompter` documents the fields that have DSPy's names."""

    program: Program
    metric: Metric
    loop: EventLoop
    """Awaits async programs and metrics."""
    trainset: Sequence[Any]
    max_bootstrapped_demos: int
    max_labeled_demos: int
    max_rounds: int
    metric_threshold: float | None
    max_errors: int | None
    max_tries: int
    """The most examples that one set may try."""
    teacher: Any
    teacher_settings: Mapping[str, Any] | None
    seed: int
    task_model: Any
    """The scorer LM, or None for the LM of the program or of `dspy.settings`."""
    prices: Prices | None = None
    """The user's own prices of LMs."""
    first_slot: int = 0
    """The slot of set 0."""

    def write(self, task: ProposalTask, on_usage: Callable[[Usage], None] = lambda usage: None) -> TaskResult:
        """The demo set of the task's slot. `on_usage` gets the usage of every LM call when the call ends."""
        settings, error = {} if self.task_model is None else {"lm": self.task_model}, None
        with metered("scorer", on_usage, prices=self.prices, trace=[], **settings) as meter:
            try:
                proposal = Proposal(self.demo_set(task.slot - self.first_slot, meter.spend))
            except Exception as caught:
                error = caught
                logger.warning("A demo set could not be bootstrapped: %s", in_brief(caught))
                proposal = Proposal({}, error=in_brief(caught))
        return TaskResult(proposal, meter.usage, error=error)

    def demo_set(self, number: int, spend: Callable[[Usage], None] = lambda usage: None) -> dict[str, str]:
        """Predictor name -> its demos in set `number`. `spend` gets a usage for every example that is tried.

        Set 0 is the one of BootstrapFewShot. Every set after it has its own order of the trainset. `is_labeled` says
        which sets have labeled demos alone. The others have a random number of bootstrapped demos, as in MIPROv2.

        Raises:
            ValueError: There are no demos: none passed the metric, or none belongs to a predictor of the program.
            Exception: The provider was down for a moment, or refused calls because of a rate limit.
        """
        generator = rng(self.seed, "demos", number)
        trainset, most = list(self.trainset), self.max_bootstrapped_demos
        if number > 0:
            generator.shuffle(trainset)
        if is_labeled(number, most, self.max_labeled_demos):
            compiled = self._labeled(self._copy(), trainset)
            if not _keep_answered(compiled):
                raise ValueError("no labeled demo has an output field of a predictor: no example gives one")
        else:
            size = most if number == 0 else generator.randint(1, most)
            compiled = self._bootstrapped(size, trainset, spend)
        predictors = dict(compiled.program.named_predictors())  # a teacher may have them in another order
        return {
            name: json.dumps(plain(predictor_state(predictors[name])["demos"]), default=str)
            for name in self.program.names
        }

    def _labeled(self, program: dspy.Module, trainset: list[Any]) -> Any:
        return _compile(LabeledFewShot(k=self.max_labeled_demos), program, trainset=trainset)

    def _bootstrapped(self, size: int, trainset: list[Any], spend: Callable[[Usage], None]) -> Any:
        """A program whose demos are the teacher's answers."""
        errors: list[Exception] = []
        optimizer = _Bootstrapping(
            spend,
            self.max_tries,
            errors,
            metric=_noting(errors, self._judge),
            teacher_settings=dict(self.teacher_settings or {}),
            max_bootstrapped_demos=size,
            max_labeled_demos=self.max_labeled_demos,
            max_rounds=self.max_rounds,
            max_errors=self.max_errors,
        )
        teacher = self._copy(errors)
        if self.max_labeled_demos and not getattr(self.teacher, "_compiled", False):
            teacher = self._labeled(teacher, trainset)
        teacher._compiled = True  # otherwise BootstrapFewShot adds labeled demos and reports a `compile`
        compiled = _compile(optimizer, self._copy(), teacher=teacher, trainset=trainset)
        if _keep_answered(compiled):
            return compiled
        if optimizer.num_passed:
            rule = "no demo is of the program's own predictors: the program calls copies, like BestOfN and Refine"
            raise ValueError(rule)
        limit = "" if self.metric_threshold is None else f" with metric_threshold={self.metric_threshold:g}"
        limit += f" in {optimizer.num_tries} tries"
        limit += f". First error: {in_brief(errors[0])}" if errors else ""
        raise ValueError(f"no demo passed the metric{limit}")

    def _copy(self, errors: list[Exception] | None = None) -> dspy.Module:
        """A copy of the teacher (by default the student) that BootstrapFewShot accepts: uncompiled, with `forward`.

        `errors` gets the errors that it raises.
        """
        program = self.program.student if self.teacher is None else self.teacher
        shared = uncopyable(program)
        copied = copy_module(program, shared)
        copied._compiled = False
        return _Bootstrappable(copied, shared, self.loop, [] if errors is None else errors)

    def _judge(self, example: Any, prediction: Any, trace: Any = None) -> bool:
        """Whether the teacher's answer may be a demo. Without a threshold every score above 0 passes.

        BootstrapFewShot takes negative scores as passed, and a threshold of 0 as none.
        """
        score = to_score(self.loop.resolve(self.metric.with_trace(example, prediction, trace))).value
        return score > 0 if self.metric_threshold is None else score >= self.metric_threshold


class _Bootstrapping(BootstrapFewShot):
    """BootstrapFewShot without the progress bar and the prints of DSPy 3.0 to 3.4. It counts the examples it tries.

    `errors` has what teacher and metric raised. A rate limit and an outage end the set, so that it is made again later.
    """

    def __init__(
        self, spend: Callable[[Usage], None], max_tries: int, errors: Sequence[Exception], **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self.spend, self.errors = spend, errors
        self.max_tries, self.num_tries = max_tries, 0

    def _bootstrap(self, *, max_bootstraps: int | None = None) -> None:
        self.name2traces: dict[str, list[Any]] = {name: [] for name in self.name2predictor}
        used: set[int] = set()
        for index, example in enumerate(self.trainset):
            if len(used) >= (max_bootstraps or self.max_bootstrapped_demos):
                break
            if any(self._try(example, attempt) for attempt in range(self.max_rounds)):
                used.add(index)
        self.num_passed = len(used)
        self.validation = [example for index, example in enumerate(self.trainset) if index not in used]
        random.Random(0).shuffle(self.validation)

    def _try(self, example: Any, attempt: int) -> bool:
        if self.num_tries >= self.max_tries:
            return False
        self.num_tries += 1
        self.spend(ONE_EXAMPLE)
        num_errors = len(self.errors)
        has_passed = bool(self._bootstrap_one_example(example, attempt))
        for error in self.errors[num_errors:]:
            if judge(error).kind == "transient":
                raise error
        return has_passed


def is_labeled(number: int, max_bootstrapped_demos: int, max_labeled_demos: int) -> bool:
    """Whether a set has labeled demos alone: every other set has, if both kinds are wanted.

    Labeled demos cost no LM calls. A weak LM bootstraps little, and what it gets right is not typical of the data.
    """
    return max_bootstrapped_demos == 0 or (max_labeled_demos > 0 and number % 2 == 1)


def num_bootstrapped(num_sets: int, max_bootstrapped_demos: int, max_labeled_demos: int) -> int:
    """How many of the first sets are bootstrapped."""
    return sum(not is_labeled(n, max_bootstrapped_demos, max_labeled_demos) for n in range(num_sets))


def _noting(errors: list[Exception], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose errors are noted. BootstrapFewShot catches them."""

    def noting(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            errors.append(error)
            raise

    return noting


def _keep_answered(program: Any) -> bool:
    """Drop the demos without an output, which DSPy's adapters do not show. Returns whether any demos are left."""
    for predictor in program.predictors():
        outputs = predictor.signature.output_fields
        predictor.demos = [demo for demo in predictor.demos if any(name in demo for name in outputs)]
    return any(predictor.demos for predictor in program.predictors())


def _compile(optimizer: Any, program: dspy.Module, **arguments: Any) -> Any:
    """Call `compile` without the wrappers of DSPy's callbacks and mlflow: it is only a step of our own `compile`."""
    return inspect.unwrap(type(optimizer).compile)(optimizer, program, **arguments)


class _Bootstrappable(dspy.Module):
    """A program that BootstrapFewShot can call and copy.

    BootstrapFewShot calls `forward`, which an async program lacks. It also copies the program, and a lock in the
    program would prevent this.
    """

    def __init__(
        self, program: dspy.Module, shared: Sequence[Any], loop: EventLoop, errors: list[Exception]
    ) -> None:
        super().__init__()
        self.program = program
        self.shared = shared
        self.loop, self.errors = loop, errors
        self._compiled = False

    def forward(self, **inputs: Any) -> Any:
        return _noting(self.errors, self._run)(**inputs)

    def _run(self, **inputs: Any) -> Any:
        run = self.program.acall if is_awaited(self.program, dspy.settings.lm) else self.program
        return self.loop.resolve(run(**own_copies(inputs)))

    def deepcopy(self) -> _Bootstrappable:
        copied = _Bootstrappable(copy_module(self.program, self.shared), self.shared, self.loop, self.errors)
        copied._compiled = self._compiled
        return copied
