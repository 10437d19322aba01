"""`benchmarks/proposals.py` on a scripted language model."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import dspy
import pytest

from tests.test_quality import BUDGET, SIZES, proposer, rows, scorer

ROOT = Path(__file__).parent.parent


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = ("proposals", "quality", "quality_tasks")
    return type("Modules", (), {name: importlib.import_module(name) for name in names})


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["OPRO", "COPRO", "MIPROv2", "GEPA"])
def test_what_an_optimizer_tried_is_scored_on_the_same_examples(modules: Any, optimizer: str) -> None:
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    measured = modules.quality.Measurement(scorer([]), proposer(), None, 2, BUDGET, SIZES)
    task = modules.quality_tasks.labelled("parity", "Answer.", rows())
    row = modules.proposals.measure(measured, task, optimizer, 0, 5)
    student, *others = row["tried"]
    assert student["instructions"] == {"self": "Answer."}
    assert 1 <= len(others) <= 5
    assert len({pair["instructions"]["self"] for pair in row["tried"]}) == len(row["tried"])
    for pair in row["tried"]:
        assert len(pair["scores"]) == sum(SIZES)
        is_right = "parity" in pair["instructions"]["self"]
        assert sum(pair["scores"]) == (len(pair["scores"]) if is_right else pytest.approx(40, abs=8))


def test_the_table_has_the_gains_over_the_student(modules: Any) -> None:
    def pair(*scores: float | None) -> dict[str, Any]:
        return {"instructions": {"self": "x"}, "scores": scores}

    run = {"task": "trec", "optimizer": "OPRO"}
    first = {**run, "tried": [pair(0.0, 1.0), pair(1.0, 1.0), pair(0.0, None)]}
    second = {**run, "tried": [pair(1.0, 1.0), pair(0.0, 1.0)]}
    line = modules.proposals.table([first, second]).splitlines()[-1]
    assert line == "| trec | OPRO | 2 | 3 | -16.7 ± 33.3 | 57.7 | +50.0 | 1 |"
