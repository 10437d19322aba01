"""The programs that people have, one function each; a test compiles every one of them."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Optional

import dspy
import pydantic

from tests.conformance.world import TASK, with_interpreter

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
# As long as a real one: what a meta-prompt cuts in the middle is no image any more.
IMAGE = "data:image/png;base64," + base64.b64encode(base64.b64decode(PIXEL) + bytes(3000)).decode()


class QA(dspy.Signature):  # type: ignore[misc]
    question: str = dspy.InputField()
    answer: str = dspy.OutputField()


QA = QA.with_instructions(TASK)


class Person(pydantic.BaseModel):
    name: str
    age: int


class Typed(dspy.Signature):  # type: ignore[misc]
    """Read the record."""

    question: str = dspy.InputField()
    answer: str = dspy.OutputField()
    label: Literal["good", "bad"] = dspy.OutputField()
    items: list[str] = dspy.OutputField()
    person: Person = dspy.OutputField()
    maybe: Optional[int] = dspy.OutputField()  # noqa: UP045 - as people write it


class Seen(dspy.Signature):  # type: ignore[misc]
    """Look and answer."""

    question: str = dspy.InputField()
    image: dspy.Image = dspy.InputField()
    history: dspy.History = dspy.InputField()
    answer: str = dspy.OutputField()


def search(query: str) -> str:
    """Search the catalogue for a product."""
    return f"found {query}"


def calculate(expression: str) -> str:
    """Evaluate an arithmetic expression."""
    return expression


class Nested(dspy.Module):  # type: ignore[misc]
    """Predictors in a list, in a dict, used twice, two levels deep."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = [dspy.ChainOfThought(QA), dspy.Predict(QA)]
        self.by_name = {"a": dspy.Predict(QA)}
        self.twice = self.steps[1]

    def forward(self, question: str) -> Any:
        for step in (*self.steps, self.by_name["a"], self.twice):
            prediction = step(question=question)
        return prediction


class Frozen(dspy.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.frozen = dspy.ChainOfThought(QA)
        self.frozen._compiled = True
        self.free = dspy.Predict(QA)

    def forward(self, question: str) -> Any:
        self.frozen(question=question)
        return self.free(question=question)


class Uncopyable(dspy.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.predict = dspy.Predict(QA)
        self.lock = threading.Lock()

    def forward(self, question: str) -> Any:
        with self.lock:
            return self.predict(question=question)


class Agent(dspy.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.predict = dspy.Predict(QA)
        self.client = threading.Lock()

    def forward(self, question: str) -> Any:
        return self.predict(question=question)


class UncopyableInside(dspy.Module):  # type: ignore[misc]
    """Locks deep inside, beside predictors in a list and a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.agents = [Agent(), threading.Lock()]
        self.by_name = {"last": dspy.Predict(QA), "lock": threading.Lock()}

    def forward(self, question: str) -> Any:
        self.agents[0](question=question)
        return self.by_name["last"](question=question)


class AsyncOnly(dspy.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.predict = dspy.Predict(QA)

    async def aforward(self, question: str) -> Any:
        return await self.predict.acall(question=question)


class Dynamic(dspy.Module):  # type: ignore[misc]
    """Makes its signature anew for every call, out of its predictor's."""

    def __init__(self) -> None:
        super().__init__()
        self.predict = dspy.Predict(QA)

    def forward(self, question: str) -> Any:
        signature = self.predict.signature.append("reasoning", dspy.OutputField(), type_=str)
        return self.predict(question=question, signature=signature)


class Compare(dspy.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.propose = dspy.ChainOfThought(QA)
        self.compare = dspy.MultiChainComparison(QA, M=2)

    def forward(self, question: str) -> Any:
        completions = [self.propose(question=question) for _ in range(2)]
        return self.compare(completions, question=question)


class Parallel(dspy.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.predict = dspy.Predict(QA)

    def forward(self, question: str) -> Any:
        pairs = [(self.predict, dspy.Example(question=question).with_inputs("question")) for _ in range(2)]
        return dspy.Parallel(num_threads=2, disable_progress_bar=True)(pairs)[0]


def reward(args: Mapping[str, Any], prediction: Any) -> float:
    return float(prediction.answer == "42")


@dataclass(frozen=True)
class Case:
    """A program, and what must hold of it."""

    make: Callable[[], Any]
    since: tuple[int, int] = (3, 0)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Inputs beside the question."""
    is_async: bool = False


CASES: Mapping[str, Case] = {
    "Predict": Case(lambda: dspy.Predict(QA)),
    "Predict of a string": Case(lambda: dspy.Predict("question -> answer")),
    "ChainOfThought": Case(lambda: dspy.ChainOfThought(QA)),
    "ReAct": Case(lambda: dspy.ReAct(QA, tools=[search, calculate], max_iters=2)),
    "ReActV2": Case(lambda: dspy.ReActV2(QA, tools=[search, calculate], max_iters=2), since=(3, 3)),
    "ProgramOfThought": Case(lambda: with_interpreter(dspy.ProgramOfThought, QA)),
    "CodeAct": Case(lambda: with_interpreter(dspy.CodeAct, QA, tools=[search], max_iters=2)),
    "RLM": Case(lambda: with_interpreter(dspy.RLM, QA), since=(3, 1)),
    "MultiChainComparison": Case(Compare),
    "BestOfN": Case(lambda: dspy.BestOfN(dspy.ChainOfThought(QA), N=2, reward_fn=reward, threshold=1.0)),
    "Refine": Case(lambda: dspy.Refine(dspy.Predict(QA), N=2, reward_fn=reward, threshold=1.0)),
    "lists and dicts": Case(Nested),
    "frozen submodule": Case(Frozen),
    "typed outputs": Case(lambda: dspy.Predict(Typed)),
    "image and history": Case(
        lambda: dspy.Predict(Seen),
        inputs={
            "image": dspy.Image(url=IMAGE),
            "history": dspy.History(messages=[{"question": "x", "answer": "y"}]),
        },
    ),
    "dynamic signature": Case(Dynamic),
    "uncopyable member": Case(Uncopyable),
    "uncopyable members inside": Case(UncopyableInside),
    "aforward alone": Case(AsyncOnly, is_async=True),
    "dspy.Parallel": Case(Parallel),
}
