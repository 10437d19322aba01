"""The recorder against storages that fail."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Sequence

import pytest

from dspy_opro import recording
from dspy_opro.recording import Recorder
from dspy_opro.stopping import Usage
from dspy_opro.trajectory import Candidate
from dspy_opro.work import Answer, Block

STUDENT = Candidate({"self": "x"})


def answer(number: int) -> Answer:
    return Answer(Block(STUDENT, 0, "train", number, number + 1), (), Usage())


class Storage:
    """Fails so often, then works."""

    def __init__(self, num_failures: int) -> None:
        self.num_failures = num_failures
        self.entries: list[list[int]] = []
        self.num_drawn = 0
        self.gate = threading.Event()
        self.gate.set()
        self.lost = 0

    def record(self, answers: Sequence[Answer]) -> None:
        self.gate.wait()
        self.fail()
        self.entries.append([a.work.start for a in answers])  # type: ignore[union-attr]

    def draw(self) -> None:
        self.fail()
        self.num_drawn += 1

    def fail(self) -> None:
        if self.num_failures:
            self.num_failures -= 1
            raise OSError("no space left")

    def recorder(self) -> Recorder:
        return Recorder(self.record, self.draw, lambda: setattr(self, "lost", self.lost + 1))


def test_what_queued_up_is_written_at_once_and_in_order() -> None:
    storage = Storage(0)
    storage.gate.clear()
    recorder = storage.recorder()
    for number in range(5):
        recorder.put(answer(number))
    storage.gate.set()
    recorder.close(lambda: None)
    assert [*itertools.chain(*storage.entries)] == list(range(5))
    assert len(storage.entries) <= 2


def test_a_storage_that_comes_back_misses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    storage, done = Storage(3), threading.Event()
    with caplog.at_level(logging.WARNING, logger="dspy_opro"):
        recorder = storage.recorder()
        for number in range(3):
            recorder.put(answer(number))
        recorder.close(done.set)
    assert [*itertools.chain(*storage.entries)] == [0, 1, 2]
    assert done.is_set()
    assert caplog.text.count("The storage fails") == 1
    assert "OSError: no space left" in caplog.text
    assert "The storage is back; nothing is missing." in caplog.text


def test_a_storage_that_stays_away_ends_the_run_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(recording, "LAST_PATIENCE_SECONDS", 0.1)
    storage, done = Storage(10**6), threading.Event()
    recorder = storage.recorder()
    recorder.put(answer(0))
    recorder.close(done.set)
    assert storage.lost == 1
    assert recorder.is_lost
    assert not done.is_set()
    assert "The storage is lost" in caplog.text
