from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dspy_opro.reporting.progress import Progress, announce
from dspy_opro.search.tasks import CandidatesProposed, RoundDecided, TrialFinished
from dspy_opro.search.trajectory import Usage
from tests.forks import Forks
from tests.results import trial

SCRIPT = """
import logging, sys, time
from dspy_opro.reporting.progress import Progress, announce
from dspy_opro.search.trajectory import Usage
from dspy_opro.search.tasks import RoundDecided, TrialFinished, CandidatesProposed
from tests.results import trial

{prepare}
announce("at most 3 rounds")
usage = Usage(scorer_calls=30, prompt_tokens=52_300, cost=0.25)
progress = Progress({display}, {verbose}, 3)
start = trial("Answer.", [0.5])
progress.show(RoundDecided(0, start, 0.5), usage)
for round in (1, 2, 3):
    best = trial(f"Answer {{round}}.", [0.5, 0.75], round, parent=start.candidate)
    progress.show(CandidatesProposed(round, (best.candidate,), ("duplicate",)), usage)
    for _ in range(20):
        progress.refresh()
    if round == 2:
        logging.getLogger("dspy_opro.executor").warning("Failed on train example 3")
    progress.show(TrialFinished(best), usage)
    progress.show(RoundDecided(round, best, 0.625), usage)
progress.close()
progress.close()
logging.getLogger("dspy_opro").info("after the run")
"""


def script(display: bool = True, verbose: bool = False, prepare: str = "") -> str:
    return SCRIPT.format(display=display, verbose=verbose, prepare=prepare)


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as forks:
        yield forks


def screen(written: str) -> list[str]:
    """The lines that stay on a terminal: a carriage return begins the line anew, over what stands there."""
    lines = []
    for line in written.replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(re.sub(r"\x1b\[[A-Z]", "", shown).rstrip())
    return [line for line in lines if line]


LINE = re.compile(r"OPRO 3/3 \|█+\| \d\d:\d\d, best 0\.625, 3 candidates, 30 calls, 52\.3k tokens, \$0\.25")


def test_on_a_terminal_one_line_stays(forks: Forks) -> None:
    shown = screen(forks.on_terminal(script(), 80))
    assert shown[0] == "at most 3 rounds"
    assert shown[1].endswith("WARNING dspy_opro.executor: Failed on train example 3")
    assert LINE.fullmatch(shown[2])
    assert len(shown) == 3


def test_into_a_file_it_is_one_line_drawn_once_a_round(forks: Forks, tmp_path: Path) -> None:
    out, log = forks.into_files(script(), tmp_path)
    first, line, end = out.split("\n")
    assert (first, end) == ("at most 3 rounds", "")
    drawn = [part.strip() for part in line.split("\r") if part.strip()]
    assert LINE.fullmatch(drawn[-1])
    assert [part.split()[1] for part in drawn] == ["0/3", "0/3", "1/3", "2/3", "3/3", "3/3", "3/3"]
    assert log.endswith("WARNING dspy_opro.executor: Failed on train example 3\n")
    assert log.count("\n") == 1


def test_switched_off_it_shows_nothing(forks: Forks) -> None:
    written = forks.on_terminal(script(display=False), 80)
    assert "at most 3 rounds" in written
    assert "OPRO" not in written


def test_verbose_shows_the_log_in_a_plain_script_and_only_during_the_run(
    forks: Forks, tmp_path: Path
) -> None:
    log = forks.into_files(script(verbose=True), tmp_path)[1].splitlines()
    assert re.fullmatch(
        r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d INFO dspy_opro: round 0 decided, best score 0.500", log[0]
    )
    assert log[1].endswith("round 1: 1 candidates, 1 proposals not used")
    assert log[2].endswith("complete 0.625 after 2 examples (why Answer 1.): Answer 1.")
    assert sum("round" in line for line in log) == 7
    assert not any("after the run" in line for line in log)


def test_on_a_terminal_the_log_stands_above_the_line(forks: Forks) -> None:
    shown = screen(forks.on_terminal(script(verbose=True), 80))
    assert LINE.fullmatch(shown[-1])
    assert sum("OPRO 3/3" in line for line in shown) == 1
    assert sum("INFO dspy_opro" in line for line in shown) == 10


@pytest.mark.parametrize(
    ("prepare", "verbose", "seen"),
    [
        ("logging.basicConfig(format='own %(message)s')", True, ["own round 3 decided, best score 0.625"]),
        ("logging.basicConfig(format='own %(message)s')", False, ["own Failed on train example 3"]),
        ("logging.getLogger('dspy_opro').setLevel(logging.ERROR)", True, []),
    ],
)
def test_an_application_that_sets_up_logging_has_the_say(
    forks: Forks, tmp_path: Path, prepare: str, verbose: bool, seen: list[str]
) -> None:
    code = script(prepare=prepare, verbose=verbose)
    log = forks.into_files(code, tmp_path)[1].splitlines()
    assert log[-1:] == seen
    assert all(line.startswith("own ") for line in log)


TWO_RUNS = """
import logging
from dspy_opro.reporting.progress import Progress
from dspy_opro.search.trajectory import Usage
from dspy_opro.search.tasks import RoundDecided
from tests.results import trial

log = logging.getLogger("dspy_opro")
event = RoundDecided(1, trial("Answer.", [0.5]), 0.5)
loud, quiet = (Progress(False, verbose, 3) for verbose in (True, False))
quiet.show(event, Usage())
loud.show(event, Usage())
loud.close()
loud.close()
log.info("not seen")
log.warning("seen")
quiet.close()
assert (log.handlers, log.level) == ([], logging.NOTSET)
"""


def test_two_runs_at_once_show_each_message_once(forks: Forks, tmp_path: Path) -> None:
    _, log = forks.into_files(TWO_RUNS, tmp_path)
    shown = [line.partition("dspy_opro: ")[2] for line in log.splitlines()]
    assert shown == ["round 1 decided, best score 0.500", "seen"]


def test_announcements_go_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    announce("at most 3 rounds")
    assert capsys.readouterr() == ("at most 3 rounds\n", "")


def test_rounds_are_counted_from_the_first_that_proposes(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    shown = Progress(True, False, None)
    shown.show(RoundDecided(0, trial("Answer.", [0.5]), 0.5), Usage())
    shown.show(CandidatesProposed(1, (), ()), Usage())
    shown.show(TrialFinished(trial("Answer it.", [0.5], 1)), Usage())
    shown.show(RoundDecided(1, trial("Answer.", [0.5]), 0.5), Usage())
    shown.close()
    assert "OPRO 1/? |" in out.getvalue()
    assert "best 0.500, 1 candidates" in out.getvalue()


@pytest.mark.parametrize("stream", [None, SimpleNamespace(write=lambda text: None, flush=lambda: None)])
def test_a_stream_need_not_be_one(monkeypatch: pytest.MonkeyPatch, stream: Any) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    shown = Progress(False, True, None)
    shown.show(RoundDecided(1, trial("Answer.", [0.5]), 0.5), Usage())
    shown.close()
