"""One example through program and metric, one call of the proposer: failures are data, set-up errors are errors."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import dspy
import pytest

from dspy_opro import ProposalRequest
from dspy_opro.proposers.cleaning import Rules
from dspy_opro.reporting.evaluations import Reporter
from dspy_opro.executor import DSPyExecutor
from dspy_opro.runner.failures import TooManyErrors
from dspy_opro.programs.metric import Metric, MetricError
from dspy_opro.options import Options
from dspy_opro.programs.program import Program
from dspy_opro.protocols import Unit
from dspy_opro.runner.budget import Ledger
from dspy_opro.search.trajectory import Usage
from dspy_opro.testing import LMCall, ScriptedLM
from dspy_opro.search.trajectory import Candidate, Outcome, Trajectory, Trial
from dspy_opro.search.tasks import ProposalTask, ScoringTask, View

OPTIONS = Options(
    k_best=20,
    num_exemplars=2,
    temperature=1.0,
    seed=0,
    failure_score=0.0,
    max_errors=None,
    default_max_errors=10,
    example_timeout_seconds=None,
    provide_traceback=False,
    native_async=False,
    paper=False,
)
TRAINSET = [dspy.Example(question=f"{n}", answer=f"{n}").with_inputs("question") for n in range(8)]
STUDENT = dspy.Predict(dspy.Signature("question -> answer", "Repeat it."))


def exact(example: Any, prediction: Any, trace: Any = None) -> bool:
    return bool(example.answer == prediction.answer)


def echo(call: LMCall) -> Mapping[str, str]:
    if "instruction" in call.output_fields:
        return {"instruction": f"Repeat it {call.rollout_id}."}
    return {"answer": call.inputs["question"]}


class Case:
    """An executor over a scripted LM."""

    def __init__(
        self,
        answer: Callable[[LMCall], Any] = echo,
        metric: Any = exact,
        student: Any = STUDENT,
        proposer: Any = None,
        rules: Rules = Rules(),  # noqa: B008 # frozen
        task_model: Any = None,
        **options: Any,
    ) -> None:
        from dspy_opro.proposers.opro import OPROProposer

        self.lm = ScriptedLM(answer)
        self.ledger = Ledger()
        self.program = Program(student)
        self.candidate = self.program.candidate
        self.executor = DSPyExecutor(
            self.program,
            Metric(metric),
            {"train": TRAINSET, "val": TRAINSET[:2]},
            proposer or OPROProposer(),
            self.lm,
            task_model,
            self.ledger,
            rules,
            replace(OPTIONS, **options),
            Reporter(metric, at_once=False),
        )

    async def score(self, position: int = 0, candidate: Candidate | None = None) -> Outcome:
        return (await self.score_all([position], candidate))[0]

    async def score_all(self, positions: Sequence[int], candidate: Candidate | None = None) -> list[Outcome]:
        """Examples one after the other, as one thread takes them."""
        block = ScoringTask(candidate or self.candidate, 0, "train", 0, len(TRAINSET))
        units = [(block, position) for position in positions]
        outcomes: list[Outcome] = []

        def then(unit: Unit, outcome: Outcome, usage: Usage) -> Unit | None:
            assert unit == units[len(outcomes)]
            outcomes.append(outcome)
            return units[len(outcomes)] if len(outcomes) < len(units) else None

        with dspy.context(lm=self.lm):
            await self.executor.score(units[0], then)
        return outcomes

    async def propose(self, **changes: Any) -> Any:
        with dspy.context(lm=self.lm):
            proposal, _ = await self.executor.propose(ask(self.candidate, **changes))
        return proposal

    async def try_one(self) -> None:
        with dspy.context(lm=self.lm):
            await self.executor.try_one(self.candidate)


def ask(candidate: Candidate, **changes: Any) -> ProposalTask:
    view = changes.pop("view", View(Trajectory(), candidate, [None] * len(TRAINSET)))
    values = {"round": 1, "slot": 0, "wave": 0, "predictors": tuple(candidate.instructions)}
    return ProposalTask(**{**values, **changes}, view=view)


# --- scoring ---------------------------------------------------------------------------------------------


async def test_a_score_comes_with_output_feedback_and_subscores() -> None:
    def metric(example: Any, prediction: Any) -> Any:
        return dspy.Prediction(score=0.5, feedback="Shorter!", length=3)

    outcome = await Case(metric=metric).score(2)
    assert outcome == Outcome(0.5, "answer: 2", "Shorter!", None, {"length": 3.0})


async def test_a_candidates_instructions_are_what_the_lm_reads() -> None:
    case = Case()
    await case.score(candidate=Candidate({"self": "Say it again."}))
    assert [call.instructions for call in case.lm.calls] == ["Say it again."]
    assert STUDENT.signature.instructions == "Repeat it."


async def test_an_async_metric_is_awaited() -> None:
    async def metric(example: Any, prediction: Any) -> float:
        await asyncio.sleep(0)
        return 0.25

    assert (await Case(metric=metric).score()).score == 0.25


async def test_a_thread_goes_from_one_example_to_the_next_in_a_fresh_context_each() -> None:
    seen: list[tuple[int, str]] = []
    mark: contextvars.ContextVar[str] = contextvars.ContextVar("mark", default="fresh")

    async def metric(example: Any, prediction: Any) -> float:
        assert threading.get_ident() == MAIN
        return float(example.answer) / 10

    class Marking(Own):
        def forward(self, question: str) -> Any:
            seen.append((threading.get_ident(), mark.get()))
            mark.set("used")
            return dspy.Prediction(answer=question)

    outcomes = await Case(student=Marking(), metric=metric).score_all([3, 1, 2])
    assert [outcome.score for outcome in outcomes] == [0.3, 0.1, 0.2]
    assert len(set(seen)) == 1 and seen[0][0] != MAIN and seen[0][1] == "fresh"


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, asyncio.CancelledError, StopIteration])
@pytest.mark.parametrize("options", [{}, {"example_timeout_seconds": 20}])
async def test_a_program_that_wants_to_end_the_process_has_failed_no_more(
    error: Any, options: dict[str, Any]
) -> None:
    class Quitting(Own):
        def forward(self, question: str) -> Any:
            if question == "1":
                raise error("enough")
            return dspy.Prediction(answer=question)

    outcomes = await Case(student=Quitting(), **options).score_all([0, 1, 2])
    assert [outcome.score for outcome in outcomes] == [1.0, 0.0, 1.0]
    assert outcomes[1].error is not None and outcomes[1].error.endswith("enough")


class Own(dspy.Module):  # type: ignore[misc]
    """Says which of its methods was called, in which thread."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = dspy.Predict("question -> answer")

    def forward(self, question: str) -> Any:
        self.inner(question=question)
        return dspy.Prediction(answer=f"forward {threading.get_ident() == MAIN}")

    async def aforward(self, question: str) -> Any:
        await self.inner.acall(question=question)
        return dspy.Prediction(answer=f"aforward {threading.get_ident() == MAIN}")


MAIN = threading.get_ident()


@pytest.mark.parametrize(("native_async", "output"), [(False, "forward False"), (True, "aforward True")])
async def test_programs_are_awaited_on_the_loop_or_called_in_a_thread(
    native_async: bool, output: str
) -> None:
    seen = []

    def metric(example: Any, prediction: Any) -> float:
        seen.append(threading.get_ident() == MAIN)
        return 1.0

    case = Case(student=Own(), metric=metric, native_async=native_async)
    assert (await case.score()).output == f"answer: {output}"
    assert seen == [False]  # a slow metric never holds up the loop


@pytest.mark.parametrize("native_async", [False, True])
async def test_a_program_sees_the_callers_context_and_a_trace_of_its_own(native_async: bool) -> None:
    class Looking(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner = dspy.Predict("question -> answer")

        def forward(self, question: str) -> Any:
            self.inner(question=question)
            return dspy.Prediction(seen=(dspy.settings.mark, len(dspy.settings.trace)))

        async def aforward(self, question: str) -> Any:
            await self.inner.acall(question=question)
            return dspy.Prediction(seen=(dspy.settings.mark, len(dspy.settings.trace)))

    case = Case(student=Looking(), metric=lambda e, p: 1.0, native_async=native_async)
    with dspy.context(mark="here"):
        outputs = {(await case.score(position)).output for position in range(3)}
    assert outputs == {"seen: ('here', 1)"}


async def test_the_task_model_takes_the_place_of_the_configured_lm() -> None:
    task_model = ScriptedLM(echo)
    case = Case(task_model=task_model)
    assert (await case.score()).score == 1.0
    assert (case.lm.num_calls, task_model.num_calls) == (0, 1)


async def test_a_predictors_own_lm_is_its_own() -> None:
    student, own = STUDENT.deepcopy(), ScriptedLM(echo)
    student.lm = own
    case = Case(student=student, task_model=ScriptedLM(echo))
    await case.score()
    assert own.num_calls == 1


def failing(call: LMCall) -> Any:
    raise ValueError("the provider is down")


async def test_a_program_error_is_a_failure_with_its_cause(caplog: pytest.LogCaptureFixture) -> None:
    outcome = await Case(answer=failing, failure_score=-1.0).score(3)
    assert outcome.score == -1.0
    assert outcome.error is not None
    assert "the provider is down" in outcome.error
    assert "Failed on a train example" in caplog.text
    assert "Traceback" not in caplog.text


async def test_the_traceback_is_logged_on_request(caplog: pytest.LogCaptureFixture) -> None:
    await Case(answer=failing, provide_traceback=True).score()
    assert "Traceback (most recent call last)" in caplog.text


async def test_a_metric_that_raises_later_is_a_failure_too() -> None:
    def metric(example: Any, prediction: Any) -> float:
        raise KeyError("missing")

    async def async_metric(example: Any, prediction: Any) -> float:
        raise KeyError("missing")

    for broken in (metric, async_metric):
        outcome = await Case(metric=broken).score()
        assert outcome.error == "metric raised KeyError: 'missing'"


async def test_a_metric_that_returns_no_score_later_ends_the_run() -> None:
    with pytest.raises(MetricError, match="must return a number"):
        await Case(metric=lambda e, p: None).score()


@pytest.mark.parametrize("native_async", [False, True])
async def test_an_example_that_takes_too_long_is_a_failure(native_async: bool) -> None:
    class Slow(Own):
        def forward(self, question: str) -> Any:
            time.sleep(1.0)

        async def aforward(self, question: str) -> Any:
            await asyncio.sleep(60)

    case = Case(student=Slow(), native_async=native_async, example_timeout_seconds=0.05)
    started = time.monotonic()
    outcome = await case.score()
    assert outcome.error == "TimeoutError: no score within example_timeout_seconds=0.05"
    assert time.monotonic() - started < 0.8


async def test_a_timeout_of_the_program_itself_keeps_its_words() -> None:
    class TimesOut(Own):
        def forward(self, question: str) -> Any:
            raise TimeoutError("the database")

    outcome = await Case(student=TimesOut(), example_timeout_seconds=20).score()
    assert outcome.error == "TimeoutError: the database"


# --- the first example -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "0.5", float("nan"), {"points": 1}, object()])
async def test_a_metric_without_a_score_costs_one_call(value: Any) -> None:
    case = Case(metric=lambda e, p: value)
    with pytest.raises(MetricError, match="metric"):
        await case.try_one()
    assert case.lm.num_calls == 1


async def test_a_metric_that_raises_costs_one_call() -> None:
    def metric(example: Any, prediction: Any) -> float:
        return float(prediction.nothing)

    case = Case(metric=metric)
    with pytest.raises(MetricError, match="metric raised AttributeError") as caught:
        await case.try_one()
    assert isinstance(caught.value.__cause__, AttributeError)
    assert case.lm.num_calls == 1


async def test_a_student_that_fails_on_three_examples_is_broken() -> None:
    case = Case(answer=failing)
    with pytest.raises(
        TooManyErrors, match=r"fails on every example tried\. First cause: .*provider is down"
    ):
        await case.try_one()
    assert case.ledger.usage.metric_calls == 3


async def test_the_first_example_is_not_paid_twice() -> None:
    case = Case(answer=fail_for("0"))
    await case.try_one()
    calls = case.lm.num_calls
    outcomes = [await case.score(position) for position in range(2)]
    assert [outcome.error is None for outcome in outcomes] == [False, True]
    assert case.lm.num_calls == calls
    assert case.ledger.usage.metric_calls == 2
    await case.score(2)
    assert case.lm.num_calls == calls + 1


# --- too many errors -------------------------------------------------------------------------------------


def fail_for(*questions: str) -> Callable[[LMCall], Any]:
    def answer(call: LMCall) -> Any:
        if call.inputs["question"] in questions:
            raise ValueError(f"cause {call.inputs['question']}")
        return echo(call)

    return answer


async def test_max_errors_counts_all_failures_and_tells_the_first_cause() -> None:
    case = Case(answer=fail_for("1", "3", "5"), max_errors=3)
    for position in range(5):
        await case.score(position)
    with pytest.raises(
        TooManyErrors, match=r"failed on 3 examples \(max_errors=3\)\. First cause: .*cause 1"
    ) as caught:
        await case.score(5)
    assert "cause 1" in str(caught.value.__cause__)


async def test_without_max_errors_single_failures_never_end_a_run() -> None:
    case = Case(answer=failing)
    for number in range(3):
        for position in range(8):
            outcome = await case.score(position, Candidate({"self": f"bad {number}"}))
            assert outcome.error is not None


def finished(name: str, failures: int, scored: int = 5) -> Trial:
    return Trial(Candidate({"self": name}), 0.0, scored, num_failures=failures)


async def test_without_max_errors_whole_rounds_of_failures_end_it() -> None:
    case = Case(answer=failing)
    await case.score(candidate=Candidate({"self": "a"}))
    with pytest.raises(
        TooManyErrors, match=r"each of the last 20 examples, under 4 candidates\. First cause"
    ):
        case.executor.decided([finished(name, 5) for name in "abcd"])


@pytest.mark.parametrize(
    "rounds",
    [
        [[("a", 5), ("b", 5), ("c", 5), ("d", 4)]],  # one example worked
        [[("a", 5), ("b", 5)], [("c", 0)], [("d", 5), ("e", 5)]],
        [[("a", 5), ("b", 5), ("c", 5)]],  # three bad instructions
        [[], [("a", 5)]],
    ],
)
async def test_what_is_no_reason_to_end(rounds: list) -> None:
    case = Case(answer=failing)
    await case.score(candidate=Candidate({"self": "a"}))
    for trials in rounds:
        case.executor.decided([finished(*trial) for trial in trials])


async def test_rounds_of_few_candidates_add_up() -> None:
    case = Case(answer=failing)
    await case.score(candidate=Candidate({"self": "d"}))
    for name in "abc":
        case.executor.decided([finished(name, 5)])
    with pytest.raises(TooManyErrors):
        case.executor.decided([finished("d", 5)])


async def test_failures_that_an_earlier_process_recorded_do_not_end_this_one() -> None:
    Case().executor.decided([finished(name, 5) for name in "abcd"])


# --- counting --------------------------------------------------------------------------------------------


async def test_usage_is_booked_on_its_side() -> None:
    case = Case()
    await case.score(0)
    first = case.ledger.usage
    assert (first.metric_calls, first.scorer_calls, first.proposer_calls) == (1, 1, 0)
    assert first.prompt_tokens > 0 < first.completion_tokens
    await case.propose()
    second = case.ledger.usage - first
    assert (second.metric_calls, second.scorer_calls, second.proposer_calls) == (0, 0, 1)
    assert second.tokens > 0


async def test_a_call_that_its_time_limit_left_behind_is_still_paid_for() -> None:
    release = threading.Event()

    def answer(call: LMCall) -> Any:
        release.wait(10)
        return echo(call)

    case = Case(answer=answer, example_timeout_seconds=0.05)
    assert (await case.score()).error is not None
    assert case.ledger.usage == Usage(metric_calls=1)
    release.set()
    for _ in range(200):
        if case.ledger.usage.scorer_calls:
            break
        await asyncio.sleep(0.01)
    assert case.ledger.usage.scorer_calls == 1
    assert case.ledger.usage.tokens > 0


@pytest.mark.parametrize("settings", [{"disable_history": True}, {"max_history_size": 0}])
async def test_usage_is_counted_where_the_history_is_off(settings: dict[str, Any]) -> None:
    case = Case()
    with dspy.context(**settings):
        await case.score()
    assert case.ledger.usage.scorer_calls == 1
    assert case.ledger.usage.tokens > 0


async def test_a_users_own_tracker_sees_the_usage_too() -> None:
    case = Case()
    with dspy.track_usage() as tracker:
        await case.score()
        await case.propose()
    totals = tracker.get_total_tokens()
    assert sum(usage["prompt_tokens"] for usage in totals.values()) == case.ledger.usage.prompt_tokens


async def test_calls_in_threads_of_a_program_are_counted() -> None:
    class Fan(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner = dspy.Predict("question -> answer")

        def forward(self, question: str) -> Any:
            pairs = [(self.inner, {"question": f"{question}{n}"}) for n in range(4)]
            answers = dspy.Parallel(num_threads=4, disable_progress_bar=True)(pairs)
            return dspy.Prediction(answer=answers[0].answer)

    case = Case(student=Fan(), metric=lambda e, p: 1.0)
    assert (await case.score()).error is None
    assert case.ledger.usage.scorer_calls == 4


# --- proposing -------------------------------------------------------------------------------------------


async def test_a_proposal_is_cleaned_and_checked() -> None:
    case = Case(answer=lambda call: {"instruction": '```\nInstruction: "Say it."\n```'})
    assert (await case.propose()).texts == {"self": "Say it."}
    case = Case(answer=lambda call: {"instruction": "x" * 30}, rules=Rules(max_length=20))
    proposal = await case.propose()
    assert (proposal.texts, proposal.problems) == ({}, ("overlong",))


class Given(dspy.Module):  # type: ignore[misc]
    """A proposer of one's own: no LM, no signature."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer
        self.requests: list[ProposalRequest] = []

    def forward(self, request: ProposalRequest) -> Any:
        self.requests.append(request)
        return self.answer


class GivenAsync(dspy.Module):  # type: ignore[misc]
    async def aforward(self, request: ProposalRequest) -> Any:
        await asyncio.sleep(0)
        return dspy.Prediction(instruction="Say it.")


def plain(request: ProposalRequest) -> str:
    return "Say it."


async def plain_async(request: ProposalRequest) -> dict[str, str]:
    return {"self": "Say it."}


@pytest.mark.parametrize(
    "proposer",
    [
        Given(dspy.Prediction(instruction="Say it.")),
        Given("Say it."),
        Given({"self": "Say it."}),
        Given(dspy.Prediction(instruction={"self": "Say it.", "unknown": "?"})),
        GivenAsync(),
        plain,
        plain_async,
    ],
    ids=lambda proposer: getattr(proposer, "__name__", type(proposer).__name__),
)
async def test_proposers_of_ones_own(proposer: Any) -> None:
    assert (await Case(proposer=proposer).propose()).texts == {"self": "Say it."}


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (None, "A proposer must return"),
        (7, "A proposer must return"),
        (dspy.Prediction(text="Say it."), "A proposer must return"),
    ],
)
async def test_a_proposer_that_returns_something_else_has_failed(answer: Any, cause: str) -> None:
    proposal = await Case(proposer=Given(answer)).propose()
    assert proposal.texts == {}
    assert cause in proposal.error


@pytest.mark.parametrize("answer", ["", {}, {"self": None}, {"self": "  "}])
async def test_an_empty_proposal_is_dropped(answer: Any) -> None:
    proposal = await Case(proposer=Given(dspy.Prediction(instruction=answer))).propose()
    assert (proposal.texts, proposal.problems, proposal.error) == ({}, ("empty",), None)


async def test_a_proposer_that_raises_has_failed(caplog: pytest.LogCaptureFixture) -> None:
    proposal = await Case(answer=failing).propose()
    assert "the provider is down" in proposal.error
    assert "A proposal failed" in caplog.text


async def test_every_request_samples_anew_and_the_same_when_repeated() -> None:
    case = Case()
    before = dict(case.lm.kwargs)
    slots = [{"round": r, "slot": slot, "wave": wave} for r in (1, 2) for slot in range(4) for wave in (0, 1)]
    for _ in range(2):
        for place in slots:
            await case.propose(**place)
    ids = [call.rollout_id for call in case.lm.calls]
    assert ids[: len(slots)] == ids[len(slots) :]
    assert len(set(ids)) == len(slots)
    assert None not in ids
    assert {call.temperature for call in case.lm.calls} == {1.0}
    assert case.lm.kwargs == before
    assert "rollout_id" not in before


async def test_another_seed_asks_for_other_samples() -> None:
    cases = [Case(seed=seed) for seed in (0, 1)]
    ids = []
    for case in cases:
        await case.propose()
        ids.append(case.lm.calls[0].rollout_id)
    assert ids[0] != ids[1]


async def test_an_lm_that_refuses_a_temperature_is_asked_without() -> None:
    def answer(call: LMCall) -> Any:
        if call.temperature is not None:
            raise ValueError("Unsupported value: 'temperature' does not support 1.0 with this model.")
        return {"instruction": "Say it."}

    case = Case(answer=answer)
    assert (await case.propose()).texts == {"self": "Say it."}
    calls = case.lm.num_calls
    assert (await case.propose(slot=3)).texts == {"self": "Say it."}
    assert case.lm.num_calls == calls + 1


# --- what the proposer sees ------------------------------------------------------------------------------


def known(case: Case) -> View:
    """The student and two others, scored on all examples."""
    rows = {"Repeat it.": [0, 1] * 4, "Worse.": [0] * 8, "Best.": [0, 1, 1, 1] * 2}
    trials = [
        Trial(Candidate({"self": text}), sum(row) / 8, 8, scores=[float(s) for s in row])
        for text, row in rows.items()
    ]
    outcomes = [Outcome(float(s), output=f"answer: {n}") for n, s in enumerate(rows["Best."])]
    return View(Trajectory().add(*trials), trials[2].candidate, outcomes)


def request_of(case: Case, **changes: Any) -> ProposalRequest:
    return case.executor.request(ask(case.candidate, **changes))


async def test_a_request_shows_scored_instructions_ascending_and_at_most_k_best() -> None:
    case = Case()
    shown = request_of(case, view=known(case), slot=2)
    assert shown.style == "explore"
    assert shown.scored_instructions == {"self": [("Worse.", 0), ("Repeat it.", 50), ("Best.", 75)]}
    assert shown.current == {"self": "Best."}
    assert [
        text for text, _ in request_of(Case(k_best=2), view=known(case), slot=2).scored_instructions["self"]
    ] == [
        "Repeat it.",
        "Best.",
    ]


async def test_a_request_shows_exemplars_with_what_happened() -> None:
    case = Case(num_exemplars=4)
    exemplars = request_of(case, view=known(case)).exemplars
    assert len(exemplars) == 4
    scores = [e.outcome.score for e in exemplars if e.outcome is not None]
    assert sorted(scores) == [0.0, 0.0, 1.0, 1.0]
    for exemplar in exemplars:
        number = exemplar.inputs.removeprefix("question: ")
        assert exemplar.expected == f"answer: {number}"
        assert exemplar.prediction == f"answer: {number}"


async def test_before_the_first_round_the_own_text_has_no_score_yet() -> None:
    case = Case()
    request = request_of(case)
    assert request.scored_instructions == {"self": [("Repeat it.", None)]}
    assert all(exemplar.outcome is None and exemplar.prediction == "" for exemplar in request.exemplars)


async def test_a_request_is_a_function_of_the_work_and_the_seed() -> None:
    one, other = Case(), Case()
    work = {"view": known(one), "round": 3, "slot": 1}
    assert request_of(one, **work) == request_of(other, **work)
    assert request_of(one, **work).seed != request_of(one, **{**work, "slot": 2}).seed


async def test_styles_alternate_between_slots_rounds_and_waves() -> None:
    case = Case()
    styles = [request_of(case, slot=slot).style for slot in range(3)]
    assert sorted(styles) == ["explore", "extend", "refine"]
    assert request_of(case, slot=0, wave=1).style == styles[1]


async def test_the_paper_shows_one_meta_prompt_a_step() -> None:
    case = Case(paper=True)
    shown = [request_of(case, view=known(case), slot=slot) for slot in range(4)]
    assert {request.style for request in shown} == {"explore"}
    assert len({tuple(e.inputs for e in request.exemplars) for request in shown}) == 1
    assert len({request.seed for request in shown}) == 4


async def test_the_role_names_fields_types_and_descriptions() -> None:
    class Judge(dspy.Signature):  # type: ignore[misc]
        """Judge."""

        text: str = dspy.InputField(desc="a review")
        stars: int = dspy.OutputField()

    class Two(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.judge = dspy.Predict(Judge)
            self.other = dspy.Predict("a -> b")

    role = request_of(Case(student=Two()), predictors=("judge",)).role
    assert "the predictor 'judge', one of 2 in the program Two" in role
    assert "- input `text` (str): a review" in role
    assert "- output `stars` (int)" in role
    assert "`a`" not in role
