"""The script of `before.py` with dspy_opro. `migration.diff` is all that differs."""

from __future__ import annotations

import sys
from pathlib import Path

import dspy

sys.path.insert(0, str(Path(__file__).parent.parent))  # for the other examples

from flags import parse
from quickstart import Judge, is_right, load

from dspy_opro import OPROTeleprompter

flags = parse(__doc__, max_metric_calls=200)
optimizer = OPROTeleprompter(
    metric=is_right,
    auto="light",
    max_bootstrapped_demos=0,
    max_labeled_demos=0,
    proposer=flags.proposer,
    max_metric_calls=flags.max_metric_calls,
    num_threads=flags.num_threads,
)
program = optimizer.compile(dspy.Predict(Judge), trainset=load("train")[:40], valset=load("validation")[:20])
program.save("classify.json")
print(f"{program.score:.1f}% with {program.signature.instructions!r}")
