"""`OPROResult`: the results, the trials and the spending of a run, as plain data that deep-copies and pickles."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter, ValidationError

from dspy_opro.search.confidence import PROOF, PROOF_WITHOUT_FRESH, Gain, Interval
from dspy_opro.search.shared import SPLITS
from dspy_opro.search.tasks import Failure, Split
from dspy_opro.search.trajectory import Outcome, Trajectory, Trial, Usage

from .examples import Examples, ExampleText

if TYPE_CHECKING:
    import optuna
    import pandas
    import plotly.graph_objects


NOT_ENDED = "not ended"
"""The stop reason on record of a run that still runs or was killed."""


@dataclass(frozen=True, repr=False)
class OPROResult:
    """The outcome of one `compile`. The returned program has it as `program.opro_result`.

    Example:
        >>> from dspy_opro import OPROTeleprompter
        >>> from dspy_opro.testing import ScriptedLM, VocabularyTask
        >>> task = VocabularyTask(seed=1)
        >>> teleprompter = OPROTeleprompter(
        ...     metric=task.metric,
        ...     prompt_model=ScriptedLM(task.proposer),
        ...     task_model=ScriptedLM(task.scorer),
        ...     max_metric_calls=200,
        ...     display_progress=False,
        ... )
        >>> program = teleprompter.compile(task.student(), trainset=task.trainset(40))
        >>> result = program.opro_result
        >>> result.stop_reason
        'max_metric_calls'
        >>> result.best_score > result.baseline.score
        True
        >>> result.usage.metric_calls <= 200
        True
    """

    trajectory: Trajectory
    """All decided trials in order; the first is the student itself."""
    curve: Sequence[float]
    """Best score after each round, from round 0, on the data that `selected_on` names."""
    stop_reason: str
    """The reason why the run ended, e.g. "patience", "max_tokens", "interrupted"."""
    usage: Usage
    """What all processes of the run spent."""
    seconds: float
    """Wall time of this call."""
    failures: Sequence[Failure] = ()
    """The first 1,000 failed examples."""
    num_failures: int = 0
    """All failed examples."""
    selected_on: str = "trainset"
    """The data that chose the result: "trainset", or "valset" if the valset did not only confirm it.

    The valset chooses with `confirm=False`, if demos are scored examples, and if fewer than 8 examples can confirm.
    """
    config: Mapping[str, Any] = field(default_factory=dict)
    """The run's settings: argument -> readable value. `trainset` and `valset` are numbers of examples."""
    study_name: str = ""
    """The name of the run's Optuna study."""
    problems: Sequence[str] = ()
    """The reason for each proposal that was not used (the first 1,000)."""
    returned: str = ""
    """Id of the candidate that the run returned. If it is empty, the run returned the best candidate."""
    gain: Gain | None = None
    """How certain the best candidate's gain over the student is. None if no candidate is better than the student."""
    earlier_usage: Usage = field(default=Usage())
    """What earlier processes of the run spent, as far as they recorded it."""
    error: str = ""
    """The error that ended the run, in brief."""
    data: Examples = field(default=Examples())
    """The examples as text, with the predictions of the student and of the best candidate."""
    messages: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Predictor name -> the returned program's prompt. `prompts()` shows it."""

    def __repr__(self) -> str:
        return "OPROResult:\n  " + self.summary().replace("\n", "\n  ")

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from .notebook import as_html

        return as_html(self)

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
        return self.best.score

    @property
    def instructions(self) -> Mapping[str, str]:
        """Predictor name -> its instructions in the returned program."""
        return self.best.candidate.instructions

    @property
    def trials(self) -> Sequence[Trial]:
        """All decided trials in order; the first is the student itself."""
        return self.trajectory.trials

    def prompts(self, format: Literal["messages", "text"] = "messages") -> Mapping[str, Any]:
        """The returned program's prompts, for use outside DSPy, as its adapter wrote them when the run ended.

        Args:
            format: "messages" gives a list of dicts with `role` and `content`, "text" one text.

        Returns:
            Predictor name -> its prompt: instructions, demos, and `{field}` in place of each input.

        Raises:
            ValueError: The format is unknown.
        """
        if format not in ("messages", "text"):
            raise ValueError(f'format must be "messages" or "text", but got {format!r}.')
        if format == "messages":
            return self.messages
        return {name: "\n\n".join(map(_text, messages)) for name, messages in self.messages.items()}

    def pareto(self, by: str = "length") -> Sequence[Trial]:
        """The trials that no other one beats in two numbers: the score on the deciding data, and another one.

        Args:
            by: "length" is the prompt's, in characters, where less is better. Any other text names a subscore of the
                metric, where more is better.

        Returns:
            The trials, the best score first. Only those with a full score are compared.

        Raises:
            ValueError: No trial has such a subscore.
        """
        known = {name for _, trial in self.scored() for name in trial.subscores}
        if by != "length" and by not in known:
            raise ValueError(
                f'by must be "length" or a subscore, but got {by!r}. Subscores: {sorted(known) or "none"}.'
            )

        def other(trial: Trial) -> float:
            return -trial.candidate.length if by == "length" else trial.subscores.get(by, -math.inf)

        front: list[Trial] = []
        for _, trial in sorted(self.scored(), key=lambda pair: (pair[0], other(pair[1])), reverse=True):
            if not front or other(trial) > other(front[-1]):
                front.append(trial)
        return front

    def to_dicts(self) -> list[dict[str, Any]]:
        """One flat dict per trial: number, round, state, reward, valset score, instructions, why its race ended.

        The reward of a dropped candidate is an estimate from `num_scored` examples, and `is_estimate` says so.
        """
        return [self._row(number, trial) for number, trial in enumerate(self.trials)]

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

    def examples(self) -> list[dict[str, Any]]:
        """One flat dict per scored example and trial; `pandas.DataFrame(result.examples())` makes a table of them.

        `split` is "train", "val" or "unseen". `example` is the index in the trainset or valset as it was given; unseen
        examples come from the valset if there is one, otherwise from the trainset. `trial` is the number in `trials`.
        Every row has `score` and the example's own fields (`inputs.…`, `expected.…`). Only rows of the student, of the
        best candidate and of the returned one have `prediction`, `feedback`, `error` and `subscores.…`, as text of
        limited length. If the result was read from a storage, the example's own fields are missing, and `example` is
        the position in the run's order.
        """
        rows = []
        for number, trial in enumerate(self.trials):
            for split in SPLITS:
                texts = self.data.texts.get(split, ())
                kept = self.data.outcomes.get(trial.id, {}).get(split, ())
                for position, score in enumerate(self.scores_of(trial, split)):
                    if score is not None and position < len(texts):
                        outcome = kept[position] if position < len(kept) else None
                        row = {
                            "split": split,
                            "example": texts[position].index,
                            "trial": number,
                            "score": score,
                        }
                        rows.append(row | _outcome_row(outcome) | _text_row(texts[position]))
        return rows

    def scores_of(self, trial: Trial, split: Split) -> Sequence[float | None]:
        """A trial's scores on a split, by position in the run's order."""
        if split == "train":
            scores = trial.scores_by_position
            return [scores.get(position) for position in range(max(scores, default=-1) + 1)]
        if split == "val":
            return trial.valset_scores
        outcomes = self.data.outcomes.get(trial.id, {}).get(split, ())
        return [None if outcome is None else outcome.score for outcome in outcomes]

    def reward_of(self, trial: Trial) -> float:
        """A trial's reward. An estimate stays within the range of the scores in the run."""
        return reward_within(trial, self.trajectory)

    @property
    def study(self) -> optuna.Study:
        """The run as an Optuna study, e.g. for `optuna.visualization.plot_optimization_history(result.study)`.

        It comes from the run's storage if that was a URL without a password or a `log_dir`, and is still there.
        Otherwise every access makes a new one in memory.
        """
        from dspy_opro.storage.loading import load_study, study_of

        found = load_study(self.study_name, self.config.get("storage"), self.config.get("log_dir"))
        return study_of(self.study_name, self.trajectory.trials) if found is None else found

    # -- files and figures -----------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result as JSON. Missing directories are made."""
        values = asdict(self)
        values["trajectory"].pop("known_leaders")  # two of the trials once more
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(values, ensure_ascii=False, default=_listed)
        file.write_text(text, encoding="utf-8", errors="replace")  # half of a surrogate pair has no UTF-8

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> OPROResult:
        """Read what `save` wrote.

        Raises:
            ValueError: The file holds no result.
        """
        try:
            return TypeAdapter(cls).validate_json(Path(path).read_bytes())
        except ValidationError as error:
            what = " ".join(map(str, [*error.errors()[0]["loc"], error.errors()[0]["msg"]]))
            raise ValueError(
                f"{path} holds no OPROResult ({what}). Give a file that result.save(...) wrote, or result.json of a "
                "log_dir. A program is read with program.load(...)."
            ) from None

    def plot_history(self) -> plotly.graph_objects.Figure:
        """The best score after each round, and every candidate. Estimates have open markers.

        Raises:
            ImportError: plotly is not installed, and likewise for the other figures.
        """
        return _plots().history(self)

    def plot_examples(self) -> plotly.graph_objects.Figure:
        """A heat map of the scores: a row for every candidate, a column for every train example."""
        return _plots().examples(self)

    def plot_lineage(self) -> plotly.graph_objects.Figure:
        """Which candidate came from which, by round and score."""
        return _plots().lineage(self)

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
        end = self.stop_reason if self.stop_reason == NOT_ENDED else f"stop reason: {self.stop_reason}"
        usage, scorer_calls = self.usage, counted(self.usage.scorer_calls, "scorer call")
        took = "this call took" if self.data.has_texts else "recorded for"  # a storage has no texts
        lines = [
            *self._confirmed(),
            f"score on {self.deciding_data}: {self._scores()} ({end})",
            f"{counted(candidates, 'candidate')} in {counted(rounds, 'round')}, {pruned} dropped early",
            f"{counted(usage.metric_calls, 'example')} scored ({took} {self.seconds:.1f} s)",
            f"{scorer_calls} and {counted(usage.proposer_calls, 'proposer call')} paid",
            f"{usage.cached_calls} from the cache, {counted(usage.tokens, 'token')}, {cost(usage)}",
        ]
        if self.earlier_usage.metric_calls:
            now = usage - self.earlier_usage
            calls = counted(now.scorer_calls + now.proposer_calls, "call")
            lines.append(f"of that, this process: {calls} paid, {counted(now.tokens, 'token')}, {cost(now)}")
        if self.error:
            lines.append(f"the error that ended the run: {' '.join(self.error.split())}")
        if self.num_failures:
            first = self.failures[0].error.partition("\n")[0]
            lines.append(f"{counted(self.num_failures, 'example')} failed, first: {first}")
        if self.problems and not candidates:
            first = self.problems[0].partition("\n")[0]
            lines.append(f"no proposal was used, first problem: {first}")
        return "\n".join(lines)

    # -- the names of GEPA's `detailed_results` --------------------------------------------------

    @property
    def candidates(self) -> Sequence[Mapping[str, str]]:
        """The instructions of every candidate with a full score on the deciding data. The student is the first."""
        return [trial.candidate.instructions for _, trial in self.scored()]

    @property
    def val_aggregate_scores(self) -> Sequence[float]:
        """The mean score of each of `candidates` on the deciding data."""
        return [score for score, _ in self.scored()]

    @property
    def best_idx(self) -> int:
        """The index of the returned program in `candidates`."""
        return [trial.id for _, trial in self.scored()].index(self.best.id)

    @property
    def best_candidate(self) -> Mapping[str, str]:
        """`instructions`."""
        return self.instructions

    @property
    def total_metric_calls(self) -> int:
        """Examples scored, as `usage.metric_calls`. GEPA's name for it."""
        return self.usage.metric_calls

    def scored(self) -> Sequence[tuple[float, Trial]]:
        """Score and trial of every full score on the deciding data, in order."""
        trials = [t for t in self.trials if t.state == "complete"]
        if self.selected_on == "valset":
            return [(t.valset_score, t) for t in trials if t.valset_score is not None]
        return [(t.reward, t) for t in trials]

    # -- words -----------------------------------------------------------------------------------

    @property
    def deciding_data(self) -> str:
        """The data behind the score in words, e.g. "100 of 400 train examples"."""
        split: Split = "val" if self.selected_on == "valset" else "train"
        scores = self.scores_of(self.trials[0], split) if self.trials else ()
        used, given = sum(score is not None for score in scores), self.config.get(self.selected_on) or 0
        noun = "validation" if split == "val" else "train"
        return f"{used:,} of {given:,} {noun} examples" if 0 < used < given else f"the {self.selected_on}"

    def _need_a_score(self) -> None:
        if not self.curve:
            raise ValueError(f"The run ended before the student was scored ({self.stop_reason}).")

    def _scores(self) -> str:
        if not self.curve:
            return "none, the run ended before the student was scored"
        return f"{self.baseline.score:.3f} -> {self.best_score:.3f}"

    def _confirmed(self) -> list[str]:
        """The gain with its interval and what is returned, in up to three sentences."""
        has_demos = bool(self.curve) and self.best.candidate.demo_set is not None
        shown = ["The returned program shows demos to the LM."] if has_demos else []
        if self.gain is None:
            return [*self.verdict(), *shown]
        # One example gives no interval.
        lines = [str(self.gain)] if self.gain.interval.num_examples > 1 else []
        return [*lines, *self.verdict(), *shown]

    def headline(self) -> str:
        """The outcome in a line: the scores and what was returned."""
        said = self._confirmed()
        if self.gain is None or self.gain.interval.num_examples < 2:
            said.insert(0, f"score on {self.deciding_data} {self._scores()}")
        return " ".join(text if text.endswith(".") else f"{text}." for text in said)

    def verdict(self) -> list[str]:
        """What the run returned and why, in sentences."""
        gain = self.gain
        if gain is None:
            return self._without_gain()
        if self.best.id == self.baseline.id:
            return ["No instruction was reliably better than yours. The student is returned."]
        is_best = self.best.id == self.trajectory.best.id
        is_resumed = self.earlier_usage.metric_calls > 0
        if not gain.is_proven and (not is_best or (self._confirms and is_resumed)):
            new = "" if is_best else "No new instruction was reliably better. "
            return [f"{new}The program on record is returned."]
        is_chosen_by_proof = gain.is_proven and self._confirms
        said = [_reason(gain.interval)] if is_chosen_by_proof and gain.interval.low <= 0 else []
        if abs(gain.value - gain.interval.estimate) >= 0.0005:
            # Only high gains are returned, so the gains that are told are too high on average (decision 0014).
            said.append(f"Expected gain, corrected for this choice: {gain.value:+.3f}.")
        if not is_best:
            said.append("A shorter prompt is as good as the best one, and is returned.")
        return said

    @property
    def _confirms(self) -> bool:
        return self.config.get("confirm") is not False and self.config.get("auto") != "paper"

    def _without_gain(self) -> list[str]:
        """The verdict where no candidate scored better than the student. It says what is left of the budget."""
        if self.stop_reason == NOT_ENDED or len(self.trials) < 2 or self.best.id != self.baseline.id:
            return []
        said = ["No instruction scored better than yours. The student is returned."]
        left = (self.config.get("max_metric_calls") or 0) - self.usage.metric_calls
        if self.stop_reason == "max_metric_calls" and self._confirms and left > 0:
            said.append(f"Left of the budget: {counted(left, 'example')}. There was no gain to confirm.")
        return said

    def _row(self, number: int, trial: Trial) -> dict[str, Any]:
        row = {
            "number": number,
            "round": trial.candidate.round,
            "state": trial.state,
            "reward": self.reward_of(trial),
            "is_estimate": trial.state != "complete",
            "num_scored": trial.num_scored,
            "valset_score": trial.valset_score,
            "num_failures": trial.num_failures,
            "reason": trial.reason,
            "id": trial.id[:12],
            "parent": (trial.candidate.parent or "")[:12],
            "rewritten": ", ".join(trial.candidate.rewritten),
            "demo_set": trial.candidate.demo_set,
            "length": trial.candidate.length,
        }
        row |= {f"subscores.{name}": value for name, value in trial.subscores.items()}
        return row | {f"instructions.{name}": text for name, text in trial.candidate.instructions.items()}


def _reason(interval: Interval) -> str:
    """Why a candidate is returned whose interval includes no gain."""
    if interval.estimate == 0:
        return (
            "The candidate equals the student on unseen examples. It is returned for its lead in the search."
        )
    proof, also = PROOF_WITHOUT_FRESH, ""
    if interval.basis == "fresh":
        proof, also = PROOF, ", with the search's own examples,"
    why = f"because{also} a gain is at least {proof:.0%} probable"
    return f"The interval includes no gain. The candidate is returned {why}."


def counted(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _outcome_row(outcome: Outcome | None) -> dict[str, Any]:
    if outcome is None:
        return {"prediction": None, "feedback": None, "error": None}
    row = {"prediction": outcome.output, "feedback": outcome.feedback, "error": outcome.error}
    return row | {f"subscores.{name}": value for name, value in (outcome.subscores or {}).items()}


def _text_row(text: ExampleText) -> dict[str, str]:
    inputs = {f"inputs.{name}": value for name, value in text.inputs.items()}
    return inputs | {f"expected.{name}": value for name, value in text.expected.items()}


def reward_within(trial: Trial, trajectory: Trajectory) -> float:
    """A trial's reward. An estimate is cut to the range of the scores in the run."""
    low, high = trajectory.score_range
    return trial.reward if trial.state == "complete" else min(max(trial.reward, low), high)


def cost(usage: Usage, digits: int = 4, brief: bool = False) -> str:
    """Dollars in words. If it is not `brief`, it says how many calls have no known price."""
    dollars, unpriced = known_cost(usage), usage.unpriced_calls
    if dollars is None:
        return "cost unknown"
    calls = "" if brief else f" ({counted(unpriced, 'call')} without a known price)"
    return f"at least ${dollars:,.{digits}f}{calls}" if unpriced else f"${dollars:,.{digits}f}"


def known_cost(usage: Usage) -> float | None:
    """Dollars of the calls that have a price, or None if there are paid calls and none of them has one."""
    is_unknown = 0 < usage.scorer_calls + usage.proposer_calls <= usage.unpriced_calls
    return None if is_unknown or not math.isfinite(usage.cost) else usage.cost


def _text(message: Mapping[str, Any]) -> str:
    """A message for people and for models that take one text."""
    content = message.get("content") or ""
    if not isinstance(content, str):  # parts, e.g. of a demo with an image
        parts = [part.get("text", f"<{part.get('type')}>") for part in content]
        content = "\n".join(parts)
    return f"{str(message['role']).capitalize()}:\n{content}"


def _listed(value: Any) -> Any:
    """An array of scores, or any other mapping, as JSON's own."""
    return dict(value) if isinstance(value, Mapping) else list(value)


def _plots() -> Any:
    try:
        from . import plots
    except ImportError as error:
        raise ImportError("Figures need plotly: pip install 'dspy-opro[report]'.") from error
    return plots
