"""The paper's section 3.1: a language model as the optimizer of a linear regression.

A candidate is no instruction here but a solution, the text "w=15, b=14". The program answers with that solution
and calls no LM. The trainset has the points, and the metric gives minus the squared error. So the optimizer LM sees
solutions with their scores in ascending order, as in the paper's Figure 19, and writes better ones. Everything else is
the search as it is: racing on the points, deduplication, patience.

What it shows: the trajectory alone can drive an optimization. A strong model follows the trend in the pairs. The
paper's Table 2 says how many steps that takes; a solution far away takes more. A small model continues the list with
pairs like the last ones, so that it soon repeats itself. docs/examples.md has what SmolLM2 did. Run
`python examples/linear_regression.py --help`.
"""

from __future__ import annotations

import random
import re
from typing import Any

import dspy
from flags import parse

from dspy_opro import OPROTeleprompter, ProposalRequest

TRUE_W, TRUE_B = 15, 14
SOLUTION = re.compile(r"w\s*=\s*(-?\d+)\D+?b\s*=\s*(-?\d+)")


class Line(dspy.Module):
    """Answers with the solution in its own instructions."""

    def __init__(self, w: int, b: int) -> None:
        super().__init__()
        self.solution = dspy.Predict(dspy.Signature("x -> y", f"w={w}, b={b}"))

    def forward(self, x: float) -> dspy.Prediction:
        match = SOLUTION.search(self.solution.signature.instructions)
        if match is None:
            raise ValueError("The text has no solution of the form w=15, b=14.")
        w, b = map(int, match.groups())
        return dspy.Prediction(y=w * x + b)


def minus_squared_error(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> float:
    return -float((example.y - prediction.y) ** 2)


class NextPair(dspy.Module):
    """Asks the LM to continue the list of scored solutions. A model of any kind can do that."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        """Parameters of the LM."""

    def forward(self, request: ProposalRequest) -> dspy.Prediction:
        scored = [pair for pair in request.scored_instructions["solution"] if pair[1] is not None]
        lines = [f"{text} -> score {score}" for text, score in scored]
        prompt = (
            "You help to find whole numbers w and b. Below are pairs (w, b) with their scores from 0 to 100, in "
            "ascending order. Higher is better. Write a new pair with a higher score, in the same form.\n\n"
            + "\n".join([*lines, "w="])
        )
        (answer,) = dspy.settings.lm.copy(**self.options)(prompt)
        text = answer if isinstance(answer, str) else answer["text"]
        match = SOLUTION.search(text if "w" in text.partition("b")[0] else f"w={text}")
        return dspy.Prediction(instruction=f"w={match[1]}, b={match[2]}" if match else "")


def load(seed: int) -> list[dspy.Example]:
    """50 points of the true line with standard normal noise, as in the paper."""
    generator = random.Random(seed)
    points = [generator.uniform(0, 1) for _ in range(50)]
    return [dspy.Example(x=x, y=TRUE_W * x + TRUE_B + generator.gauss(0, 1)).with_inputs("x") for x in points]


def main() -> None:
    flags = parse(__doc__, max_metric_calls=5000)
    generator = random.Random(flags.seed)
    start = Line(generator.randint(10, 20), generator.randint(10, 20))
    teleprompter = OPROTeleprompter(
        metric=minus_squared_error,
        proposer=NextPair(**flags.one_line(max_tokens=16)),
        num_rounds=8,
        lag=0,  # every proposal sees all earlier scores, as in the paper
        max_metric_calls=flags.max_metric_calls,
        failure_score=-1000.0,
        num_threads=flags.num_threads,
        confirm=False,  # the points are the problem; there is nothing to generalise to
        seed=flags.seed,
    )
    program = teleprompter.compile(start, trainset=load(flags.seed))
    result = program.opro_result
    print(result.summary())
    print(f"true: w={TRUE_W}, b={TRUE_B}; start: {start.solution.signature.instructions}; "
          f"found: {program.solution.signature.instructions}")  # fmt: skip
    print(f"{len(result.trajectory) - 1} different pairs in {result.usage.proposer_calls} proposals")


if __name__ == "__main__":
    main()
