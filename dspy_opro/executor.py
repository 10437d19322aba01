"""Does the search's work with DSPy: one call of the proposer, one example through program and metric."""

from __future__ import annotations

import hashlib
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import anyio
import dspy

from ._compat import called_by, canonical, refuses_temperature, sampling_lm, without_temperature
from .cleaning import Rules, clean
from .events import Reporter
from .exemplars import choose
from .metering import metered
from .metric import Metric, MetricError, to_score
from .program import Program, describe, is_async_only, maybe_await, output_text, shorten
from .protocols import Exemplar, ProposalRequest, Style
from .stopping import Ledger, Usage
from .threads import DaemonThreads
from .trajectory import Candidate, Outcome, Trial, percent
from .work import Ask, Block, Proposal, rng

logger = logging.getLogger(__name__)
STYLES: Sequence[Style] = ("explore", "refine", "extend")
NUM_DEAD = 4
"""Candidates in a row that fail on every example and are taken for a broken program or LM."""


class TooManyErrors(RuntimeError):
    """The program failed on `max_errors` examples, or on everything for a while; the first failure is the cause."""


@dataclass(frozen=True)
class Options:
    """How the work is done; see `OPROTeleprompter` for what the names mean."""

    k_best: int
    num_exemplars: int
    temperature: float
    seed: int
    failure_score: float
    max_errors: int | None
    default_max_errors: int
    example_timeout_seconds: float | None
    provide_traceback: bool
    native_async: bool
    paper: bool


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
        self._program = program
        self._metric = metric
        self._splits = splits
        self._proposer: Any = proposer
        self._prompt_model = prompt_model
        self._task_model = task_model
        self._ledger = ledger
        self._rules = rules
        self._options = options
        self._reporter = reporter
        self._make_demos = make_demos
        self._threads = DaemonThreads()
        self._built: dict[str, dspy.Module] = {}  # candidate id -> its program, for the candidates at work
        self._tried: dict[tuple[str, str, int], tuple[Outcome, Usage, Exception | None]] = {}
        self._num_failures = 0
        self._failed: set[str] = set()  # ids of candidates with a failure in this process
        self._dead: list[Trial] = []  # trials of the last rounds in which every example failed
        self._first_cause: Exception | None = None
        self._takes_no_temperature = False

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
        for position in range(min(3, len(self._splits["train"]))):
            outcome, usage, error = await self._one(student, "train", position)
            self._tried[student.id, "train", position] = outcome, usage, error
            if error is None:
                return
            if isinstance(error, _MetricRaised):
                raise MetricError(str(error)) from error.__cause__
            cause = cause or error
        raise TooManyErrors(
            f"The student fails on every example tried. First cause: {_cause(cause)}"
        ) from cause

    async def score(self, block: Block, position: int) -> tuple[Outcome, Usage]:
        candidate = block.candidate
        known = self._tried.pop((candidate.id, block.split, position), None)
        outcome, usage, error = known or await self._one(candidate, block.split, position)
        if outcome.error is not None:
            self._count_failure(candidate, error)
        return outcome, usage

    async def _one(
        self, candidate: Candidate, split: str, position: int
    ) -> tuple[Outcome, Usage, Exception | None]:
        example = self._splits[split][position]
        program = self.build(candidate)
        error: Exception | None = None
        parent = called_by(self._reporter.call_id(candidate))
        with metered("scorer", self._ledger.add, trace=[], **self._scorer()) as meter, parent:
            try:
                with self._time_limit():
                    prediction, value = await self._answer(program, example)
                score = to_score(value)
                feedback = shorten(score.feedback, 1000)
                outcome = Outcome(score.value, output_text(prediction), feedback, None, score.subscores)
                self._reporter.keep(candidate, split, position, prediction, outcome)
            except MetricError:
                raise
            except Exception as caught:
                error = caught
                cause = str(caught) if isinstance(caught, _MetricRaised) else _cause(caught)
                outcome = Outcome(self._options.failure_score, error=cause)
                self._log(caught, split, position)
            finally:
                self._ledger.add(Usage(metric_calls=1))
        return outcome, replace(meter.usage, metric_calls=1), error

    def _scorer(self) -> dict[str, Any]:
        """The settings under which the program runs."""
        return {} if self._task_model is None else {"lm": self._task_model}

    @contextmanager
    def _time_limit(self) -> Iterator[None]:
        limit = self._options.example_timeout_seconds
        with anyio.move_on_after(limit) as scope:
            yield
        if scope.cancelled_caught:
            raise TimeoutError(f"no score within example_timeout_seconds={limit:g}")

    async def _answer(self, program: dspy.Module, example: Any) -> tuple[Any, Any]:
        """The prediction and what the metric returned for it."""
        inputs = dict(example.inputs().items())  # `toDict` would turn images and pydantic models into text
        if not self._options.native_async:
            prediction, value = await self._threads.run(lambda: self._call(program, example, inputs))
        else:
            prediction = await program.acall(**inputs)
            value = await self._threads.run(lambda: self._judge(example, prediction))
        try:
            return prediction, await maybe_await(value)
        except Exception as caught:
            raise _MetricRaised(f"metric raised {_cause(caught)}") from caught

    def _call(self, program: dspy.Module, example: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
        prediction = program(**inputs)
        return prediction, self._judge(example, prediction)

    def _judge(self, example: Any, prediction: Any) -> Any:
        try:
            return self._metric(example, prediction)
        except Exception as caught:
            raise _MetricRaised(f"metric raised {_cause(caught)}") from caught

    def build(self, candidate: Candidate) -> dspy.Module:
        """The candidate's program; kept while the candidate is at work, see `forget`."""
        program = self._built.get(candidate.id)
        if program is None:
            program = self._built[candidate.id] = self._program.build(candidate)
        return program

    def forget(self, candidate: Candidate) -> None:
        self._built.pop(candidate.id, None)

    def _count_failure(self, candidate: Candidate, error: Exception | None) -> None:
        self._num_failures += 1
        self._first_cause = self._first_cause or error
        self._failed.add(candidate.id)
        if self._options.max_errors is not None and self._num_failures >= self._options.max_errors:
            self._give_up(f"on {self._num_failures} examples (max_errors={self._options.max_errors})")

    def decided(self, trials: Sequence[Trial]) -> None:
        """A round is over: end the run where nothing works any more and `max_errors` is not given.

        Single failures are data, and so is a candidate that fails on everything: instructions break formats. But
        when whole rounds fail, the cause is elsewhere. What is looked at is the same whatever the order of arrival.

        Raises:
            TooManyErrors: Not one example succeeded in the last rounds, of `NUM_DEAD` candidates or more.
        """
        if any(t.num_failures < t.num_scored for t in trials):
            self._dead.clear()
        else:
            self._dead.extend(trials)
        failures = sum(t.num_failures for t in self._dead)
        is_over = len(self._dead) >= NUM_DEAD and failures >= self._options.default_max_errors
        # Failures of an earlier process, recalled from its storage, may have had a cause that is gone.
        if self._options.max_errors is None and is_over and any(t.id in self._failed for t in self._dead):
            self._give_up(f"on each of the last {failures} examples, under {len(self._dead)} candidates")

    def _give_up(self, where: str) -> NoReturn:
        text = f"The program failed {where}. First cause: {_cause(self._first_cause)}"
        raise TooManyErrors(text) from self._first_cause

    def _log(self, error: Exception, split: str, position: int) -> None:
        detail = (
            "".join(traceback.format_exception(error)) if self._options.provide_traceback else _cause(error)
        )
        logger.warning("Failed on %s example %d: %s", split, position, detail)

    # -- proposing -------------------------------------------------------------------------------

    async def propose(self, ask: Ask) -> tuple[Proposal, Usage]:
        if ask.is_for_demos:
            return await self._bootstrap(ask)
        request = self.request(ask)
        lm = sampling_lm(self._prompt_model, self._options.temperature, request.seed)
        with metered("proposer", self._ledger.add, trace=[]) as meter:
            try:
                proposal = self._read(ask, await self._answer_request(request, lm))
            except Exception as caught:
                logger.warning("A proposal failed: %s", _cause(caught))
                proposal = Proposal({}, error=_cause(caught))
        return proposal, meter.usage

    async def _bootstrap(self, ask: Ask) -> tuple[Proposal, Usage]:
        """A set of demos in place of a text."""
        with metered("scorer", self._ledger.add, trace=[], **self._scorer()) as meter:
            try:
                proposal = Proposal(await self._threads.run(lambda: self._make_demos(ask.slot)))
            except Exception as caught:
                logger.warning("No demos could be bootstrapped: %s", _cause(caught))
                proposal = Proposal({}, error=_cause(caught))
        return proposal, meter.usage

    async def _answer_request(self, request: ProposalRequest, lm: Any) -> Any:
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
                logger.warning("%s is asked without a temperature: %s", lm.model, _cause(caught))
        self._takes_no_temperature = True
        return await self._answer_request(request, lm)

    def request(self, ask: Ask) -> ProposalRequest:
        """What the proposer sees: a pure function of the work and the seed."""
        options, view = self._options, ask.view
        style = self._style(ask)
        low, high = view.trajectory.score_range
        count = options.k_best if style == "explore" else min(3, options.k_best)
        scored = {name: self._scored(ask, name, count, low, high) for name in ask.predictors}
        seed = _number(options.seed, ask.round, ask.slot, ask.wave, ask.predictors)
        # The paper draws one meta-prompt a step; here each proposal sees examples of its own.
        generator = rng(options.seed, "exemplars", ask.round, 0 if options.paper else ask.slot)
        positions = choose(view, options.num_exemplars, generator, at_random=options.paper)
        return ProposalRequest(
            predictors=ask.predictors,
            current={name: view.base.instructions[name] for name in ask.predictors},
            scored_instructions=scored,
            exemplars=[self._exemplar(view.outcomes[p], p, (low, high)) for p in positions],
            role="\n".join(self._program.parts[name].role for name in ask.predictors),
            fields={name: self._program.parts[name].fields for name in ask.predictors},
            style=style,
            round=ask.round,
            slot=ask.slot,
            wave=ask.wave,
            seed=seed,
        )

    def _style(self, ask: Ask) -> Style:
        if self._options.paper:
            return "explore"
        styles = STYLES if len(ask.predictors) == 1 else STYLES[:2]
        return styles[(ask.round + ask.slot + ask.wave) % len(styles)]

    def _scored(
        self, ask: Ask, name: str, count: int, low: float, high: float
    ) -> list[tuple[str, int | None]]:
        texts = ask.view.trajectory.top_texts(name, count)
        if not texts:
            return [(ask.view.base.instructions[name], None)]
        return [(text, percent(reward, low, high)) for text, reward in texts]

    def _exemplar(self, outcome: Outcome | None, position: int, score_range: tuple[float, float]) -> Exemplar:
        example = self._splits["train"][position]
        return Exemplar(
            inputs=describe(example.inputs().toDict()),
            expected=describe(example.labels().toDict()),
            prediction="" if outcome is None else outcome.output,
            outcome=outcome,
            score_range=score_range,
        )

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


class _MetricRaised(Exception):
    """The metric itself raised; the exception is the cause."""


def _cause(error: BaseException | None) -> str:
    return shorten(f"{type(error).__name__}: {error}", 500)


def _number(*parts: object) -> int:
    """A positive 31-bit number out of the parts, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1
