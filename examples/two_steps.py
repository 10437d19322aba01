"""Question answering in two steps over a small corpus: write a search query, then answer from what was found.

Both predictors get better instructions. The corpus is `data/town.json`: twenty sentences about a town that does not
exist, so no model knows the answers by heart. Run `python examples/two_steps.py --help`.

The metric gives half for a passage that has the answer and half for the answer itself. So the report shows which of the
two steps a candidate made better, and a model that seldom answers right still shows the search a difference.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import dspy
from flags import parse

from dspy_opro import OPROTeleprompter

TOWN = json.loads((Path(__file__).parent / "data" / "town.json").read_text(encoding="utf-8"))
COMMON = {
    "the",
    "of",
    "a",
    "is",
    "in",
    "and",
    "was",
    "which",
    "what",
    "does",
    "on",
    "to",
    "who",
    "how",
    "when",
}


def words(text: str) -> set[str]:
    return {word.rstrip("s") for word in re.findall(r"\w+", text.lower())} - COMMON


def retrieve(query: str, k: int = 1) -> list[str]:
    """The `k` passages that share the most words with the query."""
    return sorted(TOWN["passages"], key=lambda passage: -len(words(passage) & words(query)))[:k]


class TwoSteps(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.search = dspy.Predict("question -> query")
        self.answer = dspy.Predict("passages: list[str], question -> answer")

    def forward(self, question: str) -> dspy.Prediction:
        passages = retrieve(self.search(question=question).query)
        return dspy.Prediction(passages=passages, **self.answer(passages=passages, question=question))


def load() -> tuple[list[dspy.Example], list[dspy.Example]]:
    """Two thirds of the questions for the search, one third to measure."""
    examples = [dspy.Example(question=q, answer=a).with_inputs("question") for q, a in TOWN["questions"]]
    return [e for n, e in enumerate(examples) if n % 3], examples[::3]


def found_and_right(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> dspy.Prediction:
    """Half for the passage, half for the answer. A right answer has the expected words and is short."""
    expected, answer = example.answer.lower(), prediction.answer.lower()
    found = expected in " ".join(prediction.passages).lower()
    right = expected in answer and len(answer.split()) <= 12
    return dspy.Prediction(score=(found + right) / 2, found=float(found), right=float(right))


def main() -> None:
    flags = parse(__doc__, max_metric_calls=60, max_tokens=24)
    train, test = load()
    student = TwoSteps()
    teleprompter = OPROTeleprompter(
        metric=found_and_right,
        proposer=flags.proposer,
        max_metric_calls=flags.max_metric_calls,
        num_threads=flags.num_threads,
        seed=flags.seed,
    )
    program = teleprompter.compile(student, trainset=train)
    print(program.opro_result.summary())
    for name, predictor in program.named_predictors():
        print(f"{name}: {predictor.signature.instructions!r}")
    evaluate = dspy.Evaluate(devset=test, metric=found_and_right, num_threads=flags.num_threads)
    print(f"{len(test)} other questions: {evaluate(student).score:.0f}% -> {evaluate(program).score:.0f}%")


if __name__ == "__main__":
    main()
