"""A run leaves nothing behind in the process but the program that it returned."""

from __future__ import annotations

import gc
import threading
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import dspy
import pytest
from optuna.storages import BaseStorage
from sqlalchemy.engine import Engine

from dspy_opro import MetricError, OPROTeleprompter
from dspy_opro.testing import ScriptedLM, VocabularyTask

TASK = VocabularyTask(1)
NUM_RUNS = 10


def compile_once(**options: Any) -> None:
    """With LMs of its own, which go with it."""
    proposer, scorer = (ScriptedLM(answer, keep_calls=False) for answer in (TASK.proposer, TASK.scorer))
    sizes = {"num_rounds": 1, "num_candidates": 3, "num_threads": 2, "display_progress": False}
    values = {"metric": TASK.metric, "prompt_model": proposer, "task_model": scorer, **sizes, **options}
    OPROTeleprompter(**values).compile(TASK.student(), trainset=TASK.trainset(8))


def fail(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> float:
    raise RuntimeError("The metric is broken.")


def alive() -> Counter[str]:
    """Objects of this package, database engines, storages and threads, by type."""
    gc.collect()
    kept = [*threading.enumerate()]
    for thing in gc.get_objects():
        kind = type(thing)
        if str(kind.__module__).startswith("dspy_opro.") or issubclass(kind, (Engine, BaseStorage)):
            kept.append(thing)
    return Counter(type(thing).__name__ for thing in kept)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("place", "most"),
    [
        ("memory", 0.03),
        ("journal", 0.03),
        ("error", 0.03),
        # SQLAlchemy keeps the statements that it compiled for each engine, up to 100 for each of Optuna's tables.
        ("sqlite", 0.4),
    ],
)
def test_ten_runs_leave_nothing_behind(place: str, most: float, tmp_path: Path) -> None:
    def once(name: str) -> None:
        if place == "error":
            with pytest.raises(MetricError):
                compile_once(metric=fail)
        elif place == "journal":
            compile_once(log_dir=tmp_path / name)
        else:
            compile_once(storage=f"sqlite:///{tmp_path / name}.db" if place == "sqlite" else None)

    with dspy.context(disable_history=True):  # DSPy keeps the last 10,000 calls
        for run in range(3):
            once(f"first-{run}")
        before = alive()
        tracemalloc.start()
        try:
            for run in range(NUM_RUNS):
                once(f"later-{run}")
            end = time.monotonic() + 20.0  # the last run's threads end a little later than the run
            while (left := alive() - before) and time.monotonic() < end:
                time.sleep(0.1)
            grown = tracemalloc.get_traced_memory()[0] / NUM_RUNS / 1e6
        finally:
            tracemalloc.stop()
    assert left == Counter()
    assert grown < most  # MB a run
