"""A run in an Optuna study: what is there to read, and that a resumed run is the uninterrupted one."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState
from replay import STUDENT, drive, in_memory, load, score, shown

from dspy_opro.search.trajectory import Usage
from dspy_opro.study import OptunaStore, SharedStore
from dspy_opro.storage.result_log import TEXT_LIMIT
from dspy_opro.search.trajectory import Candidate, Outcome, Trial
from dspy_opro.search.tasks import TaskResult, ScoringTask, Event, TrialFinished, CandidatesProposed, TrialReported

BLOCK = ScoringTask(STUDENT, 0, "train", 0, 8)


def note(store: OptunaStore, event: Event) -> None:
    store.note(event)
    store.draw()


# -- what a study shows ------------------------------------------------------------------------------


def test_trials_come_in_the_order_of_their_candidates_with_all_that_is_known() -> None:
    store = OptunaStore()
    search, num_paid = drive(store)
    trials = store.study.get_trials()
    assert num_paid > 20
    assert [t.user_attrs["candidate_id"] for t in trials] == [t.id for t in search.trajectory.trials]
    for trial, ours in zip(trials, search.trajectory.trials, strict=True):
        assert trial.user_attrs["instructions"] == ours.candidate.instructions
        assert trial.user_attrs["round"] == ours.candidate.round
        assert trial.user_attrs["parent"] == ours.candidate.parent
        assert trial.user_attrs["rewritten"] == list(ours.candidate.rewritten)
        assert trial.user_attrs["num_scored"] == ours.num_scored
        assert trial.user_attrs["reason"] == ours.reason
        assert trial.user_attrs.get("valset_score") == ours.valset_score
        assert trial.user_attrs.get("num_failures", 0) == ours.num_failures
        assert trial.user_attrs["usage"]["metric_calls"] >= ours.num_scored
        assert 0 < trial.user_attrs["subscores"]["length"] < 1
        assert trial.state.name == ours.state.upper()
        assert trial.value == ours.reward  # that of a pruned trial too, not its last report
    assert {t.state for t in trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert store.study.best_value == search.trajectory.incumbent.reward
    assert store.study.direction.name == "MAXIMIZE"
    assert store.study.user_attrs["stop_reason"] == "num_rounds"
    assert (
        sum((Usage(**t.user_attrs["usage"]) for t in trials), Usage()).metric_calls == store.used.metric_calls
    )


def test_the_first_failures_are_shown_with_place_and_cause_in_whatever_order_blocks_come() -> None:
    outcomes = [Outcome(0.0, error=f"E{position}" + "x" * 2 * TEXT_LIMIT) for position in range(8)]
    seen = []
    for starts in [(0, 4), (4, 0)]:
        store = OptunaStore()
        note(store, CandidatesProposed(0, (STUDENT,), ()))
        for start in starts:
            block = ScoringTask(STUDENT, 0, "train", start, start + 4)
            store.told(TaskResult(block, tuple(outcomes[start : start + 4]), Usage()))
        note(store, TrialFinished(Trial(STUDENT, 0.0, 8, num_failures=8)))
        seen.append(store.study.get_trials()[0].user_attrs["failures"])
    assert seen[0] == seen[1]
    assert [(f["split"], f["position"], f["cause"][:2]) for f in seen[0]] == [
        ("train", n, f"E{n}") for n in range(5)
    ]
    assert all(len(f["cause"]) <= TEXT_LIMIT for f in seen[0])


def test_whatever_order_answers_arrive_in_the_study_is_the_same() -> None:
    first = in_memory(order=0)
    assert [in_memory(order=n)[1:] for n in range(1, 6)] == [first[1:]] * 5


def test_callbacks_get_study_and_told_trial(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[tuple[str, int, TrialState]] = []

    def failing(study: optuna.Study, trial: Any) -> None:
        raise RuntimeError("the plot is broken")

    def noting(study: optuna.Study, trial: Any) -> None:
        calls.append((study.study_name, trial.number, trial.state))

    store = OptunaStore(callbacks=[failing, noting])
    with caplog.at_level(logging.WARNING, logger="dspy_opro"):
        drive(store)
    trials = store.study.get_trials()
    assert sorted(calls) == [(store.study.study_name, t.number, t.state) for t in trials]
    assert "A callback failed on trial 0" in caplog.text


def test_a_callback_may_stop_the_study_as_in_optuna() -> None:
    store = OptunaStore(callbacks=[MaxTrialsCallback(3, states=None)])
    stops: list[bool] = []
    store.on_stop = lambda: stops.append(True)
    note(store, CandidatesProposed(0, (STUDENT,), ()))
    note(store, TrialFinished(Trial(STUDENT, 0.5, 8)))
    assert not stops
    others = tuple(Candidate({"answer": text}) for text in "ab")
    note(store, CandidatesProposed(1, others, ()))
    for candidate in others:
        note(store, TrialFinished(Trial(candidate, 0.5, 8)))
    assert stops


def test_texts_longer_than_a_database_column_are_cut_and_say_so() -> None:
    store = OptunaStore()
    note(store, CandidatesProposed(0, (Candidate({"a": "字" * 20_000, "b": "short"}),), ()))
    attrs = store.study.get_trials()[0].user_attrs
    assert attrs["is_cut"]
    assert len(json.dumps(attrs["instructions"])) < 65_535
    assert attrs["instructions"]["b"] == "short"


# -- ends --------------------------------------------------------------------------------------------


def half_done(**place: Any) -> OptunaStore:
    store = OptunaStore(**place)
    note(store, CandidatesProposed(0, (STUDENT,), ()))
    store.record([TaskResult(BLOCK, *score(BLOCK))])
    note(store, TrialReported(STUDENT, 8, 0.5))
    return store


@pytest.mark.parametrize("reason", ["interrupted", "max_tokens", "max_cost", "timeout_seconds", "error"])
def test_trials_under_way_wait_for_the_next_process_where_it_may_go_on(tmp_path: Path, reason: str) -> None:
    half_done(log_dir=tmp_path).close(reason)
    store = half_done(log_dir=tmp_path)
    note(store, TrialFinished(Trial(STUDENT, 0.5, 8)))
    assert [(t.state, t.intermediate_values) for t in store.study.get_trials()] == [
        (TrialState.COMPLETE, {8: 0.5})
    ]


@pytest.mark.parametrize("reason", ["patience", "num_rounds", "no_new_proposals", "own stopper"])
def test_trials_under_way_are_closed_when_the_run_has_ended(tmp_path: Path, reason: str) -> None:
    half_done(log_dir=tmp_path).close(reason)
    store = OptunaStore(log_dir=tmp_path)
    (trial,) = store.study.get_trials()
    assert (trial.state, trial.user_attrs["reason"]) == (TrialState.FAIL, f"the run ended: {reason}")
    assert load(store).recall(BLOCK) == TaskResult(BLOCK, *score(BLOCK))  # its blocks still count
    note(store, CandidatesProposed(0, (STUDENT,), ()))
    note(store, TrialFinished(Trial(STUDENT, 0.5, 8)))
    assert [t.state for t in store.study.get_trials()] == [TrialState.FAIL, TrialState.COMPLETE]


def test_in_memory_nothing_stays_under_way() -> None:
    store = half_done()
    store.close("interrupted")
    assert store.study.get_trials()[0].state == TrialState.FAIL


# -- whose study it is -------------------------------------------------------------------------------


def test_a_mismatch_names_what_differs_and_the_remedy(tmp_path: Path) -> None:
    parts = {"student": "a1", "metric": "my.metric", "seed": "0"}
    OptunaStore(log_dir=tmp_path, fingerprint=parts).record([TaskResult(BLOCK, *score(BLOCK))])
    OptunaStore(log_dir=tmp_path, fingerprint=parts)
    with pytest.raises(ValueError, match="different run") as caught:
        OptunaStore(log_dir=tmp_path, fingerprint={"student": "b2", "metric": "my.metric", "valset": "v"})
    message = str(caught.value)
    assert "student was 'a1' and is now 'b2'" in message
    assert "seed was '0' and is now None" in message
    assert "valset was None and is now 'v'" in message
    assert "my.metric" not in message
    assert "Use another study_name or log_dir, or delete the studies 'opro' and 'opro/log'." in message


def test_a_run_without_an_answer_may_still_become_another(tmp_path: Path) -> None:
    """A metric that did not get past the first example is mended and tried again in the same place."""
    for metric in ("broken", "better", "good"):
        store = OptunaStore(log_dir=tmp_path, fingerprint={"metric": metric})
        assert store.is_fresh
    store.record([TaskResult(BLOCK, *score(BLOCK))])
    assert not OptunaStore(log_dir=tmp_path, fingerprint={"metric": "good"}).is_fresh
    with pytest.raises(ValueError, match="metric was 'good' and is now 'broken'"):
        OptunaStore(log_dir=tmp_path, fingerprint={"metric": "broken"})


def test_where_others_may_be_at_work_the_first_stamp_counts(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'run.db'}"
    SharedStore(storage, "run", fingerprint={"metric": "one"})
    with pytest.raises(ValueError, match="different run"):
        SharedStore(storage, "run", fingerprint={"metric": "other"})


def test_a_deleted_study_is_drawn_anew_from_its_log(tmp_path: Path) -> None:
    drive(OptunaStore(log_dir=tmp_path))
    store = OptunaStore(log_dir=tmp_path)
    optuna.delete_study(study_name="opro", storage=store.study._storage)
    store = OptunaStore(log_dir=tmp_path)
    _, num_paid = drive(store)
    assert num_paid == 0
    assert shown(store.study) == in_memory()[1]


def test_somebody_elses_study_is_refused() -> None:
    storage = optuna.storages.InMemoryStorage()
    optuna.create_study(storage=storage, study_name="theirs", direction="maximize").add_trial(
        optuna.trial.create_trial(value=1.0)
    )
    with pytest.raises(ValueError, match="'theirs' has trials that were not made by dspy_opro"):
        OptunaStore(storage, "theirs")
    optuna.create_study(storage=storage, study_name="down", direction="minimize")
    with pytest.raises(ValueError, match="'down' must be maximized"):
        OptunaStore(storage, "down")


def test_an_empty_study_made_beforehand_is_taken() -> None:
    storage = optuna.storages.InMemoryStorage()
    made = optuna.create_study(storage=storage, study_name="mine", direction="maximize")
    drive(OptunaStore(storage, "mine"))
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
    assert OptunaStore(**arguments).study.study_name == expected
