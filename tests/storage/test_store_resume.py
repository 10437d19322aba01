"""A resumed run is the uninterrupted one, whenever and however often it was killed."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay import PLAN, STUDENT, Killed, drive, in_memory, load, score, shown

from dspy_opro.search.trajectory import Usage
from dspy_opro.study import OptunaStore
from dspy_opro.storage.result_log import TEXT_LIMIT
from dspy_opro.storage.opening import JOURNAL_NAME, PART_SIZE
from dspy_opro.search.trajectory import Outcome, Trajectory
from dspy_opro.search.tasks import TaskResult, ProposalTask, ScoringTask, Proposal, View

BLOCK = ScoringTask(STUDENT, 0, "train", 0, 8)


def ask(slot: int = 0) -> ProposalTask:
    return ProposalTask(1, slot, 0, ("answer",), View(Trajectory(), STUDENT, ()))


@settings(max_examples=15)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(0, 9))
def test_a_run_killed_again_and_again_equals_the_uninterrupted_one(kills: list[int], order: int) -> None:
    expected, trials, used = in_memory()
    storage, num_paid = optuna.storages.InMemoryStorage(), 0
    for number, steps in enumerate([*kills, None]):
        store = OptunaStore(storage, "run", fingerprint={"metric": "m"})
        try:
            search, paid = drive(store, order=order + number, steps=steps)
        except Killed:
            assert steps is not None
            num_paid += steps
        else:
            num_paid += paid
            break
    assert search.trajectory == expected.trajectory
    assert shown(store.study) == trials
    assert store.used == used  # nothing was paid twice
    again, paid = drive(OptunaStore(storage, "run", fingerprint={"metric": "m"}))
    assert (paid, again.trajectory) == (0, expected.trajectory)
    assert shown(store.study) == trials


@pytest.mark.parametrize("where", ["journal", "sqlite"])
def test_the_next_process_resumes_from_a_file(tmp_path: Path, where: str) -> None:
    expected, trials, used = in_memory()
    place = (
        {"log_dir": tmp_path}
        if where == "journal"
        else {"storage": f"sqlite:///{tmp_path}/r.db", "study_name": "r"}
    )
    for steps in (0, 1, 15, None):
        store = OptunaStore(**place)  # type: ignore[arg-type]
        try:
            search, _ = drive(store, steps=steps, order=steps or 0)
        except Killed:
            continue
    assert search.trajectory == expected.trajectory
    assert (shown(store.study), store.used) == (trials, used)


def test_a_kill_between_any_two_writes_is_healed(tmp_path: Path) -> None:
    """Every prefix of the journal is what a SIGKILL may leave; the last line may even be torn."""
    plan = type(PLAN)(num_train=6, num_val=2, num_rounds=1, num_candidates=2, block_size=4)
    search, trials, used = in_memory(plan=plan)
    drive(OptunaStore(log_dir=tmp_path / "whole"), plan=plan)
    lines = (tmp_path / "whole" / JOURNAL_NAME).read_bytes().splitlines(keepends=True)
    assert len(lines) > 20
    for number, line in enumerate(lines):
        cut = tmp_path / str(number)
        cut.mkdir()
        (cut / JOURNAL_NAME).write_bytes(b"".join(lines[:number]) + line[: len(line) // 2])
        store = OptunaStore(log_dir=cut)
        resumed, _ = drive(store, plan=plan)
        assert resumed.trajectory == search.trajectory
        assert (shown(store.study), store.used) == (trials, used)


def test_told_trials_are_not_told_again_and_their_callbacks_not_called_again(tmp_path: Path) -> None:
    calls: list[int] = []
    callbacks = [lambda study, trial: calls.append(trial.number)]
    for steps in (10, 20, None):
        try:
            search, _ = drive(OptunaStore(log_dir=tmp_path, callbacks=callbacks), steps=steps)
        except Killed:
            continue
    drive(OptunaStore(log_dir=tmp_path, callbacks=callbacks))
    assert sorted(calls) == list(range(len(search.trajectory)))


def test_more_rounds_than_before_go_on_where_the_run_ended(tmp_path: Path) -> None:
    short = type(PLAN)(num_train=40, num_val=10, num_rounds=1, num_candidates=5, block_size=8)
    _, first = drive(OptunaStore(log_dir=tmp_path), plan=short)
    resumed, second = drive(OptunaStore(log_dir=tmp_path))
    expected, trials, _ = in_memory()
    assert resumed.trajectory == expected.trajectory
    assert shown(OptunaStore(log_dir=tmp_path).study) == trials
    assert first > 0
    assert second > 0


def test_blocks_of_another_size_are_put_together(tmp_path: Path) -> None:
    store = OptunaStore(log_dir=tmp_path)
    for start in range(0, 8, 4):
        block = ScoringTask(STUDENT, 0, "train", start, start + 4)
        store.record([TaskResult(block, *score(block))])
    store = OptunaStore(log_dir=tmp_path)
    assert load(store).recall(BLOCK) == TaskResult(BLOCK, *score(BLOCK))
    assert store.recall(ScoringTask(STUDENT, 0, "train", 2, 6)) is not None
    assert store.recall(ScoringTask(STUDENT, 0, "train", 4, 12)) is None
    assert store.recall(ScoringTask(STUDENT, 0, "val", 0, 4)) is None


def test_answers_come_back_equal(tmp_path: Path) -> None:
    proposal = Proposal(
        {"answer": "x" * 3 * PART_SIZE, "other": '"\\\u2028\x00 字'}, ("too long",), "Timeout: 3"
    )
    outcomes = (
        Outcome(0.1 + 0.2, "a", "b", None, {"f1": 1 / 3}),
        Outcome(float("-inf")),
        Outcome(1, error="E"),
    )
    spent = Usage(metric_calls=3, cost=0.1 + 0.2)
    store = OptunaStore(log_dir=tmp_path)
    answers = [
        TaskResult(ask(), proposal, spent, 1.5),
        TaskResult(ScoringTask(STUDENT, 0, "val", 0, 3), outcomes, spent, 2.5),
    ]
    store.record(answers)
    store = load(OptunaStore(log_dir=tmp_path))
    assert [store.recall(answer.work) for answer in answers] == answers
    assert store.recall(ask(slot=1)) is None
    assert store.used == spent + spent


def test_no_attribute_outgrows_a_database_column(tmp_path: Path) -> None:
    store = OptunaStore(log_dir=tmp_path)
    worst = [Outcome(0.0, "😀" * 5000, '"' * 5000, "\\" * 5000) for _ in range(64)]
    block = ScoringTask(STUDENT, 0, "train", 0, 64)
    store.record([TaskResult(block, tuple(worst), Usage())])
    entries = optuna.load_study(study_name="opro/log", storage=store.study._storage).get_trials()
    sizes = [len(json.dumps(value)) for entry in entries for value in entry.user_attrs.values()]
    assert max(sizes) < 65_535
    recalled = load(OptunaStore(log_dir=tmp_path)).recall(block)
    assert all(len(outcome.output) == TEXT_LIMIT for outcome in recalled.content)
