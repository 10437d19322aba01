from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest

from dspy_opro.storage.fingerprint import fingerprint

STUDENT = dspy.Predict("question -> answer")


def exact(example: Any, prediction: Any) -> bool:
    return bool(example.answer == prediction.answer)


def lenient(example: Any, prediction: Any) -> bool:
    return True


def above(threshold: float) -> Callable[..., float]:
    return lambda example, prediction: float(prediction.value > threshold)


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


class Inherited(Judge):
    """Counts where its parent does."""


class JudgeModule(dspy.Module):
    def __init__(self, instructions: str) -> None:
        super().__init__()
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
    ],
)
def test_another_metric_is_told_by_what_it_holds(one: Any, other: Any) -> None:
    assert of(one) != of(other)


@pytest.mark.parametrize("make", [lambda: above(0.5), lambda: Judge(0.5), lambda: JudgeModule("Be fair.")])
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
