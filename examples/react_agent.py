"""A ReAct agent with two tools. OPRO rewrites its task text; the words that ReAct adds about the tools stay.

The agent looks up prices and adds numbers. Run `python examples/react_agent.py --help`.

ReAct leaves the arguments of tools open, and then no schema holds the answers of a small model. `SmallAgentAdapter`
gives it one, and asks for no thoughts. With it SmolLM2 calls tools in the right form, and gets questions about one
item. Which tool it calls, and with what, is up to the model.
"""

from __future__ import annotations

import itertools
import re
from typing import Any, Literal

import dspy
from flags import parse
from pydantic import BaseModel

from dspy_opro import OPROTeleprompter

PRICES = {"lamp": 30, "chair": 45, "desk": 120, "shelf": 60, "clock": 25, "mirror": 80}


def price(item: str) -> str:
    """The price of one item in dollars."""
    return str(PRICES.get(item.strip().lower(), "unknown item"))


def add(numbers: list[float]) -> str:
    """The sum of some numbers."""
    return f"{sum(numbers):g}"


class Arguments(BaseModel):
    """Those of all tools."""

    item: Literal["lamp", "chair", "desk", "shelf", "clock", "mirror"]
    numbers: list[int]


ARGUMENTS = {"price": ["item"], "add": ["numbers"], "finish": []}
"""Tool -> its arguments."""


class SmallAgentAdapter(dspy.JSONAdapter):
    """A ReAct agent's requests for a small model: no thoughts, and tool arguments with a schema."""

    def __call__(
        self, lm: Any, lm_kwargs: dict[str, Any], signature: Any, demos: list[Any], inputs: dict[str, Any]
    ) -> list[dict[str, Any]]:
        thoughts = {"next_thought", "reasoning"} & set(signature.output_fields)
        for name in thoughts:
            signature = signature.delete(name)
        if "next_tool_args" in signature.output_fields:
            signature = signature.with_updated_fields("next_tool_args", type_=Arguments)
        answers = super().__call__(lm, lm_kwargs, signature, demos, inputs)
        for answer in answers:
            answer.update(dict.fromkeys(thoughts, ""))
            if "next_tool_args" in answer:
                names = ARGUMENTS[answer["next_tool_name"]]
                answer["next_tool_args"] = {name: getattr(answer["next_tool_args"], name) for name in names}
        return answers


def agent(max_iters: int = 4) -> dspy.ReAct:
    return dspy.ReAct("question -> answer", tools=[price, add], max_iters=max_iters)


def load(with_pairs: bool = True) -> tuple[list[dspy.Example], list[dspy.Example]]:
    """Questions about one item, and about two: every other one for the search."""
    forms = ("How much is the {}?", "What does a {} cost?")
    asked = [(form.format(item), cost) for item, cost in PRICES.items() for form in forms]
    pairs = itertools.combinations(PRICES, 2) if with_pairs else ()
    asked += [(f"How much are a {a} and a {b} together?", PRICES[a] + PRICES[b]) for a, b in pairs]
    examples = [dspy.Example(question=q, answer=str(a)).with_inputs("question") for q, a in asked]
    return examples[::2], examples[1::2]


def is_right(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> dict[str, Any]:
    right = set(re.findall(r"\d+", str(prediction.answer))) == {example.answer}
    return {"score": right, "feedback": "" if right else f"The only number must be {example.answer}."}


def main() -> None:
    flags = parse(__doc__, max_metric_calls=40, max_tokens=48)
    if flags.is_embedded:
        dspy.configure(adapter=SmallAgentAdapter())
    train, test = load(with_pairs=not flags.is_embedded)
    teleprompter = OPROTeleprompter(
        metric=is_right,
        proposer=flags.proposer,
        max_metric_calls=flags.max_metric_calls,
        num_threads=flags.num_threads,
        seed=flags.seed,
    )
    program = teleprompter.compile(agent(max_iters=2 if flags.is_embedded else 4), trainset=train)
    print(program.opro_result.summary())
    for name, text in program.opro_result.instructions.items():
        print(f"{name}: {text!r}")
    question = test[-1].question
    print(f"{question} {program(question=question).answer}")


if __name__ == "__main__":
    main()
