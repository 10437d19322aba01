"""Calls the proposer for one proposal. The result is usable texts, or the reason why there are none."""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dspy

from dspy_opro.programs.awaiting import EventLoop
from dspy_opro.programs.compat import (
    can_be_awaited,
    canonical,
    copy_lm,
    defines,
    is_async_only_lm,
    refuses_temperature,
    sampling_lm,
    without_temperature,
)
from dspy_opro.programs.errors import in_brief
from dspy_opro.programs.failures import ProposerFailed, check_budget
from dspy_opro.programs.metering import Budget, Meter, Prices, metered
from dspy_opro.programs.program import Program, is_async_only
from dspy_opro.programs.provider import is_too_long, is_unusable
from dspy_opro.programs.values import storable
from dspy_opro.search.tasks import Proposal, ProposalTask, TaskResult
from dspy_opro.search.trajectory import Usage

from .cleaning import InstructionRules, clean
from .meta_prompt import MetaPrompt, ProposalRequest

PATIENCE_FOR_TEST_SECONDS = 1.0
"""A provider refuses a wrong key faster than this. The run does not wait longer."""

logger = logging.getLogger("dspy_opro")


@dataclass
class InstructionWriter:
    """Asks the proposer, and cleans and checks its answers."""

    proposer: Any
    """See `opro.py`."""
    prompt_model: Any
    """The optimizer LM."""
    temperature: float
    """The sampling temperature of the optimizer LM."""
    program: Program
    """The student."""
    meta_prompt: MetaPrompt
    rules: InstructionRules
    loop: EventLoop
    """Awaits async proposers."""
    initial: Sequence[Mapping[str, str]] = ()
    """Instructions of the user, predictor name -> text."""
    prices: Prices | None = None
    """The user's own prices of LMs."""
    measured: Budget = Budget()  # noqa: RUF009 # frozen
    """The limits that the first paid proposal is checked against."""

    def __post_init__(self) -> None:
        self._takes_no_temperature = False
        self._num_failed = 0
        self._first_error: Exception | None = None
        self._has_answer = False
        self._is_measured = False

    def try_out(self, on_usage: Callable[[Usage], None]) -> Usage:
        """Send the optimizer LM a small request, before more is spent. Returns what it cost.

        Raises:
            ProposerFailed: The key, the model or the account is wrong. Other errors may pass, so they are ignored.
            ValueError: As `write`.
        """
        errors: list[Exception] = []
        meters: list[Meter] = []

        def ask() -> None:
            try:
                with metered("proposer", on_usage, prices=self.prices, trace=[]) as meter:
                    meters.append(meter)
                    lm = copy_lm(self.prompt_model)
                    lm.num_retries = 0  # LiteLLM repeats refused requests, too
                    call = lm.acall if is_async_only_lm(lm) else lm
                    self.loop.resolve(call("Answer with OK."))
            except Exception as error:
                errors.append(error)

        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=[ask], name="dspy_opro test request", daemon=True)
        thread.start()
        thread.join(PATIENCE_FOR_TEST_SECONDS)
        if errors and is_unusable(errors[0]):
            raise self._unusable(errors[0]) from errors[0]
        spent = meters[0].usage if meters else Usage()
        self._measure(spent)
        return spent

    def check(self) -> None:
        """Check the proposals at the end of a run in which no earlier process had one.

        Raises:
            ProposerFailed: Every proposal of this process failed.
        """
        if self._first_error is not None and not self._has_answer:
            cause = f"First cause: {in_brief(self._first_error)}"
            message = f"Every proposal failed, so the optimizer LM wrote no instruction. {cause}"
            raise ProposerFailed(message) from self._first_error

    def _unusable(self, error: Exception) -> ProposerFailed:
        name = getattr(self.prompt_model, "model", type(self.prompt_model).__name__)
        return ProposerFailed(
            f"The optimizer LM {name} can't be called. Check prompt_model: {in_brief(error)}"
        )

    def write(self, task: ProposalTask, on_usage: Callable[[Usage], None] = lambda usage: None) -> TaskResult:
        """New texts for the task's predictors. `on_usage` gets the usage of every LM call when the call ends.

        Raises:
            ProposerFailed: The LM can't be called, and no earlier call of this process worked. Another try may work
                after a change of the key or the model, so the log does not have this failure.
            ValueError: The LM's answers don't say what a budget needs to know.
        """
        if task.initial is not None:
            return TaskResult(Proposal(self.initial[task.initial]))
        # A metric may call an LM for its feedback.
        with metered("scorer", on_usage, prices=self.prices, trace=[]) as asked:
            request = self.meta_prompt.request(task)
        error = None
        lm = sampling_lm(self.prompt_model, self.temperature, request.seed)
        with metered("proposer", on_usage, prices=self.prices, trace=[]) as meter:
            try:
                proposal = self._read(task, self._answer(request, lm))
                self._has_answer = True
            except Exception as caught:
                if is_unusable(caught) and not self._has_answer:
                    raise self._unusable(caught) from caught
                error = caught
                self._first_error = self._first_error or caught
                self._warn(caught)
                proposal = Proposal({}, error=in_brief(caught))
        self._measure(meter.usage)
        return TaskResult(proposal, asked.usage + meter.usage, error=error)

    def _measure(self, spent: Usage) -> None:
        """Check the first paid proposal of this process against the budgets."""
        if spent.proposer_calls and not self._is_measured:
            check_budget(self.measured, spent, "the optimizer LM")
            self._is_measured = True

    def _answer(self, request: ProposalRequest, lm: Any) -> Any:
        """Ask the proposer. If the LM refuses the temperature, all further requests go without one.

        A request that does not fit into the LM's context is repeated with half of its instructions and examples.
        """
        if self._takes_no_temperature:
            lm = without_temperature(lm)
        with dspy.context(lm=lm):
            try:
                call = self.proposer.acall if self._is_awaited(lm) else self.proposer
                return self.loop.resolve(call(request=request))
            except Exception as caught:
                has_one = isinstance(lm, dspy.LM) and lm.kwargs.get("temperature") is not None
                half = request.halved() if is_too_long(caught) else None
                if half is None and not (has_one and refuses_temperature(caught)):
                    raise
                if half is None:
                    self._takes_no_temperature = True
                    logger.warning(
                        "%s refuses the temperature. Later requests leave it out: %s",
                        *(lm.model, in_brief(caught)),
                    )
        return self._answer(half or request, lm)

    def _is_awaited(self, lm: Any) -> bool:
        """Whether the proposer's `aforward` is used: under `acompile` and with an async LM, as far as there is one."""
        if is_async_only(self.proposer):
            return True
        is_async = is_async_only_lm(lm) or (self.loop.is_callers and can_be_awaited(lm))
        return is_async and isinstance(self.proposer, dspy.Module) and defines(self.proposer, "aforward")

    def _warn(self, error: Exception) -> None:
        """Log the first failure and then every tenth, because an LM that is down fails every time."""
        self._num_failed += 1
        if self._num_failed == 1:
            logger.warning("A proposal failed: %s", in_brief(error))
        elif self._num_failed % 10 == 0:
            logger.warning("%d proposals failed so far, the last one: %s", self._num_failed, in_brief(error))

    def _read(self, task: ProposalTask, answer: Any) -> Proposal:
        instruction = getattr(answer, "instruction", answer)
        if isinstance(instruction, str):
            instruction = {task.predictors[0]: instruction}
        if not isinstance(instruction, Mapping):
            raise TypeError(
                "A proposer must return a dspy.Prediction with `instruction` (a str or a dict name -> str), "
                f"but returned {answer!r}."
            )
        texts, problems = {}, []
        for name in task.predictors:
            given, current = str(instruction.get(name) or ""), task.view.base.instructions[name].rstrip()
            is_extension = current and given.startswith(current)  # which is clean, and not to be changed
            own = self.program.texts[name]
            text = canonical(own.task(storable(given) if is_extension else clean(given)))
            problem = self.rules.problem(text, own.text)
            if problem is None:
                texts[name] = text
            else:
                problems.append(problem)
        return Proposal(texts, tuple(problems))


def initial_texts(
    given: Sequence[str | Mapping[str, str]], program: Program, rules: InstructionRules
) -> list[dict[str, str]]:
    """The user's `initial_instructions` as predictor name -> text.

    Raises:
        ValueError: A predictor is unknown, or a text is not usable.
    """
    found = []
    for number, item in enumerate(given):
        if isinstance(item, str) and len(program.names) > 1:
            raise ValueError(
                f"initial_instructions[{number}] must be a dict, because the program has the predictors "
                f"{', '.join(program.names)}."
            )
        named = {program.names[0]: item} if isinstance(item, str) else item
        texts = {}
        for name, text in named.items():
            if name not in program.texts:
                known = ", ".join(program.names)
                raise ValueError(
                    f"initial_instructions[{number}] has {name!r}, but the predictors are {known}."
                )
            own = program.texts[name]
            texts[name] = canonical(own.task(storable(text)))
            problem = rules.problem(texts[name], own.text)
            if problem is not None and texts[name] != own.text:
                raise ValueError(f"initial_instructions[{number}] is not usable: {problem}.")
        found.append(texts)
    return found
