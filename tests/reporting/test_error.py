"""A run that an error ends says which, in the result, on the page and in `run.log`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dspy_opro import OPRO, OPROResult
from dspy_opro.testing import LMCall, ScriptedLM
from tests.runs import TASK, TRAINSET, is_proposal, metric, propose


def answer(call: LMCall) -> Any:
    return propose(call) if is_proposal(call) else TASK.scorer(call)


def stop_working(state: Any) -> None:
    raise RuntimeError("the disk with my table is full")


def test_the_error_is_named_wherever_people_look(tmp_path: Path) -> None:
    lm = ScriptedLM(answer)
    optimizer = OPRO(metric, prompt_model=lm, task_model=lm, log_dir=tmp_path, stoppers=[stop_working])
    with pytest.raises(RuntimeError, match="the disk with my table is full") as caught:
        optimizer.compile(TASK.student(), trainset=TRAINSET)
    result = caught.value.program.opro_result  # type: ignore[attr-defined]
    told = "RuntimeError: the disk with my table is full"
    assert (result.stop_reason, result.error) == ("error", told)
    assert f"the error that ended the run: {told}" in result.summary()
    assert OPROResult.load(tmp_path / "result.json").error == told
    assert told in (tmp_path / "report.html").read_text()
    assert f"ended: error: {told}" in (tmp_path / "run.log").read_text()
