"""What can't be opened: an error that names the file, says what is wrong with it, and what to do."""

from __future__ import annotations

import os
import re
from pathlib import Path

import optuna
import pytest
from replay import drive, in_memory

from dspy_opro.reporting.run_directory import RunDirectory
from dspy_opro.storage.opening import JOURNAL_NAME, quiet_optuna
from dspy_opro.storage.run_storage import open_run


@pytest.mark.parametrize("damage", [b"\x00\x00\xff", b"", b'"text"'])
def test_a_journal_that_is_damaged_in_the_middle(tmp_path: Path, damage: bytes) -> None:
    drive(open_run(log_dir=tmp_path))
    journal = tmp_path / JOURNAL_NAME
    lines = journal.read_bytes().splitlines()
    journal.write_bytes(b"\n".join([*lines[:9], damage, *lines[10:], b""]))
    with pytest.raises(ValueError, match="line 10 is not a JSON object") as caught:
        open_run(log_dir=tmp_path)
    assert str(journal) in str(caught.value)
    kept = re.search(r"head -n (\d+)", str(caught.value))
    assert kept is not None
    journal.write_bytes(b"\n".join([*lines[: int(kept.group(1))], b""]))  # as the message says
    assert drive(open_run(log_dir=tmp_path)).search.trajectory == in_memory()[0].search.trajectory


def test_optuna_speaks_as_before_after_two_threads_kept_it_quiet() -> None:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.INFO)
    try:
        first, second = quiet_optuna(), quiet_optuna()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert optuna.logging.get_verbosity() == optuna.logging.WARNING
        second.__exit__(None, None, None)
        assert optuna.logging.get_verbosity() == optuna.logging.INFO
    finally:
        optuna.logging.set_verbosity(before)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite+pysqlite:///:memory:"])
def test_a_database_in_memory_would_be_another_one_in_every_thread(url: str) -> None:
    with pytest.raises(ValueError, match="every thread would have a database of its own"):
        open_run(url, "qa")


def test_a_study_with_several_objectives(tmp_path: Path) -> None:
    storage = optuna.storages.InMemoryStorage()
    optuna.create_study(study_name="qa", storage=storage, directions=["maximize", "maximize"])
    with pytest.raises(ValueError, match="'qa' must be maximized"):
        open_run(storage, "qa")


def test_a_program_may_change_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run, directory = open_run(log_dir="run"), RunDirectory("run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    driven = drive(run)
    assert directory.write("best.json", lambda path: path.write_text("{}"))
    directory.close()
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert drive(open_run(log_dir=tmp_path / "run")).search.trajectory == driven.search.trajectory


def test_a_journal_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_NAME).mkdir()
    with pytest.raises(
        ValueError, match=r"journal\.log can't be written: .*Use a log_dir that can be written"
    ):
        open_run(log_dir=tmp_path)


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(
        ValueError, match=r"log_dir '.*' can't be written: .*Use a directory that can be written"
    ):
        RunDirectory(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_process_killed_while_it_writes_leaves_nothing_behind_the_next_write(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    if (child := os.fork()) == 0:
        directory.write("best.json", lambda path: [path.write_text("{"), os._exit(0)])
    os.waitpid(child, 0)
    assert len(list(tmp_path.glob(".*"))) == 1
    assert directory.write("best.json", lambda path: path.write_text("{}"))
    directory.close()
    assert list(tmp_path.glob(".*")) == []
