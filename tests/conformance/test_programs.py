"""Every program compiles over HTTP, keeps what its modules added to its instructions, and does its job afterwards."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import pytest

from dspy_opro.programs.compat import task_text
from tests.conformance.programs import CASES, QA, Case, Seen, search
from tests.conformance.world import (
    MAGIC,
    TASK,
    VERSION,
    metric,
    scripted,
    served,
    state,
    teleprompter,
    trainset,
)

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is deprecated and will be removed in 3.5:DeprecationWarning"
)


@pytest.fixture(scope="module", autouse=True)
def lm() -> Iterator[dspy.LM]:
    with served() as lm:
        yield lm


@pytest.fixture(autouse=True)
def in_context(lm: dspy.LM) -> Iterator[None]:
    with dspy.context(lm=lm):
        yield


def run(program: Any, case: Case) -> Any:
    inputs = {"question": "What is it?", **case.inputs}
    return asyncio.run(program.acall(**inputs)) if case.is_async else program(**inputs)


def fixed_words(program: Any) -> list[tuple[str, str]]:
    """What modules themselves wrote around the task, per predictor."""
    return [
        (prefix, suffix.lstrip("\n"))
        for prefix, _, suffix in (task_text(program, p) for p in program.predictors())
    ]


@cases
def test_it_compiles_and_does_its_job_better(case: Case, tmp_path: Path) -> None:
    if case.since > VERSION:
        pytest.skip(f"comes with DSPy {case.since[0]}.{case.since[1]}")
    student = case.make()
    before, words = state(student), fixed_words(student)
    data = trainset(**case.inputs)
    best = teleprompter(num_candidates=4).compile(student, trainset=data)

    assert state(student) == before
    assert run(student, case).answer != "42"
    assert run(best, case).answer == "42", best.opro_result.summary()
    assert best.opro_result.best_score == 1.0
    assert [name for name, _ in best.named_predictors()] == [name for name, _ in student.named_predictors()]
    assert fixed_words(best) == words

    best.save(str(tmp_path / "program.json"))
    loaded = case.make()
    loaded.load(str(tmp_path / "program.json"))
    assert run(loaded, case).answer == "42"


@cases
def test_a_second_compile_goes_on_from_the_first(case: Case) -> None:
    if case.since > VERSION:
        pytest.skip(f"comes with DSPy {case.since[0]}.{case.since[1]}")
    student = case.make()
    data = trainset(2, **case.inputs)
    first = teleprompter(num_candidates=4).compile(student, trainset=data)
    second = teleprompter(num_candidates=4, seed=1).compile(first, trainset=data)
    assert second.opro_result.baseline.reward == first.opro_result.best_score
    assert fixed_words(second) == fixed_words(student)
    assert run(second, case).answer == "42"


def test_the_tool_list_of_react_stays_word_for_word() -> None:
    student = dspy.ReAct(QA, tools=[search], max_iters=2)
    best = teleprompter(num_candidates=4).compile(student, trainset=trainset())
    before, after = student.react.signature.instructions, best.react.signature.instructions
    task = best.opro_result.instructions["react"]
    assert before.startswith(TASK)
    assert after == task + before[len(TASK) :]
    assert "(1) search, whose description is <desc>Search the catalogue" in after


@pytest.mark.parametrize(
    "text", ["Be brave.", "Two\n\nparagraphs.", "- a\n  - b\n- c", "# Title\n\n    code\n"]
)
@pytest.mark.parametrize(
    "case", [CASES[n] for n in ("ReAct", "CodeAct", "ProgramOfThought", "Predict", "RLM")]
)
def test_a_written_text_is_read_back(case: Case, text: str) -> None:
    if case.since > VERSION:
        pytest.skip("not there yet")
    from dspy_opro.programs.compat import canonical
    from dspy_opro.programs.program import Program

    student = Program(case.make())
    candidate = student.candidate
    changed = type(candidate)({name: canonical(text) for name in candidate.instructions})
    again = Program(student.build(changed))
    assert dict(again.candidate.instructions) == dict(changed.instructions)


def test_a_run_leaves_the_data_as_it_was() -> None:
    class Chat(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.note, self.reply = dspy.Predict("question -> note"), dspy.Predict(Seen)

        def forward(self, question: str, image: Any, history: Any) -> Any:
            note = self.note(question=question).note
            prediction = self.reply(question=question, image=image, history=history)
            history.messages.append({"question": question, "answer": note})
            return prediction

    def with_feedback(
        gold: Any, pred: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None
    ) -> Any:
        assert gold.history == inputs["history"]
        return dspy.Prediction(score=metric(gold, pred), feedback="Say 42.")

    inputs = CASES["image and history"].inputs
    data = trainset(**copy.deepcopy(dict(inputs)))
    with dspy.context(lm=scripted()):
        teleprompter(metric=with_feedback, max_bootstrapped_demos=2).compile(Chat(), trainset=data)
    assert [example.history for example in data] == [inputs["history"]] * len(data)


def test_frozen_submodules_are_left_alone() -> None:
    student = CASES["frozen submodule"].make()
    best = teleprompter().compile(student, trainset=trainset())
    assert best.frozen.predict.signature.instructions == TASK
    assert MAGIC in best.free.signature.instructions


class Empty(dspy.Module):  # type: ignore[misc]
    def forward(self, question: str) -> Any:
        return dspy.Prediction(answer="42")


def test_a_program_without_predictors_is_an_error() -> None:
    with pytest.raises(ValueError, match="Empty has no predictors to optimize"):
        teleprompter().compile(Empty(), trainset=trainset())


@pytest.mark.skipif(VERSION < (3, 3), reason="dspy.Flex comes with DSPy 3.3")
def test_flex_alone_is_an_error() -> None:
    with pytest.raises(ValueError, match="Flex has no predictors to optimize"):
        teleprompter().compile(dspy.Flex("question -> answer"), trainset=trainset())


def test_a_student_may_be_compiled_already() -> None:
    student = dspy.ChainOfThought(QA)
    student._compiled = True
    best = teleprompter().compile(student, trainset=trainset())
    assert best._compiled
    assert best.opro_result.best_score == 1.0


def test_predictors_keep_their_own_lm(lm: dspy.LM) -> None:
    student = dspy.ChainOfThought(QA)
    own = lm.copy()
    student.set_lm(own)
    best = teleprompter().compile(student, trainset=trainset())
    assert [p.lm for p in student.predictors()] == [own]
    assert [p.lm.model for p in best.predictors()] == [own.model]
    assert best.predictors()[0].lm.kwargs == own.kwargs


def test_predictors_of_the_same_name_are_told_apart() -> None:
    class Keys(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.by_key = {1: dspy.Predict(QA), "1": dspy.Predict("question -> answer")}

        def forward(self, question: str) -> Any:
            self.by_key[1](question=question)
            return self.by_key["1"](question=question)

    best = teleprompter(num_candidates=4).compile(Keys(), trainset=trainset())
    assert len(best.opro_result.instructions) == 2
    assert best(question="?").answer == "42"


def test_evaluate_scripts_work_before_and_after() -> None:
    evaluate = dspy.Evaluate(devset=trainset(), metric=metric, num_threads=2, display_progress=False)
    student = dspy.Predict(QA)
    best = teleprompter().compile(student, trainset=trainset())
    assert float(evaluate(student).score) == 0.0
    assert float(evaluate(best).score) == best.score == 100.0


def test_the_optimizer_lm_is_told_of_images_and_sent_none() -> None:
    case = CASES["image and history"]
    lm = scripted()
    best = teleprompter(prompt_model=lm, num_exemplars=1).compile(
        case.make(), trainset=trainset(**case.inputs)
    )
    assert best.opro_result.problems == ()
    texts = [call.messages[-1][1] for call in lm.calls]
    texts = [text for text in texts if text != "Answer with OK."]  # the test request
    assert texts
    assert all("image: <image>" in text and "base64" not in text for text in texts)
