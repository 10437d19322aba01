"""Does the search's work with DSPy: an example is `scoring.py`'s, a proposal `requests.py`'s and `proposing.py`'s."""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dspy

from .cleaning import Rules
from .events import Reporter
from .failures import Failures, TooManyErrors, in_brief
from .metric import Metric, MetricError
from .options import Options
from .program import Program
from .proposing import Proposing
from .protocols import ProposalRequest, Then, Unit
from .requests import Requests
from .scoring import MetricRaised, Scored, Scoring
from .stopping import Ledger, Usage
from .threads import DaemonThreads
from .trajectory import Candidate, Trial
from .work import Ask, Block, Proposal

logger = logging.getLogger("dspy_opro")


class DSPyExecutor:
    """Fits `protocols.Executor`.

    Args:
        program: The student.
        metric: Scores a prediction.
        splits: "train" and "val" -> examples in the order of the race's positions.
        proposer: See `proposer.py`.
        prompt_model: The optimizer LM.
        task_model: The scorer LM, or None for what the program and `dspy.settings` say.
        ledger: Told of every call's cost as it is known.
        rules: What a usable instruction keeps to.
        options: Sizes and switches.
        reporter: Told of every answer.
        make_demos: Number of a demo set -> predictor name -> its demos, as text.
    """

    def __init__(
        self,
        program: Program,
        metric: Metric,
        splits: Mapping[str, Sequence[Any]],
        proposer: Callable[..., Any],
        prompt_model: Any,
        task_model: Any,
        ledger: Ledger,
        rules: Rules,
        options: Options,
        reporter: Reporter,
        make_demos: Callable[[int], Mapping[str, str]] = lambda number: {},
    ) -> None:
        self._num_train = len(splits["train"])
        self._make_demos = make_demos
        self._threads = threads = DaemonThreads()
        self._scoring = Scoring(program, metric, splits, task_model, ledger, options, reporter, threads)
        self._requests = Requests(program, splits["train"], options)
        self._proposing = Proposing(
            proposer, prompt_model, options.temperature, program, rules, ledger, threads
        )
        self._failures = Failures(options)
        self._tried: dict[tuple[str, str, int], Scored] = {}  # by candidate id, split and position

    def close(self) -> None:
        self._threads.close()

    # -- scoring ---------------------------------------------------------------------------------

    async def try_one(self, student: Candidate) -> None:
        """Score the student on one example, so that a broken metric or program ends the run before it costs.

        A program may fail on single examples: after a failure the next one is tried, three at most.

        Raises:
            MetricError: The metric returned no score, or raised.
            TooManyErrors: The program failed on each of them.
        """
        cause: Exception | None = None
        for position in range(min(3, self._num_train)):
            scored = await self._scoring.score(student, "train", position)
            self._tried[student.id, "train", position] = scored
            if scored.error is None:
                return
            if isinstance(scored.error, MetricRaised):
                raise MetricError(str(scored.error)) from scored.error.__cause__
            cause = cause or scored.error
        raise TooManyErrors(
            f"The student fails on every example tried. First cause: {in_brief(cause)}"
        ) from cause

    async def score(self, unit: Unit, then: Then) -> None:
        if self._scoring.stays_in_thread:
            await self._threads.run(lambda: self._score_here(unit, then))
            return
        following: Unit | None = unit
        while following is not None:
            block, position = following
            scored = self._known(*following)
            scored = scored or await self._scoring.score(block.candidate, block.split, position)
            following = self._file(following, scored, then)

    def _score_here(self, unit: Unit, then: Then) -> None:
        """Score in this thread as long as `then` has more; each example sees the context that the first one saw."""
        following: Unit | None = unit
        while following is not None:
            block, position = following
            what = block.candidate, block.split, position
            scored = self._known(*following)
            scored = scored or contextvars.copy_context().run(self._scoring.score_here, *what)
            following = self._file(following, scored, then)

    def _known(self, block: Block, position: int) -> Scored | None:
        return self._tried.pop((block.candidate.id, block.split, position), None)

    def _file(self, unit: Unit, scored: Scored, then: Then) -> Unit | None:
        outcome, usage, error = scored
        if outcome.error is not None:
            self._failures.count(unit[0].candidate, error)
        return then(unit, outcome, usage)

    def build(self, candidate: Candidate) -> dspy.Module:
        """The candidate's program."""
        return self._scoring.build(candidate)

    def forget(self, candidate: Candidate) -> None:
        """The candidate's race is over."""
        self._scoring.forget(candidate)

    def decided(self, trials: Sequence[Trial]) -> None:
        """A round is over, after these trials; raises `TooManyErrors` where nothing works any more."""
        self._failures.decided(trials)

    # -- proposing -------------------------------------------------------------------------------

    async def propose(self, ask: Ask) -> tuple[Proposal, Usage]:
        if ask.is_for_demos:
            return await self._bootstrap(ask)
        return await self._proposing.propose(ask, self.request(ask))

    async def _bootstrap(self, ask: Ask) -> tuple[Proposal, Usage]:
        """A set of demos in place of a text."""
        with self._scoring.metered() as meter:
            try:
                proposal = Proposal(await self._threads.run(lambda: self._make_demos(ask.slot)))
            except Exception as caught:
                logger.warning("No demos could be bootstrapped: %s", in_brief(caught))
                proposal = Proposal({}, error=in_brief(caught))
        return proposal, meter.usage

    def request(self, ask: Ask) -> ProposalRequest:
        """What the proposer sees."""
        return self._requests(ask)
