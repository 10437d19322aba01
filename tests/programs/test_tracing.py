"""The calls of a program's predictors as plain values, and a metric's feedback on one of them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from enum import Enum
from typing import Any

import dspy
import pydantic
import pytest

from dspy_opro.programs.awaiting import EventLoop
from dspy_opro.programs.evaluator import Evaluator
from dspy_opro.programs.metric import Metric
from dspy_opro.programs.program import Program
from dspy_opro.programs.tracing import PROGRAM, PredictorFeedback, plain_fields
from dspy_opro.search.trajectory import Outcome
from dspy_opro.testing import LMCall, ScriptedLM

EXAMPLE = dspy.Example(question="2 + 2", answer="4").with_inputs("question")


class TwoSteps(dspy.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.note = dspy.Predict(dspy.Signature("question -> note", "Note it."))
        self.answer = dspy.Predict(dspy.Signature("question, note -> answer", "Say it."))

    def forward(self, question: str) -> Any:
        return dspy.Prediction(
            answer=self.answer(question=question, note=self.note(question=question).note).answer
        )


def echo(call: LMCall) -> Mapping[str, str] | str:
    return {"note": "a sum"} if call.output_fields == ("note",) else {"answer": "5"}


def exact(example: Any, prediction: Any, trace: Any = None) -> bool:
    return bool(example.answer == prediction.answer)


def outcome(student: Any = None, answer: Any = echo, metric: Any = exact, example: Any = EXAMPLE) -> Outcome:
    program = Program(TwoSteps() if student is None else student)
    with dspy.context(lm=ScriptedLM(answer)), closing(EventLoop()) as loop:
        evaluator = Evaluator(program, Metric(metric), loop)
        result, _ = evaluator.evaluate(program.candidate, example, keeps_calls=True)
    assert isinstance(result.content, Outcome)
    return result.content


def calls(*arguments: Any, **options: Any) -> Mapping[str, Any]:
    found = outcome(*arguments, **options).calls
    assert found is not None
    assert json.loads(json.dumps(found)) == found  # a resumed run reads what this one has
    return found


NOTE = {"inputs": {"question": "2 + 2"}, "outputs": {"note": "a sum"}}
ANSWER = {"inputs": {"question": "2 + 2", "note": "a sum"}, "outputs": {"answer": "5"}}


def test_every_predictor_has_its_own_inputs_and_outputs() -> None:
    assert calls() == {"note": NOTE, "answer": ANSWER}


def test_a_program_with_one_predictor_has_no_calls() -> None:
    assert outcome(dspy.Predict("question -> answer")).calls is None


class OneStep(dspy.Module):  # type: ignore[misc]
    """Calls its one predictor with `inputs` beside the question, and returns what `give` makes of the answer."""

    def __init__(self, give: Any, **inputs: Any) -> None:
        super().__init__()
        self.answer = dspy.Predict(f"{', '.join(['question', *inputs])} -> answer")
        self.give, self.inputs = give, inputs

    def forward(self, question: str) -> Any:
        return self.give(self.answer(question=question, **self.inputs))


def broken(prediction: Any) -> Any:
    raise ValueError("broken")


@pytest.mark.parametrize(
    ("give", "inputs"),
    [
        (lambda prediction: prediction, {"context": ["a fact"]}),
        (lambda prediction: dspy.Prediction(result=len(prediction.answer)), {}),
        (lambda prediction: prediction.answer, {}),
        (broken, {}),
    ],
)
def test_one_predictor_has_a_call_where_the_program_does_not_show_what_it_got_and_gave(
    give: Any, inputs: Any
) -> None:
    call = {"inputs": {"question": "2 + 2", **inputs}, "outputs": {"answer": "5"}}
    assert calls(OneStep(give, **inputs), metric=lambda e, p: 1.0) == {"answer": call}


@pytest.mark.parametrize(
    ("give", "reply"),
    [
        (lambda prediction: dspy.Prediction(answer=prediction.answer.strip()), echo),
        (lambda prediction: dspy.Prediction(answer=f"{prediction.answer[:1]}", score=1), echo),
        (lambda prediction: prediction, lambda call: "no fields"),
    ],
)
def test_one_predictor_has_no_call_where_the_program_shows_all(give: Any, reply: Any) -> None:
    assert outcome(OneStep(give), reply).calls is None


def test_of_one_predictor_whose_answers_to_one_question_the_program_compares_no_call_is_chosen() -> None:
    class Vote(OneStep):
        def forward(self, question: str) -> Any:
            return [self.answer(question=question) for _ in range(3)][1]

    assert outcome(Vote(None), lambda call: {"answer": str(call.sample)}).calls is None


def test_a_failed_parse_has_the_raw_answer_and_what_came_before() -> None:
    found = outcome(answer=lambda call: echo(call) if "note" in call.output_fields else "no fields here")
    assert found.error is not None
    assert found.calls == {"note": NOTE, "answer": {"unparsed": "no fields here"}}


def test_of_equal_signatures_the_failed_parse_is_that_of_the_predictor_without_an_answer() -> None:
    class Twice(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = dspy.Predict("question -> answer"), dspy.Predict("question -> answer")

        def forward(self, question: str) -> Any:
            return self.second(question=self.first(question=question).answer)

    def answer(call: LMCall) -> Mapping[str, str] | str:
        return "no fields" if call.inputs["question"] == "5" else {"answer": "5"}

    found = calls(Twice(), answer)
    assert found["first"]["outputs"] == {"answer": "5"}
    assert list(found["second"]) == ["unparsed"]


def test_a_metric_that_raised_is_not_asked_about_predictors() -> None:
    def metric(gold: Any, pred: Any, trace: Any, pred_name: Any, pred_trace: Any) -> float:
        raise ValueError("broken")

    assert calls(metric=metric) == {"note": NOTE, "answer": ANSWER}


def test_a_program_that_fails_has_the_calls_before_its_error() -> None:
    class Failing(TwoSteps):
        def forward(self, question: str) -> Any:
            self.note(question=question)
            raise ValueError("broken")

    assert calls(Failing()) == {"note": NOTE}


def test_the_calls_of_a_metric_are_not_the_programs() -> None:
    judge = dspy.Predict(
        dspy.Signature("question, note -> answer", "Say it.")
    )  # a signature of the program's own

    def metric(example: Any, prediction: Any) -> bool:
        judge(question="the metric's", note="the longest of all the inputs")
        return True

    assert calls(metric=metric) == {"note": NOTE, "answer": ANSWER}


def test_what_a_metric_changes_was_given_before() -> None:
    class Last(TwoSteps):
        def forward(self, question: str) -> Any:
            return self.answer(question=question, note=self.note(question=question).note)

    def metric(example: Any, prediction: Any) -> bool:
        prediction.answer = "changed"
        return True

    assert calls(Last(), metric=metric) == {"note": NOTE, "answer": ANSWER}


def test_copies_of_a_predictor_are_known_by_their_signature() -> None:
    class Copying(TwoSteps):
        def forward(self, question: str) -> Any:
            return self.answer.deepcopy()(question=question, note="copied")

    assert calls(Copying()) == {"answer": {**ANSWER, "inputs": {"question": "2 + 2", "note": "copied"}}}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_of_several_calls_in_any_order_it_is_the_one_with_the_longest_inputs(order: tuple[int, ...]) -> None:
    notes = ["a", "aaa", "aa"]

    class Several(TwoSteps):
        def forward(self, question: str) -> Any:
            answers = [self.answer(question=question, note=notes[place]) for place in order]
            return answers[-1]

    assert calls(Several())["answer"]["inputs"] == {"question": "2 + 2", "note": "aaa"}


class Unreadable:
    def __str__(self) -> str:
        raise ValueError("no text")


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ([1, 2.5, None, True], [1, 2.5, None, True]),
        ({1: ("a", "b")}, {"1": ["a", "b"]}),
        ("\ud800", "\ufffd"),
        (["x" * 50, "y" * 50], f'["{"x" * 15} ... {"y" * 15}"]'),
        (Unreadable(), "(can't be shown: ValueError: no text)"),
    ],
)
def test_a_value_is_as_json_has_it_and_text_without_its_middle_if_it_is_long(value: Any, plain: Any) -> None:
    assert plain_fields({"field": value}, limit=40) == {"field": plain}


# --- feedback on one predictor ---------------------------------------------------------------------------


class Kind(Enum):
    SUM = "sum"


class Parts(pydantic.BaseModel):
    left: int
    right: int


class Typed(dspy.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        read = dspy.Signature("question -> parts, kind").with_updated_fields("parts", type_=Parts)
        self.read = dspy.Predict(read.with_updated_fields("kind", type_=Kind))
        self.add = dspy.Predict("parts -> answer")

    def forward(self, question: str) -> Any:
        read = self.read(question=question)
        return dspy.Prediction(
            answer=self.add(parts=str(read.parts)).answer, kind=read.kind, pages=("a", "b")
        )


def typed(call: LMCall) -> Mapping[str, Any]:
    if "answer" in call.output_fields:
        return {"answer": "5"}
    return {"parts": {"left": 2, "right": 3}, "kind": "sum"}


def asked(metric: Any, of: Outcome, student: Any, name: str) -> str:
    assert of.calls is not None
    with closing(EventLoop()) as loop:
        feedback = PredictorFeedback(Program(student), Metric(metric), loop)
        return feedback.of(("candidate", 0, name), EXAMPLE, of.calls)


def test_the_metric_gets_what_it_gets_from_gepa_in_the_types_of_the_program() -> None:
    seen: list[Any] = []

    def metric(gold: Any, pred: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None) -> Any:
        seen.append((pred, trace, pred_name, pred_trace))
        return dspy.Prediction(score=0.0, feedback=f"on {pred_name}")

    student = Typed()
    found = outcome(student, typed, metric)
    assert [name for _, _, name, _ in seen] == [None]  # scoring asks once, and for no predictor
    assert asked(metric, found, student, "read") == "on read"
    prediction, trace, name, ((predictor, inputs, outputs),) = seen[1]
    assert (prediction.answer, prediction.kind, prediction.pages) == ("5", Kind.SUM, ["a", "b"])
    assert name == "read"
    assert predictor is student.read
    assert inputs == {"question": "2 + 2"}
    assert outputs.parts == Parts(left=2, right=3)
    assert [step[0] for step in trace] == [student.read, student.add]


def test_the_same_feedback_is_asked_for_once() -> None:
    names: list[Any] = []

    def metric(gold: Any, pred: Any, trace: Any, pred_name: Any, pred_trace: Any) -> Any:
        names.append(pred_name)
        return {"score": 1.0, "feedback": "fine"}

    found = outcome(metric=metric)
    feedback = PredictorFeedback(Program(TwoSteps()), Metric(metric), EventLoop())
    assert found.calls is not None
    for _ in range(3):
        assert feedback.of(("candidate", 0, "note"), EXAMPLE, found.calls) == "fine"
    assert names == [None, "note"]


def test_feedback_that_is_asked_for_at_once_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    def metric(gold: Any, pred: Any, trace: Any, pred_name: Any, pred_trace: Any) -> Any:
        time.sleep(0.001)
        return {"score": 1.0, "feedback": "fine"}

    found = outcome(metric=metric)
    monkeypatch.setattr("dspy_opro.programs.tracing.MOST_KEPT", 1)
    feedback = PredictorFeedback(Program(TwoSteps()), Metric(metric), EventLoop())
    assert found.calls is not None

    def ask(number: int) -> str:
        return feedback.of((f"candidate {number}", 0, "note"), EXAMPLE, found.calls)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(64))) == {"fine"}
    assert len(feedback.known) == 1


def with_names(gold: Any, pred: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None) -> Any:
    if pred_name == "note":
        raise KeyError("no such predictor")
    return 1.0


@pytest.mark.parametrize("name", ["note", "answer"])
def test_a_metric_that_fails_or_gives_only_a_score_has_no_feedback(name: str) -> None:
    assert asked(with_names, outcome(metric=with_names), TwoSteps(), name) == ""


def test_a_predictor_that_was_not_called_or_not_understood_is_not_asked_about() -> None:
    broken = outcome(
        answer=lambda call: echo(call) if "note" in call.output_fields else "?", metric=with_names
    )
    assert broken.calls is not None
    assert PROGRAM not in broken.calls
    assert asked(pytest.fail, broken, TwoSteps(), "answer") == ""


def test_an_async_metric_is_awaited() -> None:
    async def metric(gold: Any, pred: Any, trace: Any, pred_name: Any, pred_trace: Any) -> Any:
        return {"score": 1.0, "feedback": f"on {pred_name}"}

    assert asked(metric, outcome(metric=metric), TwoSteps(), "note") == "on note"


@pytest.mark.parametrize(
    ("metric", "takes"),
    [
        (exact, False),
        (with_names, True),
        (lambda gold, pred, trace, name, own: 1.0, True),
        (lambda *arguments: 1.0, False),
        (lambda example, prediction, trace=None, a=None, b=None: 1.0, False),
    ],
)
def test_which_metrics_have_feedback_on_predictors(metric: Any, takes: bool) -> None:
    assert Metric(metric).takes_predictor is takes
