"""What the calls of single predictors are worth in the meta-prompt: `python benchmarks/predictor_traces.py --help`.

One rule: the program and all settings are the same. In one half of the runs the exemplars lose the calls of the
predictors before the proposer sees them. The program's own output is the same for every cause of a wrong answer.
"""

from __future__ import annotations

import argparse
import logging
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import dspy
from rows import Column, Row, keep, table

from dspy_opro import OPROTeleprompter
from dspy_opro.proposers.opro import OPROProposer
from dspy_opro.testing import LMCall, ScriptedLM

NUM_RULES, NUM_NEEDED, NUM_TRAIN, NUM_TEST = 40, 8, 40, 200
COLUMNS: tuple[Column, ...] = (
    ("student", "student", "{:.3f}".format),
    ("score", "score ±", "{:.3f}".format),
    ("calls", "examples scored", "{:.0f}".format),
)


@dataclass(frozen=True)
class Tickets:
    """The first predictor reads a ticket right if its instruction names the rule that the ticket needs.

    If the rule is missing, its output says which one, and the second predictor answers "unknown". The optimizer LM adds
    up to three rules to the best instruction: those that it reads in the examples, or else rules that it guesses.
    """

    seed: int

    def needed(self, ticket: str) -> str:
        rules = random.Random(self.seed).sample(range(NUM_RULES), NUM_NEEDED)
        return f"rule-{random.Random(f'{self.seed}/{ticket}').choice(rules)}"

    def examples(self, kind: str, count: int) -> list[dspy.Example]:
        tickets = (f"{kind}-{number}" for number in range(count))
        return [
            dspy.Example(ticket=each, team=f"team of {self.needed(each)}").with_inputs("ticket")
            for each in tickets
        ]

    def scorer(self, call: LMCall) -> Mapping[str, str]:
        if "reading" not in call.output_fields:
            reading = call.inputs["reading"]
            return {"team": f"team of {reading}" if reading.startswith("rule") else "unknown"}
        rule = self.needed(call.inputs["ticket"])
        known = re.findall(r"rule-\d+", call.instructions)
        return {"reading": rule if rule in known else f"unclear without {rule}"}

    def proposer(self, call: LMCall) -> Mapping[str, str]:
        draws = random.Random(f"{self.seed}/{call.rollout_id}")
        best = call.inputs["scored_instructions"].split("text:\n")[-1].partition("\nscore:")[0]
        seen = sorted(set(re.findall(r"unclear without (rule-\d+)", call.inputs["examples"])))
        new = seen[:3] or [f"rule-{draws.randrange(NUM_RULES)}" for _ in range(3)]
        text = f"Mind {' and '.join(new)}."
        return {"instruction": text if "sentences to add" in call.inputs["request"] else f"{best} {text}"}


class Desk(dspy.Module):  # type: ignore[misc]
    """Reads a ticket, then names a team."""

    def __init__(self) -> None:
        super().__init__()
        self.read = dspy.Predict(dspy.Signature("ticket -> reading", "Read the ticket."))
        self.assign = dspy.Predict(dspy.Signature("reading -> team", "Name the team."))

    def forward(self, ticket: str) -> Any:
        return self.assign(reading=self.read(ticket=ticket).reading)


class WithoutCalls(OPROProposer):
    """The default proposer, without what the exemplars show of single predictors."""

    def forward(self, request: Any) -> Any:
        exemplars = [replace(exemplar, calls={}, feedback={}) for exemplar in request.exemplars]
        return super().forward(replace(request, exemplars=exemplars))


def exact(example: Any, prediction: Any, trace: Any = None) -> float:
    """1.0 for the right team."""
    return float(example.team == prediction.team)


def run(seed: int, shows_calls: bool, max_metric_calls: int) -> dict[str, Any]:
    """One run as a row. The scores are those on tickets that the run never saw."""
    task = Tickets(seed)
    teleprompter = OPROTeleprompter(
        exact,
        prompt_model=ScriptedLM(task.proposer, keep_calls=False),
        proposer=None if shows_calls else WithoutCalls(),
        auto=None,
        max_metric_calls=max_metric_calls,
        seed=seed,
        num_threads=4,
        display_progress=False,
    )
    test = task.examples("test", NUM_TEST)

    def score(program: Any) -> float:
        return sum(exact(example, program(**example.inputs())) for example in test) / len(test)

    with dspy.context(lm=ScriptedLM(task.scorer, keep_calls=False)):
        student = Desk()
        program = teleprompter.compile(student, trainset=task.examples("train", NUM_TRAIN))
        row = {
            "student": score(student),
            "score": score(program),
            "calls": program.opro_result.usage.metric_calls,
        }
    return {**row, "seed": seed, "exemplars": "with calls" if shows_calls else "without"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(100, 116)))
    parser.add_argument("--max-metric-calls", type=int, default=640)
    parser.add_argument("--keep", metavar="FILE", help="append every run to this file, as JSON lines")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    rows: list[Row] = []
    for shows_calls in (True, False):
        for seed in args.seeds:
            rows.append(run(seed, shows_calls, args.max_metric_calls))
            keep(args.keep, rows[-1])
    print(table(rows, ["exemplars"], COLUMNS))


if __name__ == "__main__":
    main()
