"""Ctrl-C once ends a run gracefully, twice at once; signal handlers are as they were before."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import InMemoryStorage

from dspy_opro.runner.interrupts import interrupts
from tests.runs import TASK, TRAINSET, metric

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX has them")

SCRIPT = """
import asyncio, os, sys, time
import dspy
from dspy_opro import OPRO
from dspy_opro.testing import ScriptedLM, VocabularyTask

way, hangs = sys.argv[1], sys.argv[2] == "hangs"
task, student_size, count = VocabularyTask(seed=1), 4, 0

def answer(call):
    global count
    if "answer" not in call.output_fields:
        return task.proposer(call)
    count += 1
    if count == student_size + 8:
        print("under way", flush=True)
    time.sleep(60 if hangs and count > student_size else 0.02)
    return task.scorer(call)

class Program(dspy.Module):
    def __init__(self):
        super().__init__()
        self.inner = task.student()

    def forward(self, question):
        return self.inner(question=question)

lm = ScriptedLM(answer, keep_calls=False)
optimizer = OPRO(task.metric, prompt_model=lm, task_model=lm, auto=None, num_rounds=100000, num_threads=8,
                 display_progress=False)
given = dict(trainset=task.trainset(student_size))
try:
    if way == "compile":
        program = optimizer.compile(Program(), **given)
    elif way == "acompile":
        program = asyncio.run(optimizer.acompile(Program(), **given))
    else:
        async def notebook():
            return optimizer.compile(Program(), **given)
        program = asyncio.run(notebook())
    result = program.opro_result
    print(result.stop_reason, len(result.trajectory) > 0, flush=True)
except KeyboardInterrupt:
    print("KeyboardInterrupt", flush=True)
"""


@contextmanager
def child(way: str, hangs: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A script that is in the midst of a run."""
    command = [sys.executable, "-c", SCRIPT, way, "hangs" if hangs else ""]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "under way\n", process.communicate()
        yield process
    finally:
        process.kill()
        process.communicate()


def ending(process: subprocess.Popen[str]) -> tuple[str, float]:
    """What it printed last, and how long it took from now."""
    started = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out.strip(), time.monotonic() - started


@pytest.mark.parametrize(
    "way", ["compile", "acompile", pytest.param("compile in a loop", marks=pytest.mark.slow)]
)
def test_ctrl_c_returns_the_best_program(way: str) -> None:
    with child(way) as process:
        process.send_signal(signal.SIGINT)
        assert ending(process)[0] == "interrupted True"


def test_sigterm_is_graceful_too() -> None:
    with child("compile") as process:
        process.send_signal(signal.SIGTERM)
        assert ending(process)[0] == "interrupted True"


@pytest.mark.parametrize("way", ["compile", pytest.param("acompile", marks=pytest.mark.slow)])
def test_ctrl_c_twice_ends_at_once_whatever_hangs(way: str) -> None:
    with child(way, hangs=True) as process:
        process.send_signal(signal.SIGINT)
        time.sleep(0.7)
        assert process.poll() is None  # calls under way are waited for
        process.send_signal(signal.SIGINT)
        out, seconds = ending(process)
        assert out == "KeyboardInterrupt"
        assert seconds < 15


# --- the handlers ----------------------------------------------------------------------------------------


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def current() -> tuple[Any, Any]:
    return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)


@pytest.mark.usefixtures("handlers")
def test_handlers_are_restored() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    before, reasons = current(), []
    with interrupts(reasons.append):
        assert all(new is not old for new, old in zip(current(), before, strict=True))
        signal.raise_signal(signal.SIGINT)
        assert current() == before  # the second one is handled as before
    assert current() == before
    assert reasons == ["interrupted"]
    with pytest.raises(ZeroDivisionError), interrupts(reasons.append):
        _ = 1 / 0
    assert current() == before


@pytest.mark.usefixtures("handlers")
def test_a_log_that_raises_does_not_lose_the_first_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a buffered stream does that is written to while the signal comes."""

    def warning(*_: object) -> None:
        raise RuntimeError("reentrant call")

    reasons: list[str] = []
    monkeypatch.setattr(logging.getLogger("dspy_opro"), "warning", warning)
    with pytest.raises(RuntimeError), interrupts(reasons.append):
        signal.raise_signal(signal.SIGINT)
    assert reasons == ["interrupted"]


@pytest.mark.usefixtures("handlers")
def test_the_second_ctrl_c_is_handled_as_before() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    with interrupts(lambda reason: None):
        signal.raise_signal(signal.SIGINT)
        assert seen == []
        signal.raise_signal(signal.SIGINT)
        assert seen == [signal.SIGINT]


@pytest.mark.usefixtures("handlers")
def test_a_signal_that_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts(lambda reason: pytest.fail("It was ignored on purpose.")):
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("handlers")
def test_runs_within_runs_hand_the_signal_on() -> None:
    """The inner run ends at the first Ctrl-C, the outer one at the second."""
    ended: list[str] = []
    with interrupts(lambda reason: ended.append("outer")):
        with interrupts(lambda reason: ended.append("inner")):
            signal.raise_signal(signal.SIGINT)
            assert ended == ["inner"]
        signal.raise_signal(signal.SIGINT)
        assert ended == ["inner", "outer"]


@pytest.mark.usefixtures("handlers")
def test_runs_of_one_loop_may_end_in_any_order() -> None:
    before, ended = current(), list[str]()
    first, second = (
        interrupts(lambda reason: ended.append("first")),
        interrupts(lambda _: ended.append("second")),
    )
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    signal.raise_signal(signal.SIGINT)
    assert ended == ["second"]
    assert current() == before
    second.__exit__(None, None, None)
    assert current() == before


def test_in_another_thread_signals_are_left_alone() -> None:
    before, seen = current(), []

    def work() -> None:
        with interrupts(lambda reason: None):
            seen.append(current())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


class InterruptedAtTheEnd(InMemoryStorage):
    """Ctrl-C comes so many times while the reason of the end is written."""

    def __init__(self, num_times: int) -> None:
        super().__init__()
        self.num_left = num_times

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        while key == "stop_reason" and self.num_left:
            self.num_left -= 1
            signal.raise_signal(signal.SIGINT)
        super().set_study_user_attr(study_id, key, value)


@pytest.mark.usefixtures("handlers")
def test_ctrl_c_while_a_run_is_closed_loses_neither_the_program_nor_the_next_run(tmp_path: Path) -> None:
    from dspy_opro import OPRO
    from dspy_opro.testing import ScriptedLM

    before = current(), logging.getLogger("dspy_opro").handlers.copy()
    lm = ScriptedLM(lambda call: TASK.scorer(call) if "answer" in call.output_fields else TASK.proposer(call))

    def run(num_times: int) -> str:
        optimizer = OPRO(
            metric, prompt_model=lm, task_model=lm, num_rounds=1, num_candidates=2, display_progress=False
        )
        storage = InterruptedAtTheEnd(num_times)
        given = {"trainset": TRAINSET, "storage": storage, "log_dir": tmp_path}
        return str(optimizer.compile(TASK.student(), **given).opro_result.stop_reason)

    assert run(1) == "num_rounds"
    with pytest.raises(KeyboardInterrupt):
        run(2)
    assert run(0) == "num_rounds"
    assert (current(), logging.getLogger("dspy_opro").handlers) == before


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("how", ["compile", "error"])
def test_compile_leaves_no_handler_behind(how: str) -> None:
    from dspy_opro import OPRO
    from dspy_opro.testing import ScriptedLM

    before = current()
    lm = ScriptedLM(lambda call: TASK.scorer(call) if "answer" in call.output_fields else TASK.proposer(call))
    judge: Any = metric if how == "compile" else lambda e, p: None
    optimizer = OPRO(
        judge, prompt_model=lm, task_model=lm, num_rounds=1, num_candidates=2, display_progress=False
    )
    if how == "compile":
        optimizer.compile(TASK.student(), trainset=TRAINSET)
    else:
        with pytest.raises(TypeError):
            optimizer.compile(TASK.student(), trainset=TRAINSET)
    assert current() == before
