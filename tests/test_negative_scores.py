"""Metrics with scores below `failure_score`: a failed example never counts more than the student's worst one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dspy
import pytest

from dspy_opro import OPROTeleprompter
from dspy_opro.reporting.recorded import find_runs
from dspy_opro.testing import ScriptedLM

TRAINSET = [
    dspy.Example(question=f"Number {i}?", value=float(i % 9)).with_inputs("question") for i in range(40)
]
BREAKS_THE_FORMAT = "Write some prose about the number."


def answer(call: Any) -> Any:
    if "instruction" in call.output_fields:
        return {"instruction": f"Estimate carefully. {call.sample} {len(call.prompt)}"}
    return "hard to say" if "prose" in call.instructions else {"value": "7.0"}


def minus_distance(example: Any, prediction: Any, trace: Any = None) -> float:
    return -abs(example.value - prediction.value)


@pytest.mark.parametrize("confirm", [True, False])
def test_a_program_that_always_fails_does_not_win(confirm: bool, tmp_path: Path) -> None:
    dspy.configure(lm=ScriptedLM(answer))
    optimizer = OPROTeleprompter(
        metric=minus_distance,
        max_bootstrapped_demos=0,
        num_rounds=2,
        confirm=confirm,
        initial_instructions=[BREAKS_THE_FORMAT],
        log_dir=tmp_path,
    )
    program = optimizer.compile(dspy.Predict("question -> value: float"), trainset=TRAINSET)
    result = program.opro_result
    assert BREAKS_THE_FORMAT not in result.instructions.values()
    broken = next(t for t in result.trials if BREAKS_THE_FORMAT in t.candidate.instructions.values())
    assert broken.num_failures == broken.num_scored
    assert set(broken.scores) == {min(result.baseline.scores)}
    assert program(question="Number 3?").value == 7.0
    # The same without the files that the run wrote at its end.
    (tmp_path / "result.json").unlink(missing_ok=True)
    (run,) = find_runs(str(tmp_path))
    recorded = next(t for t in run.result().trials if t.id == broken.id)
    assert list(recorded.scores) == list(broken.scores)
