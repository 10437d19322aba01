"""The study of a run that is over: where it can't be read any more, nothing is made in its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspy_opro.search.trajectory import Candidate, Trial
from dspy_opro.storage.loading import load_study, study_of
from dspy_opro.storage.run_storage import open_run


@pytest.mark.parametrize(
    "storage",
    [
        None,
        "sqlite:///{}/gone.db",
        "postgresql://user:***@host/runs",
        "<optuna.storages.InMemoryStorage object>",
        "nonsense://{}",
    ],
)
def test_what_is_gone_is_none_and_leaves_no_trace(tmp_path: Path, storage: str | None) -> None:
    url = storage and storage.format(tmp_path)
    assert load_study("opro", url, str(tmp_path / "gone")) is None
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_journal_is_none(tmp_path: Path) -> None:
    (tmp_path / "journal.log").write_text("no journal\n")
    assert load_study("opro", None, str(tmp_path)) is None


def test_a_study_is_found_in_its_storage(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/qa.db"
    for options in ({"storage": url, "study_name": "qa"}, {"log_dir": tmp_path / "run"}):
        open_run(**options, fingerprint={}).close("num_rounds")
    in_storage = [load_study("qa", each, "elsewhere") for each in (url, f"{url}?timeout=5")]
    for found in (*in_storage, load_study("opro", None, str(tmp_path / "run"))):
        assert found is not None and found.user_attrs["stop_reason"] == "num_rounds"


def test_trials_make_a_study_in_memory() -> None:
    student = Trial(Candidate({"answer": "Answer."}), 0.5, 4, subscores={"length": 0.25})
    dropped = Trial(Candidate({"answer": "Guess."}, 1, student.id), 0.75, 2, "pruned", "ranked 2 of 2")
    failed = Trial(Candidate({"answer": "Fail."}, 1, student.id), 0.0, 1, "failed")
    study = study_of("qa", (student, dropped, failed))
    assert (study.study_name, study.best_trial.number) == ("qa", 0)
    assert [t.state.name for t in study.trials] == ["COMPLETE", "PRUNED", "FAIL"]
    assert study.trials[0].user_attrs["subscores"] == {"length": 0.25}
    assert study.trials[1].user_attrs["parent"] == student.id
    assert study.trials[1].intermediate_values == {2: 0.75}
    assert study_of("", ()).trials == []
