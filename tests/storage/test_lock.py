"""Locks and forked children: a child that lives longer than the run, or than the process, holds nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dspy_opro.storage.lock import FileLock, is_locked

FORKING = """
import multiprocessing, os, signal, sys, time
import dspy
from dspy_opro import OPROTeleprompter
from dspy_opro.testing import ScriptedLM, VocabularyTask

task, pools = VocabularyTask(3), []

def metric(example, prediction, trace=None):
    if len(pools) < 8 * number:
        pools.append(multiprocessing.get_context("fork").Pool(1))
        pools[-1].apply_async(time.sleep, (600,))
    if number == kill_in and len(pools) >= 8 * number:
        os.kill(os.getpid(), signal.SIGKILL)
    return task.metric(example, prediction, trace)

def compile_(log_dir):
    arguments = dict(auto=None, num_rounds=2, num_candidates=4, num_threads=8, display_progress=False)
    program = OPROTeleprompter(
        metric, prompt_model=ScriptedLM(task.proposer), task_model=ScriptedLM(task.scorer), log_dir=log_dir, **arguments
    ).compile(task.student(), trainset=task.trainset(24))
    assert program.opro_result.stop_reason == "num_rounds"

kill_in, log_dir = int(sys.argv[1]), sys.argv[2]
for number in range(1, 6):
    compile_(f"{log_dir}/{number}")
    compile_(f"{log_dir}/{number}")  # again in the same directory, while the children live
print("all ended", flush=True)
os._exit(0)
"""
"""Five runs whose metric starts eight process pools each, all of which live to the end."""


def run(code: str, *arguments: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        stdout=pipe,
        text=True,
        start_new_session=True,
    )


def kill_all(process: subprocess.Popen[str]) -> None:
    """The process and its children."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_children_that_a_metric_forks_hang_neither_this_compile_nor_the_next(tmp_path: Path) -> None:
    process = run(FORKING, "0", str(tmp_path))
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "all ended\n"
    finally:
        kill_all(process)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_children_of_a_killed_process_do_not_hold_its_directory(tmp_path: Path) -> None:
    killed = run(FORKING, "1", str(tmp_path))
    try:
        assert killed.wait(200) == -signal.SIGKILL
        alive = subprocess.run(["pgrep", "-g", str(killed.pid)], capture_output=True, text=True, check=True)
        assert len(alive.stdout.split()) >= 8
        going_on = run(FORKING, "0", str(tmp_path))
        assert going_on.stdout is not None
        try:
            assert going_on.stdout.readline() == "all ended\n"
        finally:
            kill_all(going_on)
    finally:
        kill_all(killed)


def test_a_lock_is_waited_for_no_longer_than_said(tmp_path: Path) -> None:
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    first.acquire(0.0)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"lock has been locked for 0\.2 seconds"):
        second.acquire(0.2)
    assert 0.2 <= time.monotonic() - started < 5.0
    first.release()
    second.acquire(0.0)
    second.release()
    second.release()  # once more does nothing


def test_a_forked_child_that_releases_does_not_free_the_parents_lock(tmp_path: Path) -> None:
    lock, other = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    lock.acquire(0.0)
    child = os.fork()
    if child == 0:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(TimeoutError):
        other.acquire(0.0)
    lock.release()


def test_a_lock_can_be_probed_without_the_right_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lock = tmp_path / "lock", FileLock(tmp_path / "lock")
    assert is_locked(path) is None
    lock.acquire(0.0)
    assert is_locked(path) is True
    lock.release()
    assert is_locked(path) is False
    monkeypatch.setattr(
        "fcntl.flock", lambda descriptor, how: (_ for _ in ()).throw(OSError("no locks here"))
    )
    assert is_locked(path) is None
