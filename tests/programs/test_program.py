"""A program seen from the search: every candidate is a copy, and nothing but task texts differs in it."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import dspy
import pytest

from dspy_opro.programs.program import (
    Program,
    check_examples,
    describe,
    is_async_only,
    num_inputs,
    same_inputs,
    shorten,
)
from dspy_opro.search.trajectory import Candidate
from dspy_opro.testing import ScriptedLM
from tests.runs import TwoSteps

TOOL = dspy.Tool(
    lambda city: "sunny", name="weather", desc="Weather of a city", args={"city": {"type": "string"}}
)


def student() -> Any:
    program = TwoSteps()
    program.note.demos = [dspy.Example(question="q", note="n")]
    program.answer.lm = ScriptedLM(lambda call: {"answer": "a"})
    return program


def test_the_students_texts_are_candidate_zero() -> None:
    assert dict(Program(student()).candidate.instructions) == {
        "note": "Note what the item is.",
        "answer": "Name the code of the item.",
    }
    assert Program(student()).candidate.round == 0


def test_a_candidate_is_a_copy_with_other_instructions_and_nothing_else() -> None:
    original = student()
    built: Any = Program(original).build(Candidate({"note": "Note.", "answer": "Name the code of the item."}))
    assert built.note.signature.instructions == "Note."
    assert built.answer.signature is original.answer.signature
    assert list(built.note.signature.fields) == ["question", "note"]
    assert [(d.question, d.note) for d in built.note.demos] == [("q", "n")]
    assert built.answer.lm is not None
    assert built.answer.lm.model == original.answer.lm.model
    assert original.note.signature.instructions == "Note what the item is."
    assert [name for name, _ in built.named_predictors()] == ["note", "answer"]
    built.note.demos.append(dspy.Example(question="more", note="more"))
    assert len(original.note.demos) == 1


class Locked(dspy.Module):  # type: ignore[misc]
    """A predictor used twice, beside something that can't be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.first = dspy.Predict("question -> answer")
        self.inside = [self.first, {"lock": threading.Lock()}]


@pytest.mark.parametrize("has_lock", [False, True])
def test_the_history_of_an_lm_is_not_copied_for_every_candidate(has_lock: bool) -> None:
    class Entry(dict):  # type: ignore[type-arg]
        def __deepcopy__(self, memo: Any) -> Any:
            pytest.fail("It may have thousands of entries.")

    student = TwoSteps()
    lm, judge = (ScriptedLM(lambda call: {"note": "n", "answer": "a"}) for _ in range(2))
    student.set_lm(lm)
    student.judge = student.note.judge = judge
    if has_lock:
        student.lock = threading.Lock()
    program = Program(student)
    lm.history.append(Entry())
    judge.history.append(Entry())
    built = program.build(program.candidate)
    assert built.note.lm is built.answer.lm
    assert built.judge is built.note.judge is not judge
    assert built.note.lm is not lm
    assert (built.note.lm.history, len(lm.history)) == (built.judge.history, len(judge.history)) == ([], 1)


def test_a_demo_keeps_a_field_named_base() -> None:
    program = Program(dspy.Predict("base, height -> area"))
    demos = {"self": json.dumps([{"base": "3", "height": "4", "area": "6"}])}
    candidate = replace(program.candidate, demo_set=0, demos=demos)
    assert [dict(demo.items()) for demo in program.build(candidate).demos] == json.loads(demos["self"])


def test_only_what_cannot_be_copied_is_shared_with_a_copy(caplog: pytest.LogCaptureFixture) -> None:
    student = Locked()
    copied = Program(student).build(Candidate({"first": "New."}))
    assert copied.first is copied.inside[0] is not student.first
    assert copied.inside[1]["lock"] is student.inside[1]["lock"]
    assert copied.inside[1] is not student.inside[1]
    assert student.first.signature.instructions != copied.first.signature.instructions == "New."
    assert "deep copy" not in caplog.text  # and nobody is told of it once a candidate


def test_a_tool_that_is_a_method_is_that_of_the_copy() -> None:
    class Client:
        def __init__(self) -> None:
            self.lock = threading.Lock()

        def search(self, query: str) -> str:
            return "found"

    class Team(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.client = Client()
            self.expert = dspy.Predict("question -> answer")
            bound = dspy.Tool(functools.partial(self.ask, question="?"), name="bound", desc="Asks.", args={})
            self.agent = dspy.ReAct("question -> answer", tools=[self.ask, self.client.search, bound])

        def ask(self, question: str) -> Any:
            return self.expert(question=question)

    student = Team()
    copied: Any = Program(student).copy()
    assert copied.agent.tools["ask"].func.__self__ is copied.agent.tools["bound"].func.func.__self__ is copied
    assert copied.agent.tools["search"].func.__self__ is copied.client is student.client


def test_a_program_with_a_deepcopy_of_its_own_is_copied_by_it() -> None:
    class Own(Locked):
        def deepcopy(self) -> Any:
            copied = type(self)()
            copied.marked = True
            return copied

    assert Program(Own()).copy().marked


def test_a_program_that_is_its_own_copy_is_an_error() -> None:
    class Single(Locked):
        def __deepcopy__(self, memo: Any) -> Any:
            return self

    with pytest.raises(
        ValueError, match="Single can't be copied: its copy has other predictors or shares them"
    ):
        Program(Single())


@pytest.mark.parametrize("flag", [True, False, None])
def test_the_own_compiled_flag_is_kept(flag: bool | None) -> None:
    original = student()
    if flag is None:
        vars(original).pop("_compiled", None)
    else:
        original._compiled = flag
    assert Program(original).build(Program(original).candidate)._compiled is bool(flag)


def test_a_frozen_part_is_no_part_of_the_search() -> None:
    class Outer(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.open = TwoSteps(), dspy.Predict("a -> b")
            self.frozen._compiled = True

    program = Program(Outer())
    assert list(program.texts) == ["open"]
    built: Any = program.build(Candidate({"open": "New."}))
    assert built.frozen._compiled is True
    assert built.frozen.note.signature.instructions == "Note what the item is."


def test_signature_classes_that_share_a_text_are_not_mixed_up() -> None:
    """Two predictors of one signature class: each has instructions of its own in the copy."""

    class Shared(dspy.Signature):  # type: ignore[misc]
        """Answer."""

        q: str = dspy.InputField()
        a: str = dspy.OutputField()

    class Pair(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = dspy.Predict(Shared), dspy.Predict(Shared)

    built: Any = Program(Pair()).build(Candidate({"one": "First.", "two": "Answer."}))
    assert (built.one.signature.instructions, built.two.signature.instructions) == ("First.", "Answer.")
    assert Shared.instructions == "Answer."


def test_what_a_module_adds_stays_and_is_named_in_the_role() -> None:
    class Trip(dspy.Signature):  # type: ignore[misc]
        """Plan the trip."""

        city: str = dspy.InputField()
        plan: str = dspy.OutputField()

    program = Program(dspy.ReAct(Trip, tools=[TOOL]))
    part = program.texts["react"]
    assert part.text == "Plan the trip."
    assert "weather" in part.suffix
    assert "The program itself adds these words, which stay:" in part.role
    built: Any = program.build(Candidate({"react": "Plan it well.", "extract.predict": "Sum up."}))
    assert built.react.signature.instructions == f"Plan it well.{part.suffix}"
    assert built.extract.predict.signature.instructions == "Sum up."
    longer: Any = program.build(
        Candidate({"react": "Plan the trip.\n\nBe brief.", "extract.predict": "Sum up."})
    )
    assert Program(longer).texts["react"].text == "Plan the trip.\n\nBe brief."


class Agent(dspy.Module):  # type: ignore[misc]
    """Keeps the user's signature. Its first predictor has it as it is, its second one has rules and an input more."""

    def __init__(self) -> None:
        super().__init__()
        self.signature = dspy.Signature("question -> answer", "Answer.\nBe brief.")
        self.plain = dspy.ChainOfThought(self.signature)
        rules = self.signature.prepend("notes", dspy.InputField(), type_=str)
        self.ruled = dspy.Predict(rules.with_instructions("Be polite.\nAnswer.\nBe brief.\nUse the notes."))


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        (Agent(), {"plain.predict": ("", ""), "ruled": ("Be polite.\n", "\nUse the notes.")}),
        (dspy.ReAct(Agent().signature, tools=[TOOL]), {"extract.predict": ("", "")}),
    ],
)
def test_a_longer_text_is_read_back_whole_where_the_module_adds_nothing(
    student: Any, expected: Mapping[str, tuple[str, str]]
) -> None:
    own = Program(student).texts
    assert {name: (own[name].prefix, own[name].suffix) for name in expected} == expected
    longer = {name: f"{each.text}\nUse no lists." for name, each in own.items()}
    again = Program(Program(student).build(Candidate(longer))).candidate.instructions
    assert all(again[name] == longer[name] for name in expected if expected[name] == ("", ""))


class OnlyAsync(dspy.Module):  # type: ignore[misc]
    async def aforward(self, **inputs: Any) -> Any: ...


class OnlySync(dspy.Module):  # type: ignore[misc]
    def forward(self, **inputs: Any) -> Any: ...


@pytest.mark.parametrize(
    ("module", "expected"),
    [(OnlyAsync(), True), (OnlySync(), False), (dspy.Predict("a -> b"), False), (lambda: None, False)],
)
def test_async_only(module: Any, expected: bool) -> None:
    assert is_async_only(module) is expected


# --- texts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [("short", 5, "short"), ("0123456789", 9, "01 ... 89"), ("", 3, "")],
)
def test_long_texts_are_cut_in_the_middle(text: str, limit: int, expected: str) -> None:
    assert shorten(text, limit) == expected


def test_values_are_named_and_cut() -> None:
    assert describe({"a": 1, "b": "x" * 700}, limit=20).splitlines() == ["a: 1", "b: xxxxxxx ... xxxxxxx"]


# --- data ------------------------------------------------------------------------------------------------


def example(**values: Any) -> Any:
    return dspy.Example(**values).with_inputs("q")


@pytest.mark.parametrize(
    ("examples", "error", "message"),
    [
        ([], ValueError, "trainset must have at least one example, but is empty."),
        ([example(q=1), {"q": 1}], TypeError, r"trainset\[1\] must be a dspy.Example, but is dict."),
        ([("q", "a")], TypeError, r"trainset\[0\] must be a dspy.Example, but is tuple."),
        (
            [example(q=1), dspy.Example(q=1, a=2)],
            ValueError,
            r"trainset\[1\] does not say which fields are inputs: call .with_inputs\(...\) on it.",
        ),
        (
            [example(q=1), dspy.Example(question="?", answer="!").with_inputs("qestion", "q")],
            ValueError,
            r"trainset\[1\] has none of its inputs \['q', 'qestion'\]; its fields are question, answer\.",
        ),
    ],
)
def test_data_that_cannot_be_used(examples: list[Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        check_examples(examples, "trainset")


def test_a_program_without_inputs_and_an_input_that_some_examples_lack_are_fine() -> None:
    check_examples(
        [dspy.Example(a=1).with_inputs(), dspy.Example(q=1).with_inputs("q", "context")], "trainset"
    )


def test_objects_without_a_text_of_their_own_are_different_inputs() -> None:
    class Doc:
        pass

    shared = Doc()
    train = [example(q=Doc()), example(q=[shared]), example(q=[shared]), example(q={"of": Doc})]
    assert num_inputs(train) == 3
    assert same_inputs(train, [example(q=Doc()), example(q=[shared])]) == 1


def test_shared_examples_are_counted_by_their_inputs() -> None:
    train = [example(q=n, a=n) for n in range(3)]
    val = [example(q=1, a="other"), example(q=7, a=7), example(q=2)]
    assert same_inputs(train, val) == 2
