"""A ReAct agent with two tools. OPRO rewrites its task text; the words that ReAct adds about the tools stay.

The agent looks up prices and adds numbers. Run `python examples/react_agent.py --help`.

A small model calls tools in the right form, because a JSON schema holds it to that. Use a larger model for the right
arguments.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import dspy
from flags import parse

from dspy_opro import OPROTeleprompter

PRICES = {"lamp": 30, "chair": 45, "desk": 120, "shelf": 60, "clock": 25, "mirror": 80}


def price(item: str) -> str:
    """The price of one item in dollars."""
    return str(PRICES.get(item.strip().lower(), "unknown item"))


def add(numbers: list[float]) -> str:
    """The sum of some numbers."""
    return f"{sum(numbers):g}"


def agent() -> dspy.ReAct:
    return dspy.ReAct("question -> answer", tools=[price, add], max_iters=4)


def load() -> tuple[list[dspy.Example], list[dspy.Example]]:
    """Questions about one item, and about two."""
    one = [(f"How much is the {item}?", cost) for item, cost in PRICES.items()]
    two = [
        (f"How much are a {a} and a {b} together?", PRICES[a] + PRICES[b])
        for a, b in itertools.combinations(PRICES, 2)
    ]
    examples = [dspy.Example(question=q, answer=str(a)).with_inputs("question") for q, a in one + two]
    return examples[::2], examples[1::2]


def is_right(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> dict[str, Any]:
    numbers = re.findall(r"\d+", str(prediction.answer))
    right = numbers == [example.answer]
    return {"score": right, "feedback": "" if right else f"The only number must be {example.answer}."}


def main() -> None:
    flags = parse(__doc__, max_metric_calls=40)
    train, test = load()
    teleprompter = OPROTeleprompter(
        metric=is_right,
        proposer=flags.proposer,
        max_metric_calls=flags.max_metric_calls,
        max_train_examples=6 if flags.is_embedded else None,
        num_threads=flags.num_threads,
        seed=flags.seed,
    )
    program = teleprompter.compile(agent(), trainset=train)
    print(program.opro_result.summary())
    for name, text in program.opro_result.instructions.items():
        print(f"{name}: {text!r}")
    question = test[-1].question
    print(f"{question} {program(question=question).answer}")


if __name__ == "__main__":
    main()
