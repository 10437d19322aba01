"""The script of `before.py` with dspy_opro. `migration.diff` is all that differs."""

from __future__ import annotations

import sys
from pathlib import Path

import dspy

sys.path.insert(0, str(Path(__file__).parent.parent))  # for the other examples

from flags import parse
from quickstart import Judge, is_right, load

from dspy_opro import OPROTeleprompter

flags = parse(__doc__)
optimizer = OPROTeleprompter(
    metric=is_right,
    auto="light",
    max_bootstrapped_demos=0,
    max_labeled_demos=0,
    proposer=flags.proposer,
    num_threads=flags.num_threads,
)
program = optimizer.compile(dspy.Predict(Judge), trainset=load("train"), valset=load("validation"))
program.save("classify.json")
print(f"{program.score:.1f}% with {program.signature.instructions!r}")
