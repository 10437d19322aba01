from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy
import pytest

from dspy_opro.storage.fingerprint import differences, fingerprint

STUDENT = dspy.Predict("question -> answer")


def exact(example: Any, prediction: Any) -> bool:
    return bool(example.answer == prediction.answer)


def lenient(example: Any, prediction: Any) -> bool:
    return True


def above(threshold: float) -> Callable[..., float]:
    return lambda example, prediction: float(prediction.value > threshold)


def above_by_keyword(threshold: float) -> Callable[..., float]:
    def metric(example: Any, prediction: Any, *, least: float = threshold) -> float:
        return float(prediction.value > least)

    return metric


def counting() -> tuple[Callable[..., float], list[int]]:
    seen: list[int] = []
    calls = 0

    def metric(example: Any, prediction: Any) -> float:
        nonlocal calls
        calls += 1
        seen.append(calls)
        return 1.0

    return metric, seen


class Judge:
    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.calls = 0

    def __call__(self, example: Any, prediction: Any) -> float:
        self.calls += 1
        return float(prediction.value > self.threshold)

    def method(self, example: Any, prediction: Any) -> float:
        return self(example, prediction)


@dataclass
class Limit:
    threshold: float

    def __post_init__(self) -> None:
        self.threshold = float(self.threshold)

    def method(self, example: Any, prediction: Any) -> float:
        return float(prediction.value > self.threshold)


class Inherited(Judge):
    """Counts where its parent does."""


class JudgeModule(dspy.Module):
    def __init__(self, instructions: str, threshold: float = 0.5) -> None:
        super().__init__()
        self.threshold = threshold
        self.judge = dspy.Predict(dspy.Signature("answer -> good: bool", instructions))


def of(metric: Any) -> str:
    return fingerprint(STUDENT, [], [], metric)["metric"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (exact, lenient),
        (functools.partial(exact), functools.partial(lenient)),
        (functools.partial(functools.partial(exact)), functools.partial(functools.partial(lenient))),
        (functools.partial(max, default=1), functools.partial(max, default=2)),
        (above(0.5), above(0.6)),
        (functools.partial(above(0.5)), functools.partial(above(0.6))),
        (Judge(0.5), Judge(0.6)),
        (Judge(0.5).method, Judge(0.6).method),
        (JudgeModule("Be fair."), JudgeModule("Be harsh.")),
        (JudgeModule("Be fair.", 0.5), JudgeModule("Be fair.", 0.6)),
        (above_by_keyword(0.5), above_by_keyword(0.6)),
        (Limit(0.5).method, Limit(0.6).method),
    ],
)
def test_another_metric_is_told_by_what_it_holds(one: Any, other: Any) -> None:
    assert of(one) != of(other)


@pytest.mark.parametrize(
    "make",
    [
        lambda: above(0.5),
        lambda: Judge(0.5),
        lambda: JudgeModule("Be fair."),
        lambda: functools.partial(exact, judge=type("Judge", (), {"__doc__": str(time.time())})),
    ],
)
def test_the_same_metric_made_again_is_the_same(make: Callable[[], Any]) -> None:
    assert of(make()) == of(make())


def test_what_a_metric_counts_is_no_part_of_it() -> None:
    metric, _ = counting()
    judge = Inherited(0.5)
    before = of(metric), of(judge)
    metric(None, None)
    judge(None, dspy.Prediction(value=1))
    assert (of(metric), of(judge)) == before


@pytest.mark.parametrize("value", [{(0, 0): "X"}, {None: 1, "a": 2}, {"a", "b"}, object(), exact])
def test_any_value_can_stand_in_an_example(value: Any) -> None:
    data = [dspy.Example(question=value, answer="42").with_inputs("question")]
    assert fingerprint(STUDENT, data, [], exact) == fingerprint(STUDENT, [*data], [], exact)


def test_a_dataset_loaded_anew_is_the_same() -> None:
    def data(uuid: str) -> list[Any]:
        return [dspy.Example(question="?", answer="42", dspy_uuid=uuid).with_inputs("question")]

    assert fingerprint(STUDENT, data("a"), [], exact) == fingerprint(STUDENT, data("b"), [], exact)


def test_it_is_the_same_in_every_process() -> None:
    program = (
        "import dspy\n"
        "from dspy_opro.storage.fingerprint import fingerprint\n"
        "class C: pass\n"
        "data = [dspy.Example(q={'alpha', 'beta', 'gamma'}, c=C(), f=print, g=lambda: 0).with_inputs('q')]\n"
        "print(fingerprint(dspy.Predict('q -> a'), data, [], lambda e, p: 1))\n"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(texts) == 1


def example(answer: str) -> Any:
    return dspy.Example(question="?", answer=answer).with_inputs("question")


DATA = [example("1"), example("2")]
SETTINGS = {"temperature": 0.0, "max_tokens": 4000}  # what DSPy 3.0 takes where it is given none
LM = dspy.LM("openai/gpt", api_base="http://one/v1", api_key="sk-secret", **SETTINGS)


def with_lm(lm: Any) -> Any:
    student = dspy.Predict("question -> answer")
    student.set_lm(lm)
    return student


def at_most(length: int) -> Any:
    fields = {"question": dspy.InputField(), "answer": dspy.OutputField(max_length=length)}
    instructions = STUDENT.signature.instructions
    return dspy.Predict(dspy.Signature({n: (str, field) for n, field in fields.items()}, instructions))


def parts_of(**changes: Any) -> dict[str, Any]:
    values = {
        "student": STUDENT,
        "trainset": DATA,
        "valset": [],
        "metric": exact,
        "task_model": LM,
        "seed": 0,
    }
    return fingerprint(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"student": with_lm(LM)},
            "LM of predictor 'self' was none and is now openai/gpt",
        ),
        (
            {"student": dspy.Predict(dspy.Signature("question -> answer", "Be brief."))},
            "`question`, produce the fields `answer`.' and is now 'Be brief.'",
        ),
        ({"student": dspy.Predict("question, hint -> answer")}, "predictor 'self'"),
        (
            {"student": dspy.Predict("question -> answer: Literal['yes', 'no']")},
            """type of 'answer' of predictor 'self' was '{"type": "string"}' and is now '{"enum": ["yes", "no"],""",
        ),
        ({"student": dspy.Predict("question -> answer: int")}, 'is now \'{"type": "integer"}\''),
        ({"student": dspy.Predict("question -> answer: dspy.Tool")}, "types.tool.Tool'>"),
        ({"student": at_most(10)}, 'is now \'{"type": "string"} maximum length: 10\''),
        ({"trainset": [*DATA, *DATA]}, "trainset had 2 examples and now has 4 examples"),
        ({"trainset": DATA[::-1]}, "trainset has as many examples as before, but others or in another order"),
        ({"trainset": DATA[::-1], "seed": 1}, "seed was '0' and is now '1'"),
        ({"metric": lenient}, f"metric was '{__name__}.exact' and is now '{__name__}.lenient'"),
        (
            {"task_model": dspy.LM("openai/gpt", api_base="http://me:pass@two/v1", **SETTINGS)},
            "task_model was 'openai/gpt at http://one/v1, SETTINGS' and is now 'openai/gpt at http://me:***@two/v1, "
            "SETTINGS'".replace("SETTINGS", "temperature=0.0, max_tokens=4000"),
        ),
    ],
)
def test_a_difference_is_said_in_words(changes: Any, words: str) -> None:
    found = list(differences(parts_of(), parts_of(**changes)))
    assert words in found[0]
    assert len(found) == 1 or "fields" in words or "hint" in str(found)
    assert "sk-secret" not in str(parts_of(**changes))


def test_a_number_that_is_none_is_the_same_as_before() -> None:
    student = JudgeModule("Be fair.", math.nan)
    before = json.loads(json.dumps(parts_of(student=student)))
    assert list(differences(before, parts_of(student=student))) == []


def test_an_input_that_becomes_an_output_is_another_signature() -> None:
    one, other = (parts_of(student=dspy.Predict(text)) for text in ("a, b -> c", "a -> b, c"))
    assert any(text.startswith("signature of predictor 'self'") for text in differences(one, other))


def test_the_adapter_is_part_of_it() -> None:
    before = parts_of()
    with dspy.context(adapter=dspy.TwoStepAdapter(dspy.LM("openai/one"))):
        one = parts_of()
    with dspy.context(adapter=dspy.TwoStepAdapter(dspy.LM("openai/other"))):
        assert "adapter was 'TwoStepAdapter" in next(differences(one, parts_of()))
    with dspy.context(adapter=dspy.JSONAdapter()):
        assert "adapter was 'default' and is now 'JSONAdapter" in next(differences(before, parts_of()))


def test_other_values_in_the_same_metric_are_said_to_be_that() -> None:
    (words,) = differences(parts_of(metric=Judge(0.5)), parts_of(metric=Judge(0.6)))
    assert words == f"metric {__name__}.Judge now holds other values"
