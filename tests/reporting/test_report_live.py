"""`report.html` in the directory of a run."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dspy_opro.programs.metric import MetricError
from dspy_opro.reporting.live import PAUSE_SECONDS, PULSE_SECONDS, Limit, Live, LivePage, Runner
from dspy_opro.reporting.report import page
from dspy_opro.reporting.result import NOT_ENDED, OPROResult
from dspy_opro.reporting.run_directory import RunDirectory
from dspy_opro.search.tasks import CandidatesProposed, RoundDecided, TrialFinished, TrialReported
from tests.results import empty, result
from tests.runs import metric, optimize, serve


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def live(tmp_path: Path, clock: Clock) -> Any:
    directory = RunDirectory(tmp_path)
    yield LivePage(directory, 4, {"rounds": 5, "examples": 28, "dollars": None, "seconds": 150.0}, clock)
    directory.close()


TRIALS = result().trajectory.trials
DECIDED = RoundDecided(1, TRIALS[2], 0.5)


def test_the_page_is_written_after_a_round_but_not_too_often(live: LivePage, clock: Clock) -> None:
    assert live.is_due(None)
    live.write(result(), 75.0)
    clock.now += PAUSE_SECONDS - 0.1
    assert not live.is_due(DECIDED)
    clock.now += 0.2
    assert live.is_due(None)
    live.write(result(), 75.0)
    clock.now += PULSE_SECONDS - 0.1
    assert not live.is_due(None)
    clock.now += 0.2
    assert live.is_due(None)


def test_a_slow_write_makes_the_next_one_wait(live: LivePage, clock: Clock, tmp_path: Path) -> None:
    @dataclass
    class Slow:
        def write(self, name: str, save: Any) -> None:
            clock.now += 2.0

    LivePage.write(slow := LivePage(Slow(), 4, {}, clock), result(), 75.0)  # type: ignore[arg-type]
    clock.now += 30.0
    assert not slow.is_due(DECIDED)
    clock.now += 10.1
    assert slow.is_due(None)


def test_the_page_shows_who_races_and_what_is_left(live: LivePage, tmp_path: Path) -> None:
    live.is_due(CandidatesProposed(1, tuple(t.candidate for t in TRIALS[1:]), ()))
    live.is_due(TrialReported(TRIALS[3].candidate, 2, 0.9))
    live.is_due(TrialFinished(TRIALS[1]))
    live.is_due(DECIDED)
    live.write(result(), 150.0)
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "Round 1 is decided." in text
    assert "In the race (2)" in text
    assert text.index("≈ 0.900") < text.index(">–</b>")  # the best first, unknown ones last
    for words in ("1 of 5", "14 of 28", "about 2 min 30 s left", "1 min 15 s of 2 min 30 s"):
        assert words in text, words
    assert "dollars</b>" not in text
    assert "The run is under way." in text and "as patience allows" not in text
    live.write(result(), 150.0, is_racing=False)  # a budget has ended the races, and the result is confirmed
    assert "In the race (0)" in (tmp_path / "report.html").read_text("utf-8")
    live.close(result())
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "data-live" not in text and "In the race" not in text and "as patience allows" in text
    assert {path.name for path in tmp_path.iterdir()} == {"lock", "run.log", "report.html"}


def test_a_page_that_cannot_be_written_does_not_end_the_run(
    live: LivePage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "report.html").mkdir()
    (tmp_path / "report.html" / "file").touch()
    with caplog.at_level(logging.WARNING, "dspy_opro"):
        live.write(result(), 75.0)
        live.write(result(), 75.0)
    assert len([r for r in caplog.records if "report.html cannot be written" in r.getMessage()]) == 1


def test_before_the_students_score_the_page_says_so() -> None:
    text = page(empty(), Live(-1, 4, (), ()))
    assert "The run is scoring the student." in text
    assert "The race begins with the first new instructions." in text
    assert "ended" not in text.partition("<script>")[0]


def test_while_the_run_goes_on_nothing_is_called_returned() -> None:
    ended = page(result())
    for unended in (page(result(), Live(1, 4, (), ())), page(result(stop_reason=NOT_ENDED))):
        assert ">best so far<" in unended
        assert re.findall(r">returned<|[Rr]eturned (?:candidate|program)|run returned", unended) == []
    assert ">returned<" in ended and ">best so far<" not in ended


def test_a_budget_that_is_not_used_yet_has_no_time_left() -> None:
    assert Limit("tokens", 0, 100, 10.0).seconds_left is None
    assert Limit("tokens", 25, 100, 10.0).seconds_left == 30.0
    assert Limit("tokens", 125, 100, 10.0).seconds_left == 0.0
    assert Limit("dollars", float("nan"), 100, 10.0).seconds_left is None


def test_a_text_in_the_race_stays_text() -> None:
    evil = TRIALS[1].candidate  # has <b> in its text
    text = page(result(), Live(1, 4, (Runner(evil),), ()))
    assert "<b>badly</b>" not in text


def test_a_run_keeps_a_page_from_its_start_to_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []

    def watch(example: Any, prediction: Any, trace: Any = None) -> float:
        if (tmp_path / "report.html").exists():
            seen.append((tmp_path / "report.html").read_text("utf-8"))
        return float(metric(example, prediction))

    with serve() as server:
        program = optimize(server, metric=watch, log_dir=tmp_path, num_rounds=4, display_progress=True)
    assert f"Open {tmp_path / 'report.html'} in a browser" in capsys.readouterr().out
    assert seen and all("data-live" in text and text.endswith("</html>") for text in seen)
    end = (tmp_path / "report.html").read_text("utf-8")
    assert "data-live" not in end
    for trial in program.opro_result.trajectory.trials:
        assert trial.reason in end


@pytest.mark.parametrize("is_cut_short", [False, True])
def test_all_that_is_left_of_a_run_says_that_it_took_equally_long(tmp_path: Path, is_cut_short: bool) -> None:
    num_scored = 0

    def watch(example: Any, prediction: Any, trace: Any = None) -> Any:
        nonlocal num_scored
        num_scored += 1
        return "no score" if is_cut_short and num_scored == 20 else metric(example, prediction)

    with serve() as server:
        try:
            program = optimize(server, metric=watch, log_dir=tmp_path)
        except MetricError as error:
            program = error.program  # type: ignore[attr-defined]
    assert OPROResult.load(tmp_path / "result.json").seconds == program.opro_result.seconds
