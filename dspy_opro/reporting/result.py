"""`OPROResult`: the results, the trials and the spending of a run, as plain data that deep-copies and pickles."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dspy_opro.search.confidence import Gain
from dspy_opro.search.tasks import Failure
from dspy_opro.search.trajectory import Trajectory, Trial, Usage

from .examples import Examples

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class OPROResult:
    """The outcome of one `compile`. The returned program has it as `program.opro_result`."""

    trajectory: Trajectory
    """All decided trials in order; the first is the student itself."""
    curve: Sequence[float]
    """Best score after each round, from round 0. With a valset these are valset scores."""
    stop_reason: str
    """The reason why the run ended, e.g. "patience", "max_tokens", "interrupted"."""
    usage: Usage
    seconds: float
    """Wall time of this call."""
    failures: Sequence[Failure] = ()
    """The first 1,000 failed examples."""
    num_failures: int = 0
    selected_on: str = "trainset"
    """The data that decided the result: "valset" if there was one, otherwise "trainset"."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The run's settings as readable values."""
    study_name: str = ""
    problems: Sequence[str] = ()
    """The reason for each proposal that was not used (the first 1,000)."""
    returned: str = ""
    """Id of the candidate that the run returned. Empty stands for the best candidate."""
    gain: Gain | None = None
    """How certain the best candidate's gain over the student is. None if the student is the best candidate."""
    data: Examples = field(default=Examples(), repr=False)
    """The examples as text, with what the student and the best candidate gave on each."""

    def __deepcopy__(self, memo: Any) -> OPROResult:
        return self  # it never changes, and BestOfN and Refine copy the program with it on every call

    @property
    def best(self) -> Trial:
        """The trial of the returned program."""
        self._need_a_score()
        best = self.trajectory.best
        return next((t for t in self.trajectory.trials if t.id == self.returned), best)

    @property
    def baseline(self) -> Trial:
        """The student's own trial."""
        self._need_a_score()
        return self.trajectory.trials[0]

    @property
    def best_score(self) -> float:
        """Mean score of the returned program on the deciding data, in the metric's own scale."""
        best = self.best
        return best.reward if best.valset_score is None else best.valset_score

    @property
    def instructions(self) -> Mapping[str, str]:
        """Predictor name -> its instructions in the returned program."""
        return self.best.candidate.instructions

    def to_dicts(self) -> list[dict[str, Any]]:
        """One flat dict per trial: number, round, state, reward, valset score, instructions, reason of its end."""
        return [_row(number, trial) for number, trial in enumerate(self.trajectory.trials)]

    def to_dataframe(self) -> pandas.DataFrame:
        """`to_dicts()` as a `pandas.DataFrame`, one row per trial.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_dataframe() needs pandas: pip install 'dspy-opro[report]'.") from error
        return pandas.DataFrame(self.to_dicts())

    def save_report(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained HTML page: curve, trials, instructions before and after, spending.

        Args:
            path: The file. Missing directories are made.
        """
        from .report import write_report

        write_report(self, path)

    def summary(self) -> str:
        """A few lines to print."""
        trials = self.trajectory.trials
        pruned = sum(t.state == "pruned" for t in trials)
        candidates, rounds = max(0, len(trials) - 1), max(0, len(self.curve) - 1)  # without the student's
        usage, scorer_calls = self.usage, counted(self.usage.scorer_calls, "scorer call")
        cost = "cost unknown" if usage.tokens and not usage.cost else f"${usage.cost:.4f}"
        lines = [
            *self._confirmed(),
            f"score on {self.deciding_data}: {self._scores()} ({self.stop_reason})",
            f"{counted(candidates, 'candidate')} in {counted(rounds, 'round')}, {pruned} dropped early",
            f"{counted(usage.metric_calls, 'example')} scored (this call took {self.seconds:.1f} s)",
            f"{scorer_calls} and {counted(usage.proposer_calls, 'proposer call')} paid",
            f"{usage.cached_calls} from the cache, {counted(usage.tokens, 'token')}, {cost}",
        ]
        if self.num_failures:
            first = self.failures[0].error.partition("\n")[0]
            lines.append(f"{counted(self.num_failures, 'example')} failed, first: {first}")
        if self.problems and not candidates:
            first = self.problems[0].partition("\n")[0]
            lines.append(f"no proposal was used, first problem: {first}")
        return "\n".join(lines)

    @property
    def deciding_data(self) -> str:
        """The data behind the score in words, e.g. "100 of 400 train examples"."""
        given, trials = self.config.get("trainset"), self.trajectory.trials
        if self.selected_on == "trainset" and trials and given and trials[0].num_scored < given:
            return f"{trials[0].num_scored:,} of {given:,} train examples"
        return f"the {self.selected_on}"

    def _need_a_score(self) -> None:
        if not self.curve:
            raise ValueError(f"The run ended before the student was scored ({self.stop_reason}).")

    def _scores(self) -> str:
        if not self.curve:
            return "none, the run ended before the student was scored"
        return f"{self.curve[0]:.3f} -> {self.best_score:.3f}"

    def _confirmed(self) -> list[str]:
        """The gain and its certainty, in up to two sentences."""
        if self.gain is None:
            return []
        lines = [str(self.gain)]
        if self.best.id == self.baseline.id:
            lines.append("No instruction was reliably better than yours. The student is returned.")
        return lines


def counted(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _row(number: int, trial: Trial) -> dict[str, Any]:
    row = {
        "number": number,
        "round": trial.candidate.round,
        "state": trial.state,
        "reward": trial.reward,
        "num_scored": trial.num_scored,
        "valset_score": trial.valset_score,
        "num_failures": trial.num_failures,
        "reason": trial.reason,
        "id": trial.id[:12],
        "parent": (trial.candidate.parent or "")[:12],
        "rewritten": ", ".join(trial.candidate.rewritten),
        "demo_set": trial.candidate.demo_set,
    }
    return row | {f"instructions.{name}": text for name, text in trial.candidate.instructions.items()}
