"""A proposer of your own that asks no LM: it puts sentences from a list together.

Each proposal is the best instruction so far with one sentence added, dropped or replaced. The choice depends on
`request.seed` alone, so that a resumed run makes the same proposals. docs/guides/custom.md has one that asks an LM.
Run `python examples/custom_proposer.py --help`.
"""

from __future__ import annotations

import random

import dspy
from flags import parse
from quickstart import Judge, is_right, load

from dspy_opro import OPROTeleprompter, ProposalRequest

SENTENCES = [
    "Say whether the review is good or bad.",
    "Answer bad if the writer complains about anything.",
    "Answer good only if the writer is pleased.",
    "Look at the end of the review.",
    "Praise that is meant as a joke is bad.",
    "Decide if the writer would buy it again.",
    "Broken, late, cold, rude or dirty means bad.",
    "Think of the words for feelings.",
]


class Sentences(dspy.Module):
    def forward(self, request: ProposalRequest) -> dspy.Prediction:
        (name,) = request.predictors
        generator = random.Random(request.seed)
        chosen = [sentence for sentence in SENTENCES if sentence in request.current[name]]
        others = [sentence for sentence in SENTENCES if sentence not in chosen]
        if len(chosen) > 1 and (not others or generator.random() < 0.5):
            chosen.remove(generator.choice(chosen))
        if others:
            chosen.append(generator.choice(others))
        return dspy.Prediction(instruction=" ".join(chosen))


def main() -> None:
    flags = parse(__doc__, max_metric_calls=160)
    teleprompter = OPROTeleprompter(
        metric=is_right,
        proposer=Sentences(),
        auto=None,
        max_metric_calls=flags.max_metric_calls,
        num_threads=flags.num_threads,
        seed=flags.seed,
    )
    program = teleprompter.compile(dspy.Predict(Judge), trainset=load("train"))
    print(program.opro_result.summary())
    print(f"instruction: {program.signature.instructions!r}")


if __name__ == "__main__":
    main()
