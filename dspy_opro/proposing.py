"""One call of the proposer: a usable text comes back, or the reason why there is none; an LM that fails is no error."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import dspy

from ._compat import canonical, refuses_temperature, sampling_lm, without_temperature
from .cleaning import Rules, clean
from .failures import in_brief
from .metering import metered
from .program import Program, is_async_only, maybe_await
from .protocols import ProposalRequest
from .stopping import Ledger, Usage
from .threads import DaemonThreads
from .work import Ask, Proposal

logger = logging.getLogger("dspy_opro")


class Proposing:
    """Asks a proposer, and cleans and checks what it answers.

    Args:
        proposer: See `proposer.py`.
        prompt_model: The optimizer LM.
        temperature: Its sampling temperature.
        program: The student.
        rules: What a usable instruction keeps to.
        ledger: Told of every call's cost as it is known.
        threads: Where a proposer without an `aforward` is called.
    """

    def __init__(
        self,
        proposer: Callable[..., Any],
        prompt_model: Any,
        temperature: float,
        program: Program,
        rules: Rules,
        ledger: Ledger,
        threads: DaemonThreads,
    ) -> None:
        self._proposer: Any = proposer
        self._prompt_model = prompt_model
        self._temperature = temperature
        self._program = program
        self._rules = rules
        self._ledger = ledger
        self._threads = threads
        self._takes_no_temperature = False
        self._num_failed = 0

    async def propose(self, ask: Ask, request: ProposalRequest) -> tuple[Proposal, Usage]:
        """The answer to `ask`, put as `request`."""
        lm = sampling_lm(self._prompt_model, self._temperature, request.seed)
        with metered("proposer", self._ledger.add, trace=[]) as meter:
            try:
                proposal = self._read(ask, await self._answer(request, lm))
            except Exception as caught:
                self._warn(caught)
                proposal = Proposal({}, error=in_brief(caught))
        return proposal, meter.usage

    async def _answer(self, request: ProposalRequest, lm: Any) -> Any:
        """Ask the proposer; an LM that takes no temperature is asked without from then on."""
        if self._takes_no_temperature:
            lm = without_temperature(lm)
        with dspy.context(lm=lm):
            try:
                if is_async_only(self._proposer):
                    return await self._proposer.acall(request=request)
                return await maybe_await(await self._threads.run(lambda: self._proposer(request=request)))
            except Exception as caught:
                has_one = isinstance(lm, dspy.LM) and lm.kwargs.get("temperature") is not None
                if not (has_one and refuses_temperature(caught)):
                    raise
                logger.warning("%s is asked without a temperature: %s", lm.model, in_brief(caught))
        self._takes_no_temperature = True
        return await self._answer(request, lm)

    def _warn(self, error: Exception) -> None:
        """The first failure is told, and then every tenth: an LM that is down fails on all of them."""
        self._num_failed += 1
        if self._num_failed == 1:
            logger.warning("A proposal failed: %s", in_brief(error))
        elif self._num_failed % 10 == 0:
            logger.warning("%d proposals failed so far, the last one: %s", self._num_failed, in_brief(error))

    def _read(self, ask: Ask, answer: Any) -> Proposal:
        instruction = getattr(answer, "instruction", answer)
        if isinstance(instruction, str):
            instruction = {ask.predictors[0]: instruction}
        if not isinstance(instruction, Mapping):
            raise TypeError(
                "A proposer must return a dspy.Prediction with `instruction` (a str or a dict name -> str), "
                f"but returned {answer!r}."
            )
        texts, problems = {}, []
        for name in ask.predictors:
            text = canonical(clean(str(instruction.get(name) or "")))
            problem = self._rules.problem(text, self._program.parts[name].text)
            if problem is None:
                texts[name] = text
            else:
                problems.append(problem)
        return Proposal(texts, tuple(problems))
