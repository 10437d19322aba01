"""The progress line (with tqdm, like DSPy's own) and the log of a run on the screen."""

from __future__ import annotations

import logging
import sys
import threading
import time
from typing import Any

from tqdm.auto import tqdm

from dspy_opro.search.tasks import CandidatesProposed, Event, RoundDecided, TrialFinished
from dspy_opro.search.trajectory import Trial, Usage, normalise

logger = logging.getLogger("dspy_opro")


class Progress:
    """One line: round, time, best score, candidates, calls, tokens, cost.

    On a terminal it is drawn at most twice a second, in a file or a pipe once per round. `verbose` also logs every
    round and every candidate. `num_rounds` is None if the run has no such limit.
    """

    def __init__(self, display: bool, verbose: bool, num_rounds: int | None) -> None:
        self._verbose = verbose
        self._usage = Usage()
        self._trouble = ""
        self._num_trials = 0
        self._best: float | None = None  # not known yet
        self._shown = 0.0
        self._bar = tqdm(
            total=num_rounds,
            disable=not display,
            desc="OPRO",
            bar_format="{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}",
            dynamic_ncols=True,
            file=sys.stdout,
        )
        is_live = _is_terminal(sys.stdout) or hasattr(self._bar, "container")  # a notebook has the latter
        self._pause_seconds = 0.5 if is_live else float("inf")
        self._log_level = logging.INFO if verbose else logging.WARNING
        self._is_open = True
        _console.join(self._log_level)

    def show(self, event: Event | None, usage: Usage, trouble: str = "") -> None:
        """Show an event (or None), the usage so far, and what slows the run down at the moment."""
        self._usage = usage
        self._trouble = trouble
        if isinstance(event, CandidatesProposed) and event.round > 0:
            counts = event.round, len(event.candidates), len(event.dropped)
            self._log("round %d: %d candidates, %d proposals not used", *counts)
        elif isinstance(event, TrialFinished):
            self._num_trials += 1
            trial = event.trial
            values = trial.state, trial.reward, trial.num_scored, trial.reason, _first_words(trial)
            self._log("%s %.3f after %d examples (%s): %s", *values)
        elif isinstance(event, RoundDecided):
            self._best = event.best_score
            self._log("round %d decided, best score %.3f", event.round, event.best_score)
            if event.round > 0:
                self._bar.n += 1
            self.refresh(at_once=True)
        self.refresh()

    def refresh(self, at_once: bool = False) -> None:
        """Draw the line again, if the last time is long enough ago."""
        now = time.monotonic()
        if self._bar.disable or (now - self._shown < self._pause_seconds and not at_once):
            return
        self._shown = now
        usage, best = self._usage, "-" if self._best is None else f"{self._best:.3f}"
        num_calls = _short(usage.scorer_calls + usage.proposer_calls)
        self._bar.set_postfix_str(  # in this order it fits a terminal of 80 columns
            f"best {best}, {self._num_trials} candidates, {num_calls} calls, {_short(usage.tokens)} tokens, "
            f"${usage.cost:.2f}{', ' if self._trouble else ''}{self._trouble}"
        )

    def close(self) -> None:
        """Leave the last state on the screen. A second call does nothing."""
        if self._is_open:
            self._is_open = False
            self.refresh(at_once=True)
            self._bar.close()
            _console.leave(self._log_level)

    def _log(self, message: str, *values: object) -> None:
        if self._verbose:
            logger.info(message, *values)


def _is_terminal(stream: Any) -> bool:
    """Whether the stream is a terminal. `sys.stdout` may be None or an object without `isatty`."""
    return bool(getattr(stream, "isatty", lambda: False)())


def _short(count: int) -> str:
    """220k for 220,000."""
    return str(tqdm.format_sizeof(count)) if count >= 1000 else str(count)


def _first_words(trial: Trial) -> str:
    """The beginning of the trial's first new instruction."""
    name, *_ = trial.candidate.rewritten or trial.candidate.instructions
    return normalise(trial.candidate.instructions[name])[:100]


def _has_handlers() -> bool:
    """Whether the application handles our log. The handler of a `run.log` does not count."""
    handlers = [*logger.handlers, *(logging.getLogger().handlers if logger.propagate else ())]
    return any(not getattr(handler, "belongs_to_run", False) for handler in handlers)


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
    """Print a line above the progress line."""
    tqdm.write(message, file=sys.stdout)
