"""The progress line (with tqdm, like DSPy's own) and the log of a run on the screen."""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook

from dspy_opro.search.tasks import CandidatesProposed, Event, RoundDecided, TrialFinished
from dspy_opro.search.trajectory import Candidate, Trajectory, Trial, Usage, normalise

from .live import Limit, spending
from .report import word_diff
from .result import cost, counted, reward_within

logger = logging.getLogger("dspy_opro")

PAUSE_SECONDS = 0.4
"""The line is drawn again at every tick of the run, which are half a second apart."""
RATE_SECONDS = 10.0
"""Calls a second are those of so many seconds."""
LOGGERS = ("", "dspy", "dspy_opro", "optuna", "LiteLLM")
"""Loggers whose handlers may write to the terminal during a run. The first one is the root."""


class Progress:
    """One line: round, student's and best score, time left, cost, candidates, calls a second.

    On a terminal and in a notebook one line is drawn again twice a second. In a pipe, in a file and in CI there is a
    plain line for every round. `verbose` also logs every round, every candidate and every better instruction.

    Args:
        display: Whether to show the line.
        verbose: Whether to log.
        limits: Name of a budget, as in `live.spending` -> its limit, None without one. They tell the time left.
    """

    def __init__(self, display: bool, verbose: bool, limits: Mapping[str, float | None]) -> None:
        self._verbose = verbose
        self._num_rounds = limits.get("rounds")
        self._limits = {name: most for name, most in limits.items() if most}
        self._usage = Usage()
        self._trouble = ""
        self._first_usage: Usage | None = None  # what earlier processes of the run spent
        self._trajectory = Trajectory()
        self._first_round = 0  # the last one that earlier processes of the run decided
        self._round, self._round_seconds = 0, 0.0  # the last decided round, and when it was decided
        self._student: Trial | None = None
        self._best: RoundDecided | None = None
        self._started, self._shown = time.monotonic(), 0.0
        self._calls = deque([(self._started, 0)])  # (time, calls by then) in the last `RATE_SECONDS`
        is_live = (_is_terminal(sys.stdout) and not _is_ci()) or issubclass(tqdm, tqdm_notebook)
        self._is_plain = display and not is_live
        self._bar = tqdm(
            total=self._num_rounds,
            disable=not (display and is_live),
            desc="OPRO",
            bar_format="{desc}",  # a notebook adds its own bar
            # `_draw` shortens the line. tqdm shows nothing on a terminal that does not say its size.
            ncols=None if issubclass(tqdm, tqdm_notebook) else 1000,
            nrows=None if issubclass(tqdm, tqdm_notebook) else 1000,
            file=sys.stdout,
        )
        self._handlers = [] if self._bar.disable or not _is_terminal(sys.stdout) else _terminal_handlers()
        for handler in self._handlers:
            handler.addFilter(self._make_room)
        self._log_level = logging.INFO if verbose else logging.WARNING
        self._is_open = True
        _console.join(self._log_level)

    def resume(self, round_: int) -> None:
        """Begin after this round. `show` still gets the events up to this round, but prints no lines for them."""
        self._first_round = round_

    def show(self, event: Event | None, usage: Usage, trouble: str = "") -> None:
        """Show an event (or None), the usage so far, and what slows the run down at the moment."""
        if self._first_usage is None:
            self._first_usage = usage
            self._calls[0] = self._started, _calls(usage)
        self._usage, self._trouble = usage, trouble
        now = time.monotonic()
        self._calls.append((now, _calls(usage)))
        while now - self._calls[0][0] > RATE_SECONDS:
            self._calls.popleft()
        if isinstance(event, CandidatesProposed) and event.round > 0:
            candidates = counted(len(event.candidates), "candidate")
            self._log(
                "round %d: %s, %s not used", event.round, candidates, counted(len(event.dropped), "proposal")
            )
        elif isinstance(event, TrialFinished):
            self._trajectory = self._trajectory.add(event.trial)
            self._student = self._student or event.trial  # the first of all trials
            self._log("%s: %s", outcome(event.trial, self._trajectory), _first_words(event.trial))
        elif isinstance(event, RoundDecided):
            self._decided(event)
        if now - self._shown >= PAUSE_SECONDS:
            self._draw()

    def _decided(self, event: RoundDecided) -> None:
        before, self._best = self._best, event
        self._student = student = self._student or event.best
        self._round, self._round_seconds = event.round, time.monotonic() - self._started
        self._log("round %d decided, best score %s", event.round, score(event.best_score))
        if before is not None and before.best.id != event.best.id:
            data = f"{score(event.best_score)} on {scored_on(event.best)}"
            self._log(
                "better than before: %s; the student's score is %s.\n%s",
                *(data, score(student.score), changes(student.candidate, event.best.candidate)),
            )
        self._draw()
        if self._is_plain and sys.stdout is not None and event.round >= self._first_round:
            sys.stdout.write(f"{', '.join(self._parts())}\n")
            sys.stdout.flush()

    def _draw(self) -> None:
        """Draw the line. Of what does not fit the last parts are left out."""
        self._shown = time.monotonic()
        if self._bar.disable:
            return
        # Python 3.10 says 0 of a terminal that does not know its size.
        parts, width = self._parts(), (shutil.get_terminal_size().columns or 80) - 1
        while len(parts) > 1 and len(", ".join(parts)) > width:
            parts.pop()
        self._bar.n = self._round
        self._bar.set_description_str(", ".join(parts)[:width])

    def _parts(self) -> list[str]:
        usage = self._usage
        total = "" if self._num_rounds is None else f"/{self._num_rounds}"
        num_candidates = max(0, len(self._trajectory) - 1)  # without the student
        rate = self._calls_per_second()
        return [
            f"OPRO round {self._round}{total}",
            self._scores(),
            *([self._trouble] if self._trouble else ()),
            *([self._time()] if self._is_open else ()),
            cost(usage, 2, brief=True),
            counted(num_candidates, "candidate"),
            f"{rate:.1f} calls/s" if rate < 10 else f"{rate:.0f} calls/s",
        ]

    def _scores(self) -> str:
        if self._student is None or self._best is None:
            return "scoring the student"
        data = "train" if self._best.best.valset_score is None else "valset"
        first = score(self._student.score)
        if self._best.best.id == self._student.id:
            return f"{data} {first}"
        return f"{data} {first} -> {score(self._best.best_score)}"

    def _calls_per_second(self) -> float:
        (first, before), (last, calls) = self._calls[0], self._calls[-1]
        return (calls - before) / (last - first) if last > first else 0.0

    def _time(self) -> str:
        """The time until the first limit at the pace so far; without a limit the time since the start."""
        seconds = time.monotonic() - self._started
        now, then = (
            spending(self._round, self._usage, seconds),
            spending(self._first_round, self._first_usage or self._usage, 0),
        )
        known = []
        for name, most in self._limits.items():
            # Rounds are counted down from the one that was decided last.
            taken = self._round_seconds if name == "rounds" else seconds
            left = Limit(name, now[name] - then[name], most - then[name], taken).seconds_left
            if left is not None:
                known.append(left + taken - seconds)
        if not known:
            return f"{tqdm.format_interval(seconds)} so far"
        return f"{tqdm.format_interval(max(0.0, min(known)))} left"

    def close(self, has_failed: bool = False) -> None:
        """Leave the last state on the screen. A second call does nothing."""
        if self._is_open:
            self._is_open = False
            for handler in self._handlers:
                handler.removeFilter(self._make_room)
            self._draw()
            if not has_failed:  # a notebook shows a bar that is not full in red
                self._bar.total = self._bar.n
            self._bar.close()
            _console.leave(self._log_level)

    def _make_room(self, record: logging.LogRecord) -> bool:
        """A filter that lets every record pass. The line makes room for it, and the next tick draws the line again."""
        self._shown = time.monotonic()
        self._bar.clear()
        return True

    def _log(self, message: str, *values: object) -> None:
        if self._verbose:
            logger.info(message, *values)


def outcome(trial: Trial, trajectory: Trajectory) -> str:
    """How a race ended for a candidate. The score of a dropped candidate is an estimate."""
    reward, examples = score(reward_within(trial, trajectory)), counted(trial.num_scored, "example")
    if trial.state == "complete":
        return f"complete {reward} on {examples} ({trial.reason})"
    return f"{trial.state}, estimate {reward} from {examples} ({trial.reason})"


def scored_on(trial: Trial) -> str:
    """The data behind a trial's score in words."""
    if trial.valset_score is None:
        return counted(trial.num_scored, "train example")
    return counted(len(trial.valset_scores), "validation example")


def changes(student: Candidate, candidate: Candidate) -> str:
    """Every instruction whole. Words that are not the student's are marked as git does it: [-old-]{+new+}."""
    lines = []
    for name, text in candidate.instructions.items():
        marked = ""
        for words in word_diff(student.instructions[name], text):
            if words.is_same:
                marked += words.after
            else:
                gap = words.after or words.before
                marked += gap[: len(gap) - len(gap.lstrip())]
                marked += f"[-{words.before.strip()}-]" if words.before else ""
                marked += f"{{+{words.after.strip()}+}}" if words.after else ""
        lines += [f"  {name}{' (unchanged)' if text == student.instructions[name] else ''}:"]
        lines += [f"    {line}" for line in marked.splitlines()]
    if candidate.demo_set is not None:
        lines.append(f"  with demo set {candidate.demo_set}")
    return "\n".join(lines)


def _calls(usage: Usage) -> int:
    return usage.scorer_calls + usage.proposer_calls


def score(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "unknown"


def _is_terminal(stream: Any) -> bool:
    """Whether the stream is a terminal. `sys.stdout` may be None or an object without `isatty`."""
    return bool(getattr(stream, "isatty", lambda: False)())


def _is_ci() -> bool:
    """Whether the output is kept, as continuous integration does, so that a redrawn line is only noise."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


def _first_words(trial: Trial) -> str:
    """The beginning of the trial's first new instruction."""
    name, *_ = trial.candidate.rewritten or trial.candidate.instructions
    return normalise(trial.candidate.instructions[name])[:100]


def _has_handlers() -> bool:
    """Whether the application handles our log. The handler of a `run.log` does not count."""
    handlers = [*logger.handlers, *(logging.getLogger().handlers if logger.propagate else ())]
    return any(not getattr(handler, "belongs_to_run", False) for handler in handlers)


def _terminal_handlers() -> list[logging.Handler]:
    """The handlers of DSPy, its libraries and the application that may write to the terminal."""
    handlers = (handler for name in LOGGERS for handler in logging.getLogger(name).handlers)
    return [h for h in handlers if not isinstance(h, logging.FileHandler)]


class _Console(logging.Handler):
    """Shows the log of a run on stderr, above the progress line and in the format of DSPy's own log.

    It works only during a run, and only if the application has no handler of its own: a library must not set up
    logging, but without a handler `verbose=True` would show nothing in a plain script.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y/%m/%d %H:%M:%S")
        )
        self._levels: list[int] = []  # of the current runs
        self._has_set_level = False
        self._guard = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if _is_terminal(sys.stderr) and _is_terminal(sys.stdout):
            tqdm.write(text, file=sys.stderr)
        elif sys.stderr is not None:
            # If stdout is a file, `tqdm.write` would draw the line into it again for every record.
            sys.stderr.write(f"{text}\n")

    def join(self, level: int) -> None:
        """A run that shows records of this level begins."""
        with self._guard:
            if not self._levels and not _has_handlers():
                logger.addHandler(self)
            self._levels.append(level)
            self._set_level()

    def leave(self, level: int) -> None:
        """A run that showed records of this level ends."""
        with self._guard:
            self._levels.remove(level)
            self._set_level()
            if not self._levels:
                logger.removeHandler(self)

    def _set_level(self) -> None:
        """Set INFO for `verbose=True`, unless the application has set a level on this logger."""
        is_verbose = logging.INFO in self._levels
        if is_verbose and logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)
            self._has_set_level = True
        elif not is_verbose and self._has_set_level:
            logger.setLevel(logging.NOTSET)
            self._has_set_level = False


_console = _Console()


def announce(message: str) -> None:
    """Print a line above the progress line. Characters that stdout can't show become question marks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    tqdm.write(message.encode(encoding, "replace").decode(encoding), file=sys.stdout)
