"""A script for MIPROv2. `after.py` is the same script with dspy_opro, and `migration.diff` is all that differs."""

from __future__ import annotations

import sys
from pathlib import Path

import dspy
from dspy.teleprompt import MIPROv2

sys.path.insert(0, str(Path(__file__).parent.parent))  # for the other examples

from flags import parse
from quickstart import Judge, is_right, load

flags = parse(__doc__)
optimizer = MIPROv2(
    metric=is_right,
    auto="light",
    max_bootstrapped_demos=0,
    max_labeled_demos=0,
    num_threads=flags.num_threads,
)
program = optimizer.compile(dspy.Predict(Judge), trainset=load("train")[:40], valset=load("validation")[:20])
program.save("classify.json")
print(f"{program.score:.1f}% with {program.signature.instructions!r}")
