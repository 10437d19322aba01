"""The progress line (tqdm, as DSPy's own) and the log of a run."""

from __future__ import annotations

import logging
import sys
import threading
import time
from typing import Any

from tqdm.auto import tqdm

from dspy_opro.search.tasks import CandidatesProposed, Event, RoundDecided, TrialFinished
from dspy_opro.search.trajectory import Trial, Usage

logger = logging.getLogger("dspy_opro")


class Progress:
    """One line: round, time, best score, candidates, calls, tokens, cost.

    Drawn twice a second at most, and into a file or a pipe once a round.

    Args:
        display: Whether to show it.
        verbose: Whether to log each round's proposals and drops too.
        num_rounds: Rounds at most, where that is known.
    """

    def __init__(self, display: bool, verbose: bool, num_rounds: int | None) -> None:
        self._verbose = verbose
        self._usage = Usage()
        self._num_trials = 0
        self._best = float("nan")
        self._shown = 0.0
        self._bar = tqdm(
            total=num_rounds,
            disable=not display,
            desc="OPRO",
            bar_format="{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}",
            dynamic_ncols=True,
            file=sys.stdout,
        )
        is_live = _is_terminal(sys.stdout) or hasattr(self._bar, "container")  # the latter is a notebook's
        self._pause_seconds = 0.5 if is_live else float("inf")
        self._log_level = logging.INFO if verbose else logging.WARNING
        self._is_open = True
        _console.join(self._log_level)

    def show(self, event: Event | None, usage: Usage) -> None:
        """Take in an event, or None, and what was spent so far."""
        self._usage = usage
        if isinstance(event, CandidatesProposed) and event.round > 0:
            self._log(
                "round %d: %d candidates, %d proposals not used",
                event.round,
                len(event.candidates),
                len(event.dropped),
            )
        elif isinstance(event, TrialFinished):
            self._num_trials += 1
            trial = event.trial
            self._log(
                "%s %.3f after %d examples (%s): %s",
                trial.state,
                trial.reward,
                trial.num_scored,
                trial.reason,
                _first_words(trial),
            )
        elif isinstance(event, RoundDecided):
            self._best = event.best_score
            self._log("round %d decided, best score %.3f", event.round, event.best_score)
            if event.round > 0:
                self._bar.n += 1
            self.refresh(at_once=True)
        self.refresh()

    def refresh(self, at_once: bool = False) -> None:
        """Draw the line anew, if it is time."""
        now = time.monotonic()
        if self._bar.disable or (now - self._shown < self._pause_seconds and not at_once):
            return
        self._shown = now
        usage = self._usage
        self._bar.set_postfix_str(
            # In this order it fits a terminal of 80 columns.
            f"best {self._best:.3f}, {self._num_trials} candidates, "
            f"{_short(usage.scorer_calls + usage.proposer_calls)} calls, {_short(usage.tokens)} tokens, "
            f"${usage.cost:.2f}",
            refresh=True,
        )

    def close(self) -> None:
        """Leave the last state on the screen; a second call does nothing."""
        if self._is_open:
            self._is_open = False
            self.refresh(at_once=True)
            self._bar.close()
            _console.leave(self._log_level)

    def _log(self, message: str, *values: object) -> None:
        if self._verbose:
            logger.info(message, *values)


def _is_terminal(stream: Any) -> bool:
    """Whether somebody looks at it; None where there is none, and what stands in for one need not know."""
    return bool(getattr(stream, "isatty", lambda: False)())


def _short(count: int) -> str:
    """220k for 220,000."""
    return str(tqdm.format_sizeof(count)) if count >= 1000 else str(count)


def _first_words(trial: Trial) -> str:
    """The beginning of what the trial rewrote."""
    names = trial.candidate.rewritten or tuple(trial.candidate.instructions)
    return " ".join(trial.candidate.instructions[names[0]].split())[:100]


class _Console(logging.Handler):
    """Shows what a run logs on stderr, in the form of DSPy's own log, above the progress line.

    As long as a run is under way, and only where the application has no handler of its own: a library must not
    set up logging, and without this `verbose=True` would show nothing in a plain script.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y/%m/%d %H:%M:%S")
        )
        self._levels: list[int] = []  # of the runs under way
        self._has_set_level = False
        self._guard = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if _is_terminal(sys.stderr) and _is_terminal(sys.stdout):
            tqdm.write(text, file=sys.stderr)
        elif sys.stderr is not None:
            # `tqdm.write` would draw the line anew for each record, into the file that stdout is
            sys.stderr.write(f"{text}\n")

    def join(self, level: int) -> None:
        """A run begins that wants to show this level."""
        with self._guard:
            if not self._levels and not logger.hasHandlers():
                logger.addHandler(self)
            self._levels.append(level)
            self._set_level()

    def leave(self, level: int) -> None:
        """A run is over that wanted to show this level."""
        with self._guard:
            self._levels.remove(level)
            self._set_level()
            if not self._levels:
                logger.removeHandler(self)

    def _set_level(self) -> None:
        """`verbose=True` asks for INFO where nobody has set a level on this very logger."""
        is_verbose = logging.INFO in self._levels
        if is_verbose and logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)
            self._has_set_level = True
        elif not is_verbose and self._has_set_level:
            logger.setLevel(logging.NOTSET)
            self._has_set_level = False


_console = _Console()


def announce(message: str) -> None:
    """A line on the screen that does not tear the progress line."""
    tqdm.write(message, file=sys.stdout)
