"""One small world for all conformance tests: a model that does well once it is told to be precise."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import dspy

from dspy_opro import OPROTeleprompter
from dspy_opro.testing import LMCall, ScriptedLM, SimulatedServer
from tests.runs import is_proposal

VERSION = tuple(int(part) for part in dspy.__version__.split(".")[:2])
MAGIC = "Be precise."
TASK = "Answer the customer's question.\n\nMind {product}."


def answer(call: LMCall) -> str | Mapping[str, Any]:
    """Every field that a module of DSPy may ask for; right once the instructions say so."""
    if is_proposal(call):
        steps = call.inputs.get("role", "")
        number = next(_numbers)
        text = f"{MAGIC} Mind {{product}}. Variant {number}."
        return {"instruction": text if "steps" not in steps else {"self": text}}
    # The second step of TwoStepAdapter reads the first one's answer.
    is_right = "42" in call.inputs["text"] if "text" in call.inputs else MAGIC in call.prompt
    result = "42" if is_right else "unsure"
    values = {
        "answer": result,
        "next_tool_name": "finish",
        "next_tool_args": {},
        "tool_calls": {"tool_calls": [{"name": "submit", "args": {"answer": result}}]},
        "code": f"```python\nSUBMIT(answer={result!r})\n```",
        "generated_code": f"```python\nSUBMIT(answer={result!r})\n```",
        "finished": True,
        "label": "good" if is_right else "bad",
        "items": [result],
        "person": {"name": result, "age": 3},
        "maybe": 42 if is_right else None,
    }
    if not call.output_fields:  # TwoStepAdapter asks for free text
        return f"answer: {result}"
    return {name: values.get(name, "because") for name in call.output_fields}


_numbers: Iterator[int] = itertools.count()


def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
    return bool(prediction.answer == example.answer)


def trainset(count: int = 4, **inputs: Any) -> list[Any]:
    """Examples with a question each and what else the program takes."""
    names = ("question", *inputs)
    return [
        dspy.Example(question=f"What is {n}?", answer="42", **inputs).with_inputs(*names)
        for n in range(count)
    ]


def teleprompter(**changes: Any) -> OPROTeleprompter:
    """A short run."""
    values: dict[str, Any] = {
        "num_rounds": 1,
        "num_candidates": 2,
        "num_threads": 4,
        "display_progress": False,
    }
    values["confirm"] = False  # of so few examples none can be held back, and hardly any gain is proven
    return OPROTeleprompter(**{"metric": metric, **values, **changes})


@contextmanager
def served(**kwargs: Any) -> Iterator[dspy.LM]:
    """A real `dspy.LM` over HTTP, as DSPy's default."""
    with SimulatedServer(answer, own_process=False) as server:
        lm = server.lm("world", **kwargs)
        with dspy.context(lm=lm):
            yield lm


def scripted(**kwargs: Any) -> ScriptedLM:
    return ScriptedLM(answer, **kwargs)


class FakeInterpreter:
    """Runs nothing: it submits what the code says."""

    def __init__(self) -> None:
        self.tools: dict[str, Callable[..., Any]] = {}
        self.output_fields: list[Any] = []
        self._tools_registered = True

    def start(self) -> None: ...

    def shutdown(self) -> None: ...

    def __call__(self, code: str, variables: Any = None) -> Any:
        return self.execute(code, variables)

    def execute(self, code: str, variables: Any = None) -> Any:
        _, marker, rest = code.rpartition("SUBMIT(answer=")
        if not marker or "def " in code:
            return ""
        values = {"answer": rest.split(")")[0].strip("'\"")}
        if VERSION == (3, 0):
            return values
        from dspy.primitives.code_interpreter import FinalOutput

        return FinalOutput(values)


def with_interpreter(kind: Any, *args: Any, **kwargs: Any) -> Any:
    """A module that runs code, by the keyword of this DSPy."""
    if VERSION >= (3, 3):
        return kind(*args, interpreter_factory=FakeInterpreter, **kwargs)
    return kind(*args, interpreter=FakeInterpreter(), **kwargs)


def state(program: Any) -> str:
    """What a program is, for comparisons."""
    return json.dumps(program.dump_state(), sort_keys=True, default=str)
