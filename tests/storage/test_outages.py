"""Disks that are full and databases that go away: the run goes on or says what is wrong, and loses nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from proxy import Door
from workers import Worker, serve

from dspy_opro.testing import SimulatedServer


@pytest.fixture(scope="module")
def server() -> Iterator[SimulatedServer]:
    with serve() as started:
        yield started


@pytest.fixture(scope="module")
def expected(server: SimulatedServer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run that nothing disturbed, and its scorer calls."""
    server.reset()
    return Worker(server, tmp_path_factory.mktemp("whole")).result(), server.stats()["scorer"].requests


@pytest.mark.slow
def test_a_database_that_goes_away_for_ten_seconds(
    server: SimulatedServer, expected: Any, tmp_path: Path, postgresql: str
) -> None:
    whole, num_calls = expected
    address, _, port = postgresql.removesuffix("/postgres").rpartition(":")
    door = Door(int(port))
    place = {"storage": f"{address}:{door.port}/postgres", "study_name": f"outage-{time.time()}"}
    server.reset()
    worker = Worker(server, tmp_path, **place)
    while server.stats()["scorer"].requests < num_calls // 3:
        assert not worker.is_over(0.02)
    door.shut()
    before = door.num_connections
    time.sleep(10)
    assert worker.process.is_alive()
    door.open()
    assert worker.result() == whole
    assert door.num_connections > before
    assert server.stats()["scorer"].requests == num_calls  # nothing was paid twice
    door.shut()


def test_a_disk_that_is_full_for_a_while(server: SimulatedServer, expected: Any, tmp_path: Path) -> None:
    whole, _ = expected
    server.reset()
    log_dir = tmp_path / "run"
    found = Worker(server, tmp_path, log_dir=str(log_dir), file_limit=(6_000, 2.0)).result()
    assert found == whole
    log = (log_dir / "run.log").read_text()
    assert "The storage fails; the run goes on and tries again: OSError: [Errno 27] File too large" in log
    assert "The storage works again. No result was lost." in log
    server.reset()
    assert Worker(server, tmp_path, log_dir=str(log_dir)).result() == whole
    assert server.stats().requests == 0  # all of it was written after all


def test_a_disk_that_stays_full(server: SimulatedServer, expected: Any, tmp_path: Path) -> None:
    whole, num_calls = expected
    server.reset()
    log_dir = tmp_path / "run"
    limits = {"file_limit": (12_000, None), "patience_seconds": 0.5}
    found = Worker(server, tmp_path, log_dir=str(log_dir), **limits).result()
    assert found["stop_reason"] == "storage_lost"
    assert found["trials"]  # what was found is returned all the same
    assert "The storage is lost" in (log_dir / "run.log").read_text()
    assert (log_dir / "best.json").exists()
    server.reset()
    assert Worker(server, tmp_path, log_dir=str(log_dir)).result() == whole
    assert 0 < server.stats()["scorer"].requests < num_calls


def test_a_directory_that_cannot_be_written_is_an_error_at_once(
    server: SimulatedServer, tmp_path: Path
) -> None:
    from test_resume import compile_

    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"log_dir '.*run' can't be made: "):
        compile_(tmp_path / "file" / "run")
