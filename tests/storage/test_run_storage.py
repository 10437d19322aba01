"""A run in an Optuna study: what is there to read, and that a resumed run is the uninterrupted one."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState, create_trial
from replay import STUDENT, drive, expected, in_memory, known, perform, record, scoring, shown

from dspy_opro.search.tasks import CandidatesProposed, Failure, TrialFinished, TrialReported
from dspy_opro.search.trajectory import Candidate, Trial, Usage
from dspy_opro.storage import outage
from dspy_opro.storage.result_log import TEXT_LIMIT
from dspy_opro.storage.run_storage import RESUMABLE, RunStorage, open_run

# -- what a study shows ------------------------------------------------------------------------------


def test_trials_come_in_the_order_of_their_candidates_with_all_that_is_known() -> None:
    run = open_run()
    driven = drive(run)
    trials, trajectory = run.study.get_trials(), driven.search.trajectory
    assert driven.num_paid > 20
    assert [t.user_attrs["candidate_id"] for t in trials] == [t.id for t in trajectory.trials]
    for trial, ours in zip(trials, trajectory.trials, strict=True):
        assert trial.user_attrs["instructions"] == ours.candidate.instructions
        assert trial.user_attrs["round"] == ours.candidate.round
        assert trial.user_attrs["parent"] == ours.candidate.parent
        assert trial.user_attrs["rewritten"] == list(ours.candidate.rewritten)
        assert trial.user_attrs["num_scored"] == ours.num_scored
        assert trial.user_attrs["reason"] == ours.reason
        assert trial.user_attrs.get("valset_score") == ours.valset_score
        assert trial.user_attrs.get("num_failures", 0) == ours.num_failures
        assert Usage(**trial.user_attrs["usage"]) == ours.usage
        assert trial.user_attrs["usage"]["metric_calls"] >= ours.num_scored
        assert trial.user_attrs["subscores"] == ours.subscores
        assert 0 < trial.user_attrs["subscores"]["length"] < 1
        assert trial.state.name == ours.state.upper()
        assert trial.value == ours.reward  # that of a pruned trial too, not its last report
    assert {t.state for t in trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert run.study.best_value == trajectory.incumbent.reward
    assert run.study.direction.name == "MAXIMIZE"
    assert run.study.user_attrs["stop_reason"] == "num_rounds"
    spent = sum((Usage(**t.user_attrs["usage"]) for t in trials), Usage())
    assert spent == replace(
        driven.usage, proposer_calls=0, prompt_tokens=0
    )  # a trial's usage is what scoring it cost


def test_the_first_failures_are_shown_with_place_and_cause() -> None:
    run = open_run()
    failures = tuple(Failure(STUDENT.id, "train", n, f"E{n}" + "x" * 2 * TEXT_LIMIT) for n in range(5))
    run.trial_writer.show(CandidatesProposed(0, (STUDENT,), ()))
    run.trial_writer.show(TrialFinished(Trial(STUDENT, 0.0, 8, num_failures=8), failures))
    attrs = run.study.get_trials()[0].user_attrs
    assert attrs["num_failures"] == 8
    assert [(f["split"], f["position"], f["cause"][:2]) for f in attrs["failures"]] == [
        ("train", n, f"E{n}") for n in range(5)
    ]
    assert all(len(f["cause"]) <= TEXT_LIMIT for f in attrs["failures"])


def test_whatever_order_answers_arrive_in_the_study_is_the_same() -> None:
    first, trials = in_memory(order=0)
    assert any("failures" in attrs for _, _, _, attrs, _ in trials)
    for order in range(1, 6):
        driven, others = in_memory(order=order)
        assert (others, driven.usage) == (trials, first.usage)


def test_callbacks_get_study_and_told_trial(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[tuple[str, int, TrialState]] = []

    def failing(study: optuna.Study, trial: Any) -> None:
        raise RuntimeError("the plot is broken")

    def noting(study: optuna.Study, trial: Any) -> None:
        calls.append((study.study_name, trial.number, trial.state))

    run = open_run(callbacks=[failing, noting])
    with caplog.at_level(logging.WARNING, logger="dspy_opro"):
        drive(run)
    trials = run.study.get_trials()
    assert calls == [(run.study.study_name, t.number, t.state) for t in trials]
    assert "A callback failed on trial 0" in caplog.text


def test_a_callback_may_stop_the_study_as_in_optuna() -> None:
    run = open_run(callbacks=[MaxTrialsCallback(3, states=None)])
    run.trial_writer.show(CandidatesProposed(0, (STUDENT,), ()))
    run.trial_writer.show(TrialFinished(Trial(STUDENT, 0.5, 8)))
    assert not run.study.is_stopped
    others = tuple(Candidate({"answer": text}) for text in "ab")
    run.trial_writer.show(CandidatesProposed(1, others, ()))
    for candidate in others:
        run.trial_writer.show(TrialFinished(Trial(candidate, 0.5, 8)))
    assert run.study.is_stopped


def test_trials_are_told_in_the_order_of_their_numbers() -> None:
    """Callbacks that log by the number, as that of Weights & Biases, drop what comes later with a lower one."""
    calls: list[int] = []
    run = open_run(callbacks=[lambda study, trial: calls.append(trial.number)])
    candidates = tuple(Candidate({"answer": text}) for text in "abc")
    run.trial_writer.show(CandidatesProposed(1, candidates, ()))
    for candidate in candidates[::-1]:
        assert calls == []
        run.trial_writer.show(TrialFinished(Trial(candidate, 0.5, 8)))
    assert calls == [0, 1, 2]


def test_texts_longer_than_a_database_column_are_cut_and_say_so() -> None:
    run = open_run()
    run.trial_writer.show(CandidatesProposed(0, (Candidate({"a": "字" * 20_000, "b": "short"}),), ()))
    attrs = run.study.get_trials()[0].user_attrs
    assert attrs["is_cut"]
    assert len(json.dumps(attrs["instructions"])) < 65_535
    assert attrs["instructions"]["b"] == "short"


def test_a_storage_works_again_only_when_all_can_be_written(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outage, "PATIENCE_SECONDS", 0.0)
    storage = optuna.storages.InMemoryStorage()
    run = open_run(storage, "qa")
    optuna.delete_study(study_name="qa", storage=storage)
    for number in range(3):
        run.trial_writer.show(CandidatesProposed(number, (STUDENT,), ()))
        record(run, *scoring(1))
    assert run.outage.is_under_way
    assert not run.outage.is_lost  # all results are kept
    assert [text.partition(";")[0] for text in caplog.messages] == ["The storage fails"]


def test_a_storage_that_works_again_at_the_end_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = optuna.storages.InMemoryStorage()
    run = open_run(storage)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "create_new_trial", raise_away)
        run.trial_writer.show(CandidatesProposed(0, (STUDENT,), ()))
        record(run, *scoring(1))
    assert run.outage.is_under_way
    run.close("num_rounds")
    assert not run.outage.is_under_way
    assert [re.split("[;.]", text)[0] for text in caplog.messages] == [
        "The storage fails",
        "The storage works again",
    ]
    assert [trial.user_attrs["candidate_id"] for trial in run.study.get_trials()] == [STUDENT.id]


def raise_away(*_: Any, **__: Any) -> int:
    raise ConnectionError("the storage is away")


# -- ends --------------------------------------------------------------------------------------------


def half_done(**place: Any) -> RunStorage:
    run = open_run(**place)
    run.trial_writer.show(CandidatesProposed(0, (STUDENT,), ()))
    record(run, *scoring(8))
    run.trial_writer.show(TrialReported(STUDENT, 8, 0.5))
    return run


@pytest.mark.parametrize("reason", sorted(RESUMABLE))
def test_trials_under_way_wait_for_the_next_process_where_it_may_go_on(tmp_path: Path, reason: str) -> None:
    half_done(log_dir=tmp_path).close(reason)
    run = open_run(log_dir=tmp_path)
    assert known(run) == expected(*scoring(8))
    run.trial_writer.show(CandidatesProposed(0, (STUDENT,), ()))
    run.trial_writer.show(TrialReported(STUDENT, 8, 0.5))
    run.trial_writer.show(TrialFinished(Trial(STUDENT, 0.5, 8)))
    assert [(t.state, t.intermediate_values) for t in run.study.get_trials()] == [
        (TrialState.COMPLETE, {8: 0.5})
    ]


@pytest.mark.parametrize("reason", ["patience", "num_rounds", "no_new_proposals", "own stopper"])
def test_trials_under_way_are_closed_when_the_run_has_ended(tmp_path: Path, reason: str) -> None:
    half_done(log_dir=tmp_path).close(reason)
    run = open_run(log_dir=tmp_path)
    (trial,) = run.study.get_trials()
    assert (trial.state, trial.user_attrs["reason"]) == (TrialState.FAIL, f"the run ended: {reason}")
    assert known(run) == expected(*scoring(8))  # its results still count
    run.trial_writer.show(CandidatesProposed(0, (STUDENT,), ()))
    run.trial_writer.show(TrialFinished(Trial(STUDENT, 0.5, 8)))
    assert [t.state for t in run.study.get_trials()] == [TrialState.FAIL, TrialState.COMPLETE]


def test_in_memory_nothing_stays_under_way() -> None:
    run = half_done()
    run.close("interrupted")
    assert run.study.get_trials()[0].state == TrialState.FAIL


# -- whose study it is -------------------------------------------------------------------------------


def test_a_mismatch_names_what_differs_and_the_remedy(tmp_path: Path) -> None:
    parts = {"student": "a1", "metric": "my.metric", "seed": "0"}
    record(open_run(log_dir=tmp_path, fingerprint=parts), *scoring(1))
    open_run(log_dir=tmp_path, fingerprint=parts)
    with pytest.raises(ValueError, match="different run") as caught:
        open_run(log_dir=tmp_path, fingerprint={"student": "b2", "metric": "my.metric", "valset": "v"})
    message = str(caught.value)
    assert "student was 'a1' and is now 'b2'" in message
    assert "seed was '0' and is now None" in message
    assert "valset was None and is now 'v'" in message
    assert "my.metric" not in message
    assert "Use another study_name or log_dir, or delete the studies 'opro' and 'opro/log'." in message


def test_a_run_without_a_result_may_still_become_another(tmp_path: Path) -> None:
    """A metric that did not get past the first example is mended and tried again in the same place."""
    for metric in ("broken", "better", "good"):
        run = open_run(log_dir=tmp_path, fingerprint={"metric": metric})
        assert run.has_no_results
        assert run.study.user_attrs["fingerprint"]["metric"] == metric
    record(run, *scoring(1))
    assert not open_run(log_dir=tmp_path, fingerprint={"metric": "good"}).has_no_results
    with pytest.raises(ValueError, match="metric was 'good' and is now 'broken'"):
        open_run(log_dir=tmp_path, fingerprint={"metric": "broken"})


def test_the_fingerprint_of_a_large_program_fits_into_a_database_column() -> None:
    parts = {"metric": "exact", "predictors": {f"step{n}": {"instructions": "x" * 100} for n in range(500)}}
    study = open_run(optuna.storages.InMemoryStorage(), "qa", fingerprint=parts).study
    assert len(json.dumps(study.user_attrs["fingerprint"])) < 65_535
    assert study.user_attrs["fingerprint"]["metric"] == "exact"


def test_a_log_of_an_older_version_is_refused() -> None:
    storage = optuna.storages.InMemoryStorage()
    open_run(storage, "old")
    optuna.delete_study(study_name="old/log", storage=storage)
    log = optuna.create_study(study_name="old/log", storage=storage)
    older = {"kind": "fingerprint", "parts": {"format": "2"}}
    log.add_trial(create_trial(state=TrialState.PRUNED, user_attrs={"records": [older], "entry": "a#0"}))
    with pytest.raises(
        ValueError, match=r"'old' holds a different run: format was '2 or older', which .* and is now '4'"
    ):
        open_run(storage, "old")


def test_a_deleted_study_is_shown_anew_from_its_log(tmp_path: Path) -> None:
    drive(open_run(log_dir=tmp_path))
    run = open_run(log_dir=tmp_path)
    optuna.delete_study(study_name="opro", storage=run.study._storage)
    run = open_run(log_dir=tmp_path)
    assert drive(run).num_paid == 0
    assert shown(run.study) == in_memory()[1]


def test_somebody_elses_study_is_refused() -> None:
    storage = optuna.storages.InMemoryStorage()
    optuna.create_study(storage=storage, study_name="theirs", direction="maximize").add_trial(
        optuna.trial.create_trial(value=1.0)
    )
    with pytest.raises(ValueError, match="'theirs' has trials that were not made by dspy_opro"):
        open_run(storage, "theirs")
    optuna.create_study(storage=storage, study_name="down", direction="minimize")
    with pytest.raises(ValueError, match="'down' must be maximized"):
        open_run(storage, "down")


def test_an_empty_study_made_beforehand_is_taken() -> None:
    storage = optuna.storages.InMemoryStorage()
    made = optuna.create_study(storage=storage, study_name="mine", direction="maximize")
    drive(open_run(storage, "mine"))
    assert shown(made) == in_memory()[1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"study_name": "s"}, "s"),
        ({"log_dir": "qa"}, "opro"),
        ({"log_dir": "qa", "study_name": "s"}, "s"),
        ({"log_dir": "qa", "storage": "sqlite:///r.db"}, "qa"),
    ],
)
def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any, expected: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_run(**arguments).study.study_name == expected


# -- the returned trial ------------------------------------------------------------------------------


def test_the_study_marks_the_returned_trial(tmp_path: Path) -> None:
    run = open_run(log_dir=tmp_path)
    driven = drive(run)
    returned = driven.search.trajectory.trials[0]
    run.close("num_rounds", returned)
    study = open_run(log_dir=tmp_path).study
    assert study.user_attrs["returned_trial"] == 0
    assert study.get_trials()[0].user_attrs["candidate_id"] == returned.id
    notes = study._storage.get_study_system_attrs(study._study_id)
    assert notes["dashboard:note_str:0"].startswith(
        '**Trial 0 is the one that the run returned.** The "best trial"'
    )
    of_trial = notes[f"dashboard:{study.get_trials()[0]._trial_id}:note_str:0"]
    assert of_trial.startswith("**The run returned this trial.**")
    assert "Say it." in of_trial


def test_the_note_of_a_dropped_candidate_calls_its_reward_an_estimate(tmp_path: Path) -> None:
    run = open_run(log_dir=tmp_path)
    trials = drive(run).search.trajectory.trials
    run.close("num_rounds", trials[0])
    notes = run.study._storage.get_study_system_attrs(run.study._study_id)
    for frozen, trial in zip(run.study.get_trials(), trials, strict=True):
        is_marked = "- estimated reward" in notes[f"dashboard:{frozen._trial_id}:note_str:0"]
        assert is_marked == (trial.state != "complete")


# -- processes that did not end ----------------------------------------------------------------------


def test_what_killed_processes_may_have_paid_is_estimated(tmp_path: Path) -> None:
    """Two processes of four threads are killed, a third one ends: eight examples may be lost, at the mean cost."""
    spent = 0.0
    for start in (0, 4):
        run = open_run(log_dir=tmp_path, num_threads=4)
        record(run, *scoring(start + 4, start))
        spent += sum(perform(task).usage.cost for task in scoring(start + 4, start))
    run = open_run(log_dir=tmp_path, num_threads=4)
    lost = run.lost_usage()
    assert lost.metric_calls == 8
    assert lost.cost == pytest.approx(8 * spent / 8)
    assert (lost.scorer_calls, lost.unpriced_calls) == (8, 0)
    run.close("interrupted")
    assert open_run(log_dir=tmp_path).lost_usage().metric_calls == 8  # what is lost stays lost


def test_a_study_that_another_process_has_open_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    storage = optuna.storages.InMemoryStorage()
    first = open_run(storage, "shared")
    first.close("num_rounds")
    open_run(storage, "shared")
    assert caplog.text.count("has not closed it") == 0
    open_run(storage, "shared")
    assert f"Process {os.getpid()} on " in caplog.text
    assert "opened study 'shared' at 20" in caplog.text
    assert "If it still runs, end one of the two" in caplog.text


def test_only_the_lock_of_the_same_directory_says_that_the_other_process_is_gone(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    storage = optuna.storages.InMemoryStorage()
    for log_dir, is_told in (("one", False), ("one", False), ("other", True)):
        open_run(storage, "shared", tmp_path / log_dir)
        assert ("has not closed it" in caplog.text) == is_told
    for _ in range(2):
        caplog.clear()
        open_run(log_dir=tmp_path)
    (tmp_path / "one").mkdir()
    shutil.move(tmp_path / "journal.log", tmp_path / "one")
    open_run(log_dir=tmp_path / "one")
    assert "has not closed it" not in caplog.text
