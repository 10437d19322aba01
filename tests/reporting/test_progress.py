from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dspy_opro.programs.metric import MetricError
from dspy_opro.reporting import progress
from dspy_opro.reporting.progress import Progress, announce, changes
from dspy_opro.search.tasks import CandidatesProposed, RoundDecided, TrialFinished
from dspy_opro.search.trajectory import Trajectory, Usage
from tests.forks import Forks
from tests.results import trial
from tests.runs import optimize, serve

SCRIPT = """
import logging, os, sys, time
for name in ("CI", "COLUMNS", "LINES"):
    os.environ.pop(name, None)
from dspy_opro.reporting.progress import Progress, announce
from dspy_opro.search.trajectory import Usage
from dspy_opro.search.tasks import RoundDecided, TrialFinished, CandidatesProposed
from tests.results import trial

{prepare}
announce("at most 3 rounds")
usage = Usage(scorer_calls=30, prompt_tokens=52_300, cost=0.25)
progress = Progress({display}, {verbose}, {{'rounds': 3}})
start = trial("Answer.", [0.5])
progress.show(TrialFinished(start), usage)
progress.show(RoundDecided(0, start, 0.5), usage)
for round in (1, 2, 3):
    best = trial(f"Answer {{round}}.", [0.5, 0.75], round, parent=start.candidate)
    progress.show(CandidatesProposed(round, (best.candidate,), ("duplicate",)), usage)
    for _ in range(20):
        progress.show(None, usage)
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


LINE = re.compile(
    r"OPRO round 3/3, train 0\.500 -> 0\.625, 00:00 left, \$0\.25, 3 candidates(, \d\.\d calls/s)?"
)
ENDED = re.compile(LINE.pattern.replace("00:00 left, ", ""))  # the line that stays has no time left


def test_on_a_terminal_one_line_stays(forks: Forks) -> None:
    shown = screen(forks.on_terminal(script(), 80))
    assert shown[0] == "at most 3 rounds"
    assert shown[1].endswith("WARNING dspy_opro.executor: Failed on train example 3")
    assert ENDED.fullmatch(shown[2])
    assert len(shown) == 3


def test_into_a_file_there_is_a_plain_line_a_round(forks: Forks, tmp_path: Path) -> None:
    out, log = forks.into_files(script(), tmp_path)
    first, *lines = out.splitlines()
    assert first == "at most 3 rounds"
    assert [line.split(",")[0] for line in lines] == [f"OPRO round {n}/3" for n in range(4)]
    assert LINE.fullmatch(lines[-1])
    assert not re.search(r"[\r\x1b]", out + log)
    assert log.endswith("WARNING dspy_opro.executor: Failed on train example 3\n")
    assert log.count("\n") == 1


def test_in_continuous_integration_a_terminal_gets_plain_lines_too(forks: Forks) -> None:
    written = forks.on_terminal(script(prepare="os.environ['CI'] = 'true'"), 80).replace("\r\n", "\n")
    assert "\r" not in written
    assert [line for line in written.splitlines() if line.startswith("OPRO")][3:] != []


@pytest.mark.parametrize("columns", [40, 60, 200])
def test_the_line_fits_the_terminal(forks: Forks, columns: int) -> None:
    written = forks.on_terminal(script(), columns)
    drawn = [part.rstrip() for part in re.split(r"[\r\n]", written) if part.startswith("OPRO round 3/3")]
    assert drawn and max(map(len, drawn)) < columns
    assert ("calls/s" in drawn[-1]) == (columns == 200)


def test_a_terminal_without_a_size_has_80_columns(forks: Forks) -> None:
    assert ENDED.fullmatch(screen(forks.on_terminal(script(), 0))[2])


def test_the_line_is_drawn_again_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    monkeypatch.setattr(sys, "stdout", out := Terminal())
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("CI", raising=False)
    shown = Progress(True, False, {"rounds": 4, "examples": 100})
    for calls in range(0, 41, 10):  # no event, only ticks
        shown.show(None, Usage(metric_calls=calls, scorer_calls=calls, unpriced_calls=calls))
        now += 0.5
    shown.close()
    lines = [part.strip() for part in out.getvalue().split("\r") if "scoring the student" in part]
    assert len(lines) >= 5
    assert lines[3].endswith("00:03 left, cost unknown, 0 candidates, 20 calls/s")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ({}, "00:20 so far"),
        ({"rounds": 4}, "00:20 left"),
        ({"rounds": 4, "examples": 50}, "00:10 left"),
        ({"rounds": 4, "tokens": 250}, "00:05 left"),
        ({"rounds": 4, "dollars": 0.5}, "00:00 left"),
        ({"rounds": None, "seconds": 21.0}, "00:01 left"),
    ],
)
def test_the_time_left_is_that_until_the_first_limit(
    monkeypatch: pytest.MonkeyPatch, limits: dict[str, float | None], left: str
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    shown = Progress(True, False, limits)
    resumed = Usage(metric_calls=20, prompt_tokens=50, cost=0.25)
    shown.show(None, resumed)
    now = 20.0
    spent = resumed + Usage(metric_calls=20, scorer_calls=20, prompt_tokens=160, cost=0.25)
    shown.show(RoundDecided(2, trial("Answer.", [0.5]), 0.5), spent)
    shown.close()
    assert left in out.getvalue()


def test_a_resumed_run_begins_after_the_rounds_on_record(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    shown = Progress(True, False, {"rounds": 5})
    shown.resume(2)
    for number, seconds in ((0, 0.0), (1, 0.0), (2, 0.0), (3, 10.0)):
        now = seconds
        shown.show(RoundDecided(number, trial("Answer.", [0.5]), 0.5), Usage(metric_calls=20))
    shown.close()
    first, second = out.getvalue().splitlines()
    assert first.startswith("OPRO round 2/5, train 0.500, 00:00 so far")
    assert second.startswith("OPRO round 3/5, train 0.500, 00:20 left")


def test_an_unknown_figure_is_never_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    shown = Progress(True, True, {"rounds": 2, "dollars": 1.0})
    usage = Usage(scorer_calls=3, cost=float("nan"))
    shown.show(RoundDecided(0, trial("Answer.", [float("nan")]), float("nan")), usage)
    shown.close()
    assert "train unknown, " in out.getvalue() and "cost unknown" in out.getvalue()
    assert "nan" not in out.getvalue()


def test_a_cost_that_is_known_in_part_is_brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    shown = Progress(True, True, {"rounds": 2})
    usage = Usage(scorer_calls=3, cost=0.25, unpriced_calls=1)
    shown.show(RoundDecided(0, trial("Answer.", [0.5]), 0.5), usage)
    shown.close()
    assert ", at least $0.25, 0 candidates" in out.getvalue()


def test_switched_off_it_shows_nothing(forks: Forks) -> None:
    written = forks.on_terminal(script(display=False), 80)
    assert "at most 3 rounds" in written
    assert "OPRO" not in written


def test_verbose_shows_the_log_in_a_plain_script_and_only_during_the_run(
    forks: Forks, tmp_path: Path
) -> None:
    log = forks.into_files(script(verbose=True), tmp_path)[1].splitlines()
    assert re.fullmatch(
        r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d INFO dspy_opro: round 0 decided, best score 0.500", log[1]
    )
    assert log[2].endswith("round 1: 1 candidate, 1 proposal not used")
    assert log[3].endswith("complete 0.625 on 2 examples (why Answer 1.): Answer 1.")
    assert sum("round" in line for line in log) == 7
    better = next(n for n, line in enumerate(log) if "better than before" in line)
    assert log[better].endswith(
        "better than before: 0.625 on 2 train examples; the student's score is 0.500."
    )
    assert log[better + 1 : better + 5] == [
        "  draft (unchanged):",
        "    Think.",
        "  answer:",
        "    [-Answer.-]{+Answer 1.+}",
    ]
    assert not any("after the run" in line for line in log)


def test_on_a_terminal_the_log_stands_above_the_line(forks: Forks) -> None:
    shown = screen(forks.on_terminal(script(verbose=True), 80))
    assert ENDED.fullmatch(shown[-1])
    assert sum("OPRO round 3/3" in line for line in shown) == 1
    assert sum("INFO dspy_opro" in line for line in shown) == 14


OTHERS_LOG = """
import logging, os, time
for name in ("CI", "COLUMNS", "LINES"):
    os.environ.pop(name, None)
import dspy
from dspy_opro.reporting.progress import Progress
from dspy_opro.search.trajectory import Usage

{prepare}
progress = Progress(True, False, {{"rounds": 3}})
for _ in range(2):
    progress.show(None, Usage())
    logging.getLogger("{name}").warning("the answer is cut off")
    time.sleep(0.45)
progress.show(None, Usage())
progress.close()
handlers = [*logging.getLogger("dspy").handlers, *logging.getLogger().handlers]
assert handlers and not any(handler.filters for handler in handlers)
"""


PRINTING_HANDLER = """
class Printing(logging.Handler):  # no StreamHandler, as that of rich
    def emit(self, record):
        print("own", record.getMessage())


logging.getLogger().addHandler(Printing())
"""


@pytest.mark.parametrize(
    ("prepare", "name", "start"),
    [
        ("", "dspy.clients.lm", r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d WARNING dspy.clients.lm: "),
        ("logging.basicConfig(format='own %(message)s')", "mine", "own "),
        (PRINTING_HANDLER, "mine", "own "),
    ],
)
def test_what_others_log_begins_on_a_line_of_its_own(
    forks: Forks, prepare: str, name: str, start: str
) -> None:
    shown = screen(forks.on_terminal(OTHERS_LOG.format(prepare=prepare, name=name), 80))
    assert len(shown) == 3
    assert all(re.fullmatch(f"{start}the answer is cut off", line) for line in shown[:2]), shown
    assert shown[2].startswith("OPRO round 0/3, scoring the student")


@pytest.mark.parametrize(
    ("prepare", "verbose", "seen"),
    [
        ("logging.basicConfig(format='own %(message)s')", True, ["    [-Answer.-]{+Answer 3.+}"]),
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
    assert all(line.startswith(("own ", "  ")) for line in log)


TWO_RUNS = """
import logging
from dspy_opro.reporting.progress import Progress
from dspy_opro.search.trajectory import Usage
from dspy_opro.search.tasks import RoundDecided
from tests.results import trial

log = logging.getLogger("dspy_opro")
event = RoundDecided(1, trial("Answer.", [0.5]), 0.5)
loud, quiet = (Progress(False, verbose, {'rounds': 3}) for verbose in (True, False))
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
    shown = Progress(True, False, {})
    shown.show(TrialFinished(trial("Answer.", [0.5])), Usage())
    shown.show(RoundDecided(0, trial("Answer.", [0.5]), 0.5), Usage())
    shown.show(CandidatesProposed(1, (), ()), Usage())
    shown.show(TrialFinished(trial("Answer it.", [0.5], 1)), Usage())
    shown.show(RoundDecided(1, trial("Answer.", [0.5]), 0.5), Usage())
    shown.close()
    assert out.getvalue().splitlines()[-1].startswith("OPRO round 1, train 0.500, ")
    assert ", 1 candidate, " in out.getvalue()


@pytest.mark.parametrize("stream", [None, SimpleNamespace(write=lambda text: None, flush=lambda: None)])
def test_a_stream_need_not_be_one(monkeypatch: pytest.MonkeyPatch, stream: Any) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    shown = Progress(False, True, {})
    shown.show(RoundDecided(1, trial("Answer.", [0.5]), 0.5), Usage())
    shown.close()


def test_a_better_instruction_is_shown_whole_with_its_line_breaks() -> None:
    before = trial("Answer the question.\nBe brief.", [0.5]).candidate
    after = trial("Answer every question.\nBe brief. Give\nreasons.", [0.5], 1, parent=before).candidate
    assert changes(before, after).splitlines() == [
        "  draft (unchanged):",
        "    Think.",
        "  answer:",
        "    Answer [-the-]{+every+} question.",
        "    Be brief. {+Give",
        "    reasons.+}",
    ]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"reward": 1.3, "state": "pruned"}, "pruned, estimate 1.000 from 1 example (why Answer.)"),
        ({"state": "failed"}, "failed, estimate 0.500 from 1 example (why Answer.)"),
        ({}, "complete 0.500 on 1 example (why Answer.)"),
    ],
)
def test_an_estimate_is_called_one(changed: dict[str, Any], words: str) -> None:
    found = replace(trial("Answer.", [0.5]), **changed)
    assert progress.outcome(found, Trajectory().add(found)) == words


def test_the_data_of_a_score_is_named() -> None:
    on_train = trial("Answer.", [0.5, 1.0])
    on_valset = replace(on_train, valset_score=0.5, valset_scores=(0.0, 1.0, 0.5))
    assert progress.scored_on(on_train) == "2 train examples"
    assert progress.scored_on(on_valset) == "3 validation examples"


@pytest.mark.parametrize("has_failed", [False, True])
def test_a_bar_is_full_unless_an_error_ended_the_run(
    monkeypatch: pytest.MonkeyPatch, has_failed: bool
) -> None:
    """A notebook shows other bars in red, also if patience ends a run early, as it usually does."""
    is_full, num_scored = [], 0

    class Bar(progress.tqdm):  # type: ignore[misc]
        def close(self) -> None:
            is_full.append(self.n == self.total)
            super().close()

    def last_no_score(example: Any, prediction: Any) -> Any:
        nonlocal num_scored
        num_scored += 1
        return "no score" if has_failed and num_scored == 20 else 1.0

    monkeypatch.setattr(progress, "tqdm", Bar)
    with serve() as server, contextlib.suppress(MetricError):
        optimize(server, metric=last_no_score, num_rounds=6, patience=1, display_progress=True)
    assert is_full[0] is not has_failed  # tqdm closes a bar again when nobody holds it any more


def test_the_line_says_what_slows_the_run_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    shown = Progress(True, False, {"rounds": 2})
    shown.show(RoundDecided(0, trial("Answer.", [0.5]), 0.5), Usage(), "rate limit, 4 calls at a time")
    shown.close()
    assert "train 0.500, rate limit, 4 calls at a time, " in out.getvalue()
