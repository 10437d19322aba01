"""One example through program and metric: failures are data, a metric without a score is an error."""

from __future__ import annotations

import asyncio
import contextvars
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import cloudpickle
import dspy
import pytest
from dspy.utils.callback import ACTIVE_CALL_ID, BaseCallback

from dspy_opro.programs.awaiting import EventLoop
from dspy_opro.programs.evaluator import MOST_BUILT, ONE_EXAMPLE, Evaluator, MetricRaised, output_text
from dspy_opro.programs.metering import Ledger
from dspy_opro.programs.metric import Metric, MetricError
from dspy_opro.programs.program import Program
from dspy_opro.search.tasks import TaskResult
from dspy_opro.search.trajectory import Candidate, Outcome, Usage
from dspy_opro.testing import LMCall, ScriptedLM

TRAINSET = [dspy.Example(question=f"{n}", answer=f"{n}").with_inputs("question") for n in range(8)]
STUDENT = dspy.Predict(dspy.Signature("question -> answer", "Repeat it."))


def exact(example: Any, prediction: Any, trace: Any = None) -> bool:
    return bool(example.answer == prediction.answer)


def echo(call: LMCall) -> Mapping[str, str]:
    return {"answer": call.inputs["question"]}


def failing(call: LMCall) -> Any:
    raise ValueError("the provider is down")


class Case:
    """An evaluator over a scripted LM."""

    def __init__(
        self,
        answer: Callable[[LMCall], Any] = echo,
        metric: Any = exact,
        student: Any = STUDENT,
        loop: asyncio.AbstractEventLoop | None = None,
        **options: Any,
    ) -> None:
        self.lm = ScriptedLM(answer)
        self.ledger = Ledger()
        self.program = Program(student)
        self.loop = EventLoop(loop)
        self.evaluator = Evaluator(self.program, Metric(metric), self.loop, **options)

    def evaluate(
        self, position: int = 0, candidate: Candidate | None = None, call_id: str | None = None
    ) -> tuple[TaskResult, Any]:
        with dspy.context(lm=self.lm):
            return self.evaluator.evaluate(
                candidate or self.program.candidate, TRAINSET[position], self.ledger.add, call_id
            )

    def score(self, position: int = 0, candidate: Candidate | None = None) -> Outcome:
        content = self.evaluate(position, candidate)[0].content
        assert isinstance(content, Outcome)
        return content


@pytest.fixture(autouse=True)
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every loop that a test's case has is closed."""
    loops: list[EventLoop] = []
    make = EventLoop.__init__

    def noted(self: EventLoop, *arguments: Any) -> None:
        make(self, *arguments)
        loops.append(self)

    monkeypatch.setattr(EventLoop, "__init__", noted)
    yield
    for loop in loops:
        loop.close()


# --- what an example gives -------------------------------------------------------------------------------


def test_a_score_comes_with_output_feedback_and_subscores() -> None:
    def metric(example: Any, prediction: Any) -> Any:
        return dspy.Prediction(score=0.5, feedback="Shorter!", length=3)

    result, prediction = Case(metric=metric).evaluate(2)
    assert result.content == Outcome(0.5, "answer: 2", "Shorter!", None, {"length": 3.0})
    assert result.error is None
    assert prediction.answer == "2"


def test_a_candidates_instructions_are_what_the_lm_reads() -> None:
    case = Case()
    case.score(candidate=Candidate({"self": "Say it again."}))
    assert [call.instructions for call in case.lm.calls] == ["Say it again."]
    assert STUDENT.signature.instructions == "Repeat it."


def test_a_candidates_program_is_built_once_until_it_is_forgotten() -> None:
    case = Case()
    candidate = case.program.candidate
    built = case.evaluator.build(candidate)
    assert case.evaluator.build(candidate) is built
    case.evaluator.forget(candidate)
    assert case.evaluator.build(candidate) is not built
    case.evaluator.forget(Candidate({"self": "never built"}))


def test_of_many_candidates_the_latest_programs_are_kept() -> None:
    case = Case()
    candidates = [Candidate({"self": f"number {n}"}) for n in range(MOST_BUILT + 1)]
    built = [case.evaluator.build(candidate) for candidate in candidates]
    assert case.evaluator.build(candidates[-1]) is built[-1]
    assert case.evaluator.build(candidates[1]) is built[1]
    assert case.evaluator.build(candidates[0]) is not built[0]


def test_a_program_may_make_predictors_while_it_runs() -> None:
    class Growing(dspy.Module):  # type: ignore[misc]
        """The new predictors come before the last one."""

        def __init__(self) -> None:
            super().__init__()
            self.topic = dspy.Predict("question -> topic")
            self.experts: dict[str, Any] = {}
            self.last = dspy.Predict("question, topic -> answer")

        def forward(self, question: str) -> Any:
            topic = self.topic(question=question).topic
            self.experts.setdefault(topic, dspy.Predict("question -> hint"))(question=question)
            return self.last(question=question, topic=topic)

    def reply(call: LMCall) -> Mapping[str, str]:
        return {name: f"{name} of {call.inputs['question']}" for name in call.output_fields}

    case = Case(reply, lambda e, p: 1.0, Growing())
    for position in (0, 1):
        with dspy.context(lm=case.lm):
            result, _ = case.evaluator.evaluate(case.program.candidate, TRAINSET[position], keeps_calls=True)
        assert isinstance(result.content, Outcome)
        outputs = {name: call["outputs"] for name, call in (result.content.calls or {}).items()}
        assert outputs == {
            "topic": {"topic": f"topic of {position}"},
            "last": {"answer": f"answer of {position}"},
        }


@pytest.mark.parametrize("is_copyable", [True, False])
def test_no_evaluation_changes_an_example_or_the_shown_output(is_copyable: bool) -> None:
    class Chat(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner = dspy.Predict("question, seen -> answer")

        def forward(self, question: str, seen: list[str], lock: Any) -> Any:
            seen.append(question)
            return self.inner(question=question, seen=seen)

    def metric(example: Any, prediction: Any) -> float:
        assert example is given  # a metric may look for its own example
        prediction.answer = "changed"
        return float(len(example.seen))

    class Shared(list[str]):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("there is only one")

    seen = [] if is_copyable else Shared()
    given = dspy.Example(question="2", seen=seen, lock=threading.Lock(), answer="2")
    given = given.with_inputs("question", "seen", "lock")
    case = Case(metric=metric, student=Chat())
    for number in (1, 2):
        with dspy.context(lm=case.lm):
            result, _ = case.evaluator.evaluate(case.program.candidate, given)
        # What can't be copied is shared as it is.
        assert result.content == Outcome(0.0 if is_copyable else number, "answer: 2")
    assert given.seen == ([] if is_copyable else ["2", "2"])


def test_an_async_metric_is_awaited() -> None:
    async def metric(example: Any, prediction: Any) -> float:
        await asyncio.sleep(0)
        return 0.25

    assert Case(metric=metric).score().score == 0.25


async def test_an_async_metric_of_a_program_that_is_called_is_awaited_on_the_callers_loop() -> None:
    here, mark, seen = (
        threading.get_ident(),
        contextvars.ContextVar[str]("mark", default="fresh"),
        list[Any](),
    )

    async def metric(example: Any, prediction: Any) -> float:
        seen.append((threading.get_ident() == here, mark.get()))
        return float(example.answer) / 10

    class Marking(Own):
        def forward(self, question: str) -> Any:
            seen.append((threading.get_ident() == here, mark.get()))
            mark.set("used")
            return dspy.Prediction(answer=question)

    case = Case(student=Marking(), metric=metric, loop=asyncio.get_running_loop())
    outcomes = [await asyncio.to_thread(case.score, position) for position in (3, 1, 2)]
    assert [outcome.score for outcome in outcomes] == [0.3, 0.1, 0.2]
    assert seen == [(False, "fresh"), (True, "used")] * 3


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


@pytest.mark.parametrize(("is_awaited", "output"), [(False, "forward False"), (True, "aforward True")])
async def test_programs_are_awaited_on_the_loop_or_called_in_the_worker_thread(
    is_awaited: bool, output: str
) -> None:
    seen = []

    def metric(example: Any, prediction: Any) -> float:
        seen.append(threading.get_ident() == MAIN)
        return 1.0

    case = Case(student=Own(), metric=metric, loop=asyncio.get_running_loop(), is_awaited=is_awaited)
    assert (await asyncio.to_thread(case.score)).output == f"answer: {output}"
    assert seen == [False]  # a slow metric never holds up the loop


async def test_a_forward_that_is_async_is_awaited_on_the_loop() -> None:
    class Late(Own):
        async def forward(self, question: str) -> Any:
            return await self.aforward(question)

    case = Case(student=Late(), metric=lambda e, p: 1.0, loop=asyncio.get_running_loop())
    assert (await asyncio.to_thread(case.score)).output == "answer: aforward True"
    assert case.ledger.usage.scorer_calls == 1


@pytest.mark.parametrize("is_awaited", [False, True])
def test_a_program_sees_the_callers_context_and_a_trace_of_its_own(is_awaited: bool) -> None:
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

    case = Case(student=Looking(), metric=lambda e, p: 1.0, is_awaited=is_awaited)
    with dspy.context(mark="here"):
        outputs = {case.score(position).output for position in range(3)}
    assert outputs == {'seen: ["here", 1]'}


def test_callbacks_see_the_call_id_as_the_parent() -> None:
    seen: list[str | None] = []

    class Callback(BaseCallback):  # type: ignore[misc]
        def on_module_start(self, call_id: str, instance: Any, inputs: Any) -> None:
            seen.append(ACTIVE_CALL_ID.get())

    case = Case()
    with dspy.context(callbacks=[Callback()]):
        case.evaluate(call_id="the evaluation")
        case.evaluate()
    assert seen == ["the evaluation", None]


def test_the_task_model_takes_the_place_of_the_configured_lm() -> None:
    task_model = ScriptedLM(echo)
    case = Case(task_model=task_model)
    assert case.score().score == 1.0
    assert (case.lm.num_calls, task_model.num_calls) == (0, 1)


def test_a_predictors_own_lm_is_its_own() -> None:
    student, own = STUDENT.deepcopy(), ScriptedLM(echo)
    student.lm = own
    Case(student=student, task_model=ScriptedLM(echo)).score()
    assert own.num_calls == 1


def test_a_copy_by_pickle_scores_alike_with_a_loop_of_its_own() -> None:
    prices = {"scripted/lm": (1.0, 2.0)}
    case = Case(task_model=ScriptedLM(echo), failure_score=-1.0, timeout_seconds=7.0, prices=prices)
    copied = pickle.loads(cloudpickle.dumps(case.evaluator))
    result, _ = copied.evaluate(case.program.candidate, TRAINSET[3])
    assert result == case.evaluate(3)[0]
    assert result.usage.cost == (result.usage.prompt_tokens + 2 * result.usage.completion_tokens) / 1e6
    assert copied.loop is not case.loop
    settings = ("failure_score", "is_awaited", "timeout_seconds", "prices")
    assert all(getattr(copied, name) == getattr(case.evaluator, name) for name in settings)


# --- failures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, asyncio.CancelledError, StopIteration])
@pytest.mark.parametrize("options", [{}, {"timeout_seconds": 20}])
def test_a_program_that_wants_to_end_the_process_has_failed_no_more(
    error: Any, options: dict[str, Any]
) -> None:
    class Quitting(Own):
        def forward(self, question: str) -> Any:
            if question == "1":
                raise error("enough")
            return dspy.Prediction(answer=question)

    case = Case(student=Quitting(), **options)
    outcomes = [case.score(position) for position in range(3)]
    assert [outcome.score for outcome in outcomes] == [1.0, 0.0, 1.0]
    assert outcomes[1].error is not None and outcomes[1].error.endswith("enough")


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, asyncio.CancelledError, StopIteration])
@pytest.mark.parametrize("where", ["program", "metric"])
def test_an_awaited_call_that_wants_to_end_the_process_has_failed_no_more(error: Any, where: str) -> None:
    class Quitting(Own):
        async def aforward(self, question: str) -> Any:
            if question == "1" and where == "program":
                raise error("enough")
            return dspy.Prediction(answer=question)

    async def metric(example: Any, prediction: Any) -> bool:
        if example.question == "1" and where == "metric":
            raise error("enough")
        return exact(example, prediction)

    case = Case(student=Quitting(), metric=metric, is_awaited=True)
    outcomes = [case.score(position) for position in range(3)]
    assert [outcome.score for outcome in outcomes] == [1.0, 0.0, 1.0]
    assert outcomes[1].error is not None and error.__name__ in outcomes[1].error


def test_a_program_error_is_a_failure_with_its_cause() -> None:
    result, prediction = Case(answer=failing, failure_score=-1.0).evaluate(3)
    assert isinstance(result.content, Outcome)
    assert result.content.score == -1.0
    assert result.content.error is not None
    assert "the provider is down" in result.content.error
    assert "the provider is down" in str(result.error)
    assert prediction is None


def test_a_metric_that_raises_is_a_failure_too() -> None:
    def metric(example: Any, prediction: Any) -> float:
        raise KeyError("missing")

    async def async_metric(example: Any, prediction: Any) -> float:
        raise KeyError("missing")

    for broken in (metric, async_metric):
        result, _ = Case(metric=broken).evaluate()
        assert isinstance(result.content, Outcome)
        assert result.content.error == "metric raised KeyError: 'missing'"
        assert isinstance(result.error, MetricRaised)
        assert isinstance(result.error.__cause__, KeyError)


@pytest.mark.parametrize("value", [None, "0.5", float("nan"), {"points": 1}, object()])
def test_a_metric_that_returns_no_score_is_an_error_and_costs_one_call(value: Any) -> None:
    case = Case(metric=lambda e, p: value)
    with pytest.raises(MetricError, match="metric"):
        case.score()
    assert case.lm.num_calls == 1
    assert case.ledger.usage.scorer_calls == 1
    assert case.ledger.usage.metric_calls == 0  # the queue counts examples once they have a score


def test_an_awaited_program_that_takes_too_long_is_a_failure() -> None:
    class Slow(Own):
        async def aforward(self, question: str) -> Any:
            await asyncio.sleep(60)

    case = Case(student=Slow(), is_awaited=True, timeout_seconds=0.05)
    started = time.monotonic()
    outcome = case.score()
    assert outcome.error == "ExampleTimeout: no score within example_timeout_seconds=0.05"
    assert time.monotonic() - started < 0.8


@pytest.mark.parametrize("is_awaited", [False, True])
def test_a_timeout_of_the_program_itself_keeps_its_words(is_awaited: bool) -> None:
    class TimesOut(Own):
        def forward(self, question: str) -> Any:
            raise TimeoutError("the database")

        async def aforward(self, question: str) -> Any:
            raise TimeoutError("the database")

    outcome = Case(student=TimesOut(), is_awaited=is_awaited, timeout_seconds=20).score()
    assert outcome.error == "TimeoutError: the database"


# --- counting --------------------------------------------------------------------------------------------


def test_usage_is_that_of_the_result() -> None:
    case = Case()
    result, _ = case.evaluate(0)
    usage = result.usage
    assert usage == ONE_EXAMPLE + case.ledger.usage
    assert (usage.metric_calls, usage.scorer_calls, usage.proposer_calls) == (1, 1, 0)
    assert usage.prompt_tokens > 0 < usage.completion_tokens


def test_a_failed_example_is_paid_for_too() -> None:
    def metric(example: Any, prediction: Any) -> float:
        raise KeyError("missing")

    case = Case(metric=metric)
    result, _ = case.evaluate()
    assert result.usage == ONE_EXAMPLE + case.ledger.usage
    assert result.usage.scorer_calls == 1


def test_a_call_that_hangs_is_booked_as_it_goes() -> None:
    """So a call that its time limit left behind is paid for: what it spent before, and what it spends later."""
    release, under_way = threading.Event(), threading.Event()

    def answer(call: LMCall) -> Any:
        if call.inputs["question"] == "second":
            under_way.set()
            release.wait(20)
        return echo(call)

    class Twice(Own):
        def forward(self, question: str) -> Any:
            self.inner(question=question)
            return self.inner(question="second")

    case = Case(answer=answer, student=Twice())
    thread = threading.Thread(target=case.score)
    thread.start()
    assert under_way.wait(20)
    usage = case.ledger.usage
    assert usage.scorer_calls == 1
    release.set()
    thread.join(20)
    assert (case.ledger.usage - usage).scorer_calls == 1
    assert (case.ledger.usage - usage).tokens > 0
    assert case.ledger.usage.metric_calls == 0  # the queue counts examples once they have a score


def test_a_time_limit_books_what_was_spent_until_then() -> None:
    class Slow(Own):
        async def aforward(self, question: str) -> Any:
            await self.inner.acall(question=question)
            await asyncio.sleep(60)

    case = Case(student=Slow(), is_awaited=True, timeout_seconds=1.0)
    result, _ = case.evaluate()
    assert isinstance(result.error, TimeoutError)
    assert result.usage == ONE_EXAMPLE + case.ledger.usage
    assert (result.usage.metric_calls, result.usage.scorer_calls) == (1, 1)


@pytest.mark.parametrize("settings", [{"disable_history": True}, {"max_history_size": 0}])
def test_usage_is_counted_where_the_history_is_off(settings: dict[str, Any]) -> None:
    case = Case()
    with dspy.context(**settings):
        case.score()
    assert case.ledger.usage.scorer_calls == 1
    assert case.ledger.usage.tokens > 0


def test_a_users_own_tracker_sees_the_usage_too() -> None:
    case = Case()
    with dspy.track_usage() as tracker:
        case.score()
    totals = tracker.get_total_tokens()
    assert sum(usage["prompt_tokens"] for usage in totals.values()) == case.ledger.usage.prompt_tokens > 0


def test_calls_in_threads_of_a_program_are_counted() -> None:
    class Fan(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner = dspy.Predict("question -> answer")

        def forward(self, question: str) -> Any:
            pairs = [(self.inner, {"question": f"{question}{n}"}) for n in range(4)]
            answers = dspy.Parallel(num_threads=4, disable_progress_bar=True)(pairs)
            return dspy.Prediction(answer=answers[0].answer)

    case = Case(student=Fan(), metric=lambda e, p: 1.0)
    result, _ = case.evaluate()
    assert result.error is None
    booked = case.ledger.usage
    assert result.usage == ONE_EXAMPLE + booked
    assert booked == Usage(0, 4, 0, 0, booked.prompt_tokens, booked.completion_tokens)


class Order:
    """What a program may return as well: its `items` are no fields."""

    def items(self) -> list[str]:
        return ["bread", "salt"]

    def __repr__(self) -> str:
        return f"Order({self.items()})"


def test_a_program_may_return_any_object() -> None:
    class Shop(Own):
        def forward(self, question: str) -> Any:
            self.inner(question=question)
            return Order()

    case = Case(student=Shop(), metric=lambda e, p: len(p.items()))
    with dspy.context(lm=case.lm):
        result, _ = case.evaluator.evaluate(case.program.candidate, TRAINSET[0], keeps_calls=True)
    assert result.content.score == 2.0


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        (dspy.Prediction(answer="a", score=1), "answer: a\nscore: 1"),
        ("plain", "plain"),
        (None, "None"),
        ({"a": 1}, "a: 1"),
        (Order(), "Order(['bread', 'salt'])"),
    ],
)
def test_whatever_a_program_returns_has_a_text(prediction: Any, expected: str) -> None:
    assert output_text(prediction) == expected


def test_a_prediction_whose_repr_raises_has_its_score() -> None:
    class Wordless:
        def __repr__(self) -> str:
            raise RuntimeError("no words")

    class Own(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner = dspy.Predict("question -> answer")

        def forward(self, question: str) -> Any:
            return dspy.Prediction(answer=Wordless())

    result, _ = Case(student=Own(), metric=lambda e, p: 0.5).evaluate()
    assert isinstance(result.content, Outcome)
    assert (result.content.score, result.content.error) == (0.5, None)
    assert result.content.output == "(can't be shown: RuntimeError: no words)"
