"""The visible study: every candidate is one parameterless Optuna trial. What is there already is not written again."""

from __future__ import annotations

import json
import logging
import re
import textwrap
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from dspy_opro.search.tasks import CandidatesProposed, Event, Failure, TrialFinished, TrialReported
from dspy_opro.search.trajectory import Candidate, Outcome, State, Trial, Usage, to_array, unless_first

from .opening import storage_of
from .outage import Outage
from .result_log import clip, encode_usage

logger = logging.getLogger("dspy_opro")

STATES: Mapping[State, TrialState] = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
NAMES = {state: name for name, state in STATES.items()}
"""State of an Optuna trial -> that of ours."""
Outcomes = Mapping[tuple[str, str], Sequence[Outcome | None]]
"""Id of a candidate and split -> its outcomes by position; None where one is not on record."""
ATTR_LIMIT = 60_000
"""Bytes of JSON that MySQL's TEXT holds with room to spare."""
BEST_TRIAL = (
    'The "best trial" of Optuna has the highest value, which is the mean score on the train examples. A valset, or the '
    "examples that the search never used, may have decided for another trial."
)


@dataclass
class _Row:
    trial_id: int
    steps: set[int] = field(default_factory=set)
    """What is reported already."""
    is_finished: bool = False


class RunStudy(optuna.Study):
    """The visible study. Its `stop()` works in a callback although nothing is under way in `optimize`."""

    is_stopped = False

    def stop(self) -> None:
        """End the run, from a callback."""
        self.is_stopped = True


class TrialWriter:
    """Shows a run in its study.

    Trials finish in the order of their numbers: callbacks that log by the number, as that of Weights & Biases, drop
    what comes later with a lower one.

    Args:
        study: Where the trials are.
        callbacks: Called with `(study, trial)` once a trial is told. What they raise is logged.
        with_notes: Whether trials get a note for optuna-dashboard.
        outage: Told when a write fails or works again.
    """

    def __init__(
        self,
        study: RunStudy,
        callbacks: Sequence[Callable[[optuna.Study, FrozenTrial], None]],
        with_notes: bool,
        outage: Outage,
    ) -> None:
        self.study = study
        self._storage, self._study_id = storage_of(study)
        self._callbacks = callbacks
        self._with_notes = with_notes
        self._outage = outage
        self._unwritten: deque[Event] = deque()
        self._unfinished: deque[str] = deque()  # candidate ids, in the order of their trials' numbers
        self._held: dict[str, TrialFinished] = {}  # candidate id -> finished before an earlier one
        self._rows: dict[str, _Row] | None = None  # candidate id -> its trial; None until read from the study

    def show(self, event: Event) -> None:
        """Take in an event, and write it with what could not be written before."""
        if isinstance(event, TrialFinished):
            self._held[event.trial.id] = event
            while self._unfinished and self._unfinished[0] in self._held:
                self._unwritten.append(self._held.pop(self._unfinished.popleft()))
        else:
            if isinstance(event, CandidatesProposed):
                self._unfinished.extend(candidate.id for candidate in event.candidates)
            self._unwritten.append(event)
        self.write()

    def write(self) -> None:
        """Bring the study up to date. What can't be written is kept for the next call."""
        if not self._unwritten:
            return
        try:
            self._write_all()
        except Exception as error:
            self._outage.failed(error, "trials")
        else:
            self._outage.worked("trials")

    def close(
        self,
        stop_reason: str,
        fail_unfinished: bool,
        returned: Trial | None = None,
        is_confirmed: bool = False,
    ) -> None:
        """Write the last events and the reason. It raises what the storage raises and may be called again.

        Args:
            stop_reason: Why the run ended.
            fail_unfinished: Whether trials under way are closed. Otherwise the next process goes on with them.
            returned: The trial of the program that the run returns.
            is_confirmed: Whether the run would have returned another one if no gain were proven.
        """
        self._unwritten.extend(self._held.values())
        self._held.clear()
        self._write_all()
        self.study.set_user_attr("stop_reason", stop_reason)
        for row in (self._rows or {}).values() if fail_unfinished else ():
            if not row.is_finished:
                self._storage.set_trial_user_attr(row.trial_id, "reason", f"the run ended: {stop_reason}")
                self._storage.set_trial_state_values(row.trial_id, TrialState.FAIL)
                row.is_finished = True
        if returned is not None:
            self._mark_returned(returned, is_confirmed)
        self._outage.worked("trials")

    def _mark_returned(self, returned: Trial, is_confirmed: bool) -> None:
        """Mark it in the study and in the notes: Optuna lets nobody change the attributes of a finished trial."""
        row = self._known_rows().get(returned.id)
        if row is None:
            return
        number = self._storage.get_trial(row.trial_id).number
        self.study.set_user_attr("returned_trial", number)
        if is_confirmed:
            self.study.set_user_attr("confirmed_trial", number)
        if self._with_notes:
            words = "**The run returned this trial.** If it was resumed since, the study's note names the latest one."
            self._write_note(row.trial_id, f"{words}\n\n{note(returned)}")
            self._write_note(None, f"**Trial {number} is the one that the run returned.** {BEST_TRIAL}")

    def _write_all(self) -> None:
        rows, self._rows = self._known_rows(), None  # after a failure they are read anew
        while self._unwritten:
            event = self._unwritten[0]
            if isinstance(event, CandidatesProposed):
                for candidate in event.candidates:
                    self._propose(rows, candidate)
            elif isinstance(event, TrialReported):
                self._report(rows[event.candidate.id], event)
            elif isinstance(event, TrialFinished):
                self._finish(rows[event.trial.id], event)
            self._unwritten.popleft()
        self._rows = rows

    def _known_rows(self) -> dict[str, _Row]:
        if self._rows is not None:
            return self._rows
        rows: dict[str, _Row] = {}
        for trial in self.study.get_trials(deepcopy=False):
            candidate = trial.user_attrs.get("candidate_id")
            if candidate is not None and trial.state != TrialState.FAIL:
                trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)
                row = _Row(trial_id, set(trial.intermediate_values), trial.state.is_finished())
                rows.setdefault(candidate, row)
        return rows

    def _propose(self, rows: dict[str, _Row], candidate: Candidate) -> None:
        """Create the candidate's trial with all that is known of it, in one write."""
        if candidate.id in rows:
            return
        template = create_trial(state=TrialState.RUNNING, user_attrs=candidate_attrs(candidate))
        rows[candidate.id] = _Row(self._storage.create_new_trial(self._study_id, template))

    def _report(self, row: _Row, event: TrialReported) -> None:
        if not row.is_finished and event.step not in row.steps:
            self._storage.set_trial_intermediate_value(row.trial_id, event.step, event.value)
            row.steps.add(event.step)

    def _finish(self, row: _Row, event: TrialFinished) -> None:
        """Write the result and close the trial, then call the callbacks."""
        if row.is_finished:
            return
        trial = event.trial
        for key, value in result_attrs(trial, event.failures).items():
            self._storage.set_trial_user_attr(row.trial_id, key, value)
        if self._with_notes:
            self._write_note(row.trial_id, note(trial))
        self._storage.set_trial_state_values(row.trial_id, STATES[trial.state], [trial.reward])
        row.is_finished = True
        self._call_back(row.trial_id)

    def _call_back(self, trial_id: int) -> None:
        if not self._callbacks:
            return
        frozen = self._storage.get_trial(trial_id)
        for callback in self._callbacks:
            try:
                callback(self.study, frozen)
            except BaseException:  # also a sys.exit(): the run is worth more than what somebody draws of it
                logger.warning(
                    "A callback failed on trial %d; the run goes on.", frozen.number, exc_info=True
                )

    def _write_note(self, trial_id: int | None, body: str) -> None:
        """As `save_note` of optuna-dashboard 0.21 does, whose package need not be installed here. None: the study's."""
        prefix, size = "dashboard:" if trial_id is None else f"dashboard:{trial_id}:", 2045
        self._storage.set_study_system_attr(self._study_id, f"{prefix}note_ver", 1)
        for number, start in enumerate(range(0, len(body), size)):
            part = body[start : start + size]
            self._storage.set_study_system_attr(self._study_id, f"{prefix}note_str:{number}", part)


def candidate_attrs(candidate: Candidate) -> dict[str, Any]:
    """A candidate as a trial's attributes. Its texts are cut where a database column would not hold them."""
    texts = dict(candidate.instructions)
    attrs: dict[str, Any] = {
        "candidate_id": candidate.id,
        "instructions": texts,
        "round": candidate.round,
        "rewritten": list(candidate.rewritten),
        "parent": candidate.parent,
    }
    if len(json.dumps(texts)) > ATTR_LIMIT:
        # JSON writes a character as six at most, rare ones as twelve.
        room = ATTR_LIMIT // (6 * len(texts))
        attrs |= {"instructions": {name: clip(text, room) for name, text in texts.items()}, "is_cut": True}
    if candidate.demo_set is not None:
        attrs["demo_set"] = candidate.demo_set
    return attrs


def result_attrs(trial: Trial, failures: Sequence[Failure]) -> dict[str, Any]:
    attrs: dict[str, Any] = {
        "num_scored": trial.num_scored,
        "reason": trial.reason,
        "usage": encode_usage(trial.usage),
    }
    if trial.positions:
        attrs["positions"] = list(trial.positions)
    if trial.valset_score is not None:
        attrs["valset_score"] = trial.valset_score
    if trial.num_failures:
        attrs["num_failures"] = trial.num_failures
        attrs["failures"] = [
            {"split": f.split, "position": f.example, "cause": clip(f.error)} for f in failures
        ]
    if trial.subscores:
        attrs["subscores"] = dict(trial.subscores)
    return attrs


def is_decided(frozen: FrozenTrial) -> bool:
    """Whether it has all that `read_trial` reads."""
    return frozen.state in NAMES and "num_scored" in frozen.user_attrs


def read_trial(frozen: FrozenTrial, outcomes: Outcomes) -> Trial:
    """The trial that was written as `candidate_attrs` and `result_attrs` say."""
    attrs = frozen.user_attrs
    candidate = Candidate(
        attrs["instructions"],
        attrs["round"],
        attrs["parent"],
        tuple(attrs["rewritten"]),
        attrs.get("demo_set"),
    )
    id_, valset_score = attrs["candidate_id"], attrs.get("valset_score")
    known = dict(enumerate(outcomes.get((id_, "train"), ())))
    positions = attrs.get("positions", range(attrs["num_scored"]))
    found = {p: outcome for p in positions if (outcome := known.get(p)) is not None}
    return Trial(
        candidate,
        frozen.value if frozen.value is not None else 0.0,
        attrs["num_scored"],
        NAMES[frozen.state],
        attrs["reason"],
        valset_score,
        attrs.get("num_failures", 0),
        _scores(found.values()),
        () if valset_score is None else _scores(outcomes.get((id_, "val"), ())),
        unless_first(found),
        subscores=attrs.get("subscores", {}),
        usage=Usage(**attrs["usage"]),
    )


def _scores(outcomes: Iterable[Outcome | None]) -> Sequence[float]:
    return to_array(outcome.score for outcome in outcomes if outcome is not None)


def note(trial: Trial) -> str:
    """A trial for people, in Markdown."""
    candidate, kind = trial.candidate, "" if trial.state == "complete" else "estimated "
    facts = [
        f"{kind}reward **{trial.reward:.4g}** on {trial.num_scored} examples",
        f"{trial.state}: {trial.reason}",
    ]
    if trial.valset_score is not None:
        facts.append(f"valset score **{trial.valset_score:.4g}**")
    facts += [f"{name} {value:.4g}" for name, value in trial.subscores.items()]
    if trial.num_failures:
        facts.append(f"{trial.num_failures} failed")
    title = "The student" if candidate.parent is None else f"Round {candidate.round}"
    lines = [f"## {title}", "", *(f"- {fact}" for fact in facts)]
    for name, text in candidate.instructions.items():
        ticks = max(map(len, re.findall("`+", text)), default=0)
        fence = "`" * max(3, ticks + 1)
        changed = " (rewritten)" if name in candidate.rewritten else ""
        lines += ["", f"### {name}{changed}", "", f"{fence}text", *_wrapped(text), fence]
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    """Lines short enough for optuna-dashboard, which widens its page to the longest one."""
    wrapped = (textwrap.wrap(line, 100, break_long_words=False) or [""] for line in text.splitlines())
    return [line for lines in wrapped for line in lines]
