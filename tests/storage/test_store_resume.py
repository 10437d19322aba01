"""A resumed run is the uninterrupted one, whenever and however often it was killed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay import PLAN, Killed, drive, in_memory, shown

from dspy_opro.storage.opening import JOURNAL_NAME
from dspy_opro.storage.run_storage import open_run


@settings(max_examples=15)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(0, 9))
def test_a_run_killed_again_and_again_equals_the_uninterrupted_one(kills: list[int], order: int) -> None:
    expected, trials = in_memory()
    storage, num_paid = optuna.storages.InMemoryStorage(), 0
    for number, steps in enumerate([*kills, None]):
        run = open_run(storage, "run", fingerprint={"metric": "m"})
        try:
            driven = drive(run, order=order + number, steps=steps)
        except Killed:
            assert steps is not None
            num_paid += steps
        else:
            num_paid += driven.num_paid
            break
    assert driven.search.trajectory == expected.search.trajectory
    assert shown(run.study) == trials
    assert (driven.usage, num_paid) == (expected.usage, expected.num_paid)  # nothing was paid twice
    again = drive(open_run(storage, "run", fingerprint={"metric": "m"}))
    assert (again.num_paid, again.search.trajectory) == (0, expected.search.trajectory)
    assert again.usage == driven.usage
    assert shown(run.study) == trials


@pytest.mark.parametrize("where", ["journal", "sqlite"])
def test_the_next_process_resumes_from_a_file(tmp_path: Path, where: str) -> None:
    expected, trials = in_memory()
    place: dict[str, Any] = (
        {"log_dir": tmp_path}
        if where == "journal"
        else {"storage": f"sqlite:///{tmp_path}/r.db", "study_name": "r"}
    )
    for steps in (0, 1, 40, None):
        run = open_run(**place)
        try:
            driven = drive(run, steps=steps, order=steps or 0)
        except Killed:
            continue
    assert driven.search.trajectory == expected.search.trajectory
    assert (shown(run.study), driven.usage) == (trials, expected.usage)


def test_a_kill_between_any_two_writes_is_healed(tmp_path: Path) -> None:
    """Every prefix of the journal is what a SIGKILL may leave; the last line may even be torn."""
    plan = replace(PLAN, num_train=6, num_val=2, num_rounds=1, num_candidates=2)
    expected, trials = in_memory(plan=plan)
    drive(open_run(log_dir=tmp_path / "whole"), plan=plan)
    lines = (tmp_path / "whole" / JOURNAL_NAME).read_bytes().splitlines(keepends=True)
    assert len(lines) > 20
    for number, line in enumerate(lines):
        cut = tmp_path / str(number)
        cut.mkdir()
        (cut / JOURNAL_NAME).write_bytes(b"".join(lines[:number]) + line[: len(line) // 2])
        run = open_run(log_dir=cut)
        resumed = drive(run, plan=plan)
        assert resumed.search.trajectory == expected.search.trajectory
        assert (shown(run.study), resumed.usage) == (trials, expected.usage)


def test_told_trials_are_not_told_again_and_their_callbacks_not_called_again(tmp_path: Path) -> None:
    calls: list[int] = []
    callbacks = [lambda study, trial: calls.append(trial.number)]
    for steps in (150, 30, None):
        try:
            driven = drive(open_run(log_dir=tmp_path, callbacks=callbacks), steps=steps)
        except Killed:
            assert calls
    drive(open_run(log_dir=tmp_path, callbacks=callbacks))
    assert calls == list(range(len(driven.search.trajectory)))


def test_more_rounds_than_before_go_on_where_the_run_ended(tmp_path: Path) -> None:
    first = drive(open_run(log_dir=tmp_path), plan=replace(PLAN, num_rounds=1))
    resumed = drive(open_run(log_dir=tmp_path))
    expected, trials = in_memory()
    assert resumed.search.trajectory == expected.search.trajectory
    assert resumed.usage == expected.usage
    assert shown(open_run(log_dir=tmp_path).study) == trials
    assert first.num_paid > 0
    assert resumed.num_paid > 0
