"""Every candidate is one parameterless Optuna trial; whatever is there already is not written again."""

from __future__ import annotations

import logging
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from dspy_opro.stopping import Usage
from dspy_opro.trajectory import Candidate, Outcome, Trial, mean
from dspy_opro.work import Block, Split

from .records import clip, encode_usage
from .storage import storage_of

logger = logging.getLogger("dspy_opro")

STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
MAX_CAUSES = 5
ATTR_LIMIT = 60_000
"""Bytes of JSON that MySQL's TEXT holds with room to spare."""


class Tally:
    """What a candidate's blocks add up to, whatever order they came in."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[Split, int], tuple[Sequence[Outcome], Usage]] = {}  # by split and start

    def add(self, block: Block, outcomes: Sequence[Outcome], usage: Usage) -> None:
        bare = [replace(outcome, output="", feedback="") for outcome in outcomes]
        self._blocks[block.split, block.start] = bare, usage

    def _outcomes(self) -> Iterator[tuple[Split, int, Outcome]]:
        for (split, start), (outcomes, _) in sorted(self._blocks.items(), key=lambda item: item[0]):
            for position, outcome in enumerate(outcomes, start):
                yield split, position, outcome

    @property
    def usage(self) -> Usage:
        return sum((self._blocks[key][1] for key in sorted(self._blocks)), Usage())

    @property
    def failures(self) -> list[dict[str, Any]]:
        """The first failures: where, and the cause."""
        failed = ((s, p, o.error) for s, p, o in self._outcomes() if o.error is not None)
        return [
            {"split": split, "position": position, "cause": clip(cause)}
            for split, position, cause in islice(failed, MAX_CAUSES)
        ]

    @property
    def subscores(self) -> dict[str, float]:
        """Name -> mean over the train examples that have it."""
        values: dict[str, list[float]] = {}
        for split, _, outcome in self._outcomes():
            if split == "train":
                for name, value in (outcome.subscores or {}).items():
                    values.setdefault(name, []).append(value)
        return {name: mean(numbers) for name, numbers in values.items()}


@dataclass
class _Row:
    trial_id: int
    steps: set[int] = field(default_factory=set)
    """What is reported already."""
    is_finished: bool = False


class TrialBoard:
    """A study that shows a run.

    Args:
        study: Where the trials are.
        callbacks: Called with `(study, trial)` once a trial is told; what they raise is logged.
        with_notes: Whether trials get a note for optuna-dashboard.
    """

    def __init__(
        self,
        study: optuna.Study,
        callbacks: Sequence[Callable[[optuna.Study, FrozenTrial], None]] = (),
        with_notes: bool = False,
    ) -> None:
        self.study = study
        self._storage, self._study_id = storage_of(study)
        self._callbacks = callbacks
        self._with_notes = with_notes
        self._rows: dict[str, _Row] = {}  # candidate id -> its trial
        for trial in study.get_trials(deepcopy=False):
            candidate = trial.user_attrs.get("candidate_id")
            if candidate is not None and trial.state != TrialState.FAIL:
                self._rows.setdefault(candidate, self._row(trial))

    def _row(self, trial: FrozenTrial) -> _Row:
        if trial.state.is_finished():
            return _Row(-1, is_finished=True)  # never written again
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)
        return _Row(trial_id, set(trial.intermediate_values))

    def propose(self, candidate: Candidate) -> None:
        """Create the candidate's trial with all that is known of it, in one write."""
        if candidate.id in self._rows:
            return
        attrs: dict[str, Any] = {
            "candidate_id": candidate.id,
            **instructions_attrs(candidate),
            "round": candidate.round,
            "rewritten": list(candidate.rewritten),
            "parent": candidate.parent,
        }
        if candidate.demo_set is not None:
            attrs["demo_set"] = candidate.demo_set
        template = create_trial(state=TrialState.RUNNING, user_attrs=attrs)
        trial_id = self._storage.create_new_trial(self._study_id, template_trial=template)
        self._rows[candidate.id] = _Row(trial_id)

    def report(self, candidate: Candidate, step: int, value: float) -> None:
        row = self._rows[candidate.id]
        if not row.is_finished and step not in row.steps:
            self._storage.set_trial_intermediate_value(row.trial_id, step, value)
            row.steps.add(step)

    def finish(self, trial: Trial, tally: Tally) -> None:
        """Write the result and close the trial, then call the callbacks."""
        row = self._rows[trial.id]
        if row.is_finished:
            return
        for key, value in result_attrs(trial, tally).items():
            self._storage.set_trial_user_attr(row.trial_id, key, value)
        if self._with_notes:
            self._write_note(row.trial_id, note(trial, tally))
        values = None if trial.state == "failed" else [trial.reward]
        self._storage.set_trial_state_values(row.trial_id, STATES[trial.state], values)
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

    def close(self, reason: str) -> None:
        """Close the trials that were under way."""
        for id_, row in list(self._rows.items()):
            if not row.is_finished:
                self._storage.set_trial_user_attr(row.trial_id, "reason", f"the run ended: {reason}")
                self._storage.set_trial_state_values(row.trial_id, TrialState.FAIL)
                del self._rows[id_]

    def _write_note(self, trial_id: int, body: str) -> None:
        """As `save_note` of optuna-dashboard 0.21 does, whose package need not be installed here."""
        prefix, size = f"dashboard:{trial_id}:", 2045
        self._storage.set_study_system_attr(self._study_id, f"{prefix}note_ver", 1)
        for number, start in enumerate(range(0, len(body), size)):
            part = body[start : start + size]
            self._storage.set_study_system_attr(self._study_id, f"{prefix}note_str:{number}", part)


def instructions_attrs(candidate: Candidate) -> dict[str, Any]:
    """One dict, predictor name -> text, cut where a database column would not hold it."""
    texts = dict(candidate.instructions)
    room = ATTR_LIMIT // (
        6 * max(1, len(texts))
    )  # JSON writes a character as six at most, rare ones as twelve
    if 6 * sum(len(text) for text in texts.values()) <= ATTR_LIMIT:
        return {"instructions": texts}
    return {"instructions": {name: clip(text, room) for name, text in texts.items()}, "is_cut": True}


def result_attrs(trial: Trial, tally: Tally) -> dict[str, Any]:
    attrs: dict[str, Any] = {
        "num_scored": trial.num_scored,
        "reason": trial.reason,
        "usage": encode_usage(tally.usage),
    }
    if trial.valset_score is not None:
        attrs["valset_score"] = trial.valset_score
    if trial.num_failures:
        attrs["num_failures"] = trial.num_failures
        attrs["failures"] = tally.failures
    if tally.subscores:
        attrs["subscores"] = tally.subscores
    return attrs


def note(trial: Trial, tally: Tally) -> str:
    """A trial for people, in Markdown."""
    candidate = trial.candidate
    facts = [
        f"reward **{trial.reward:.4g}** on {trial.num_scored} examples",
        f"{trial.state}: {trial.reason}",
    ]
    if trial.valset_score is not None:
        facts.append(f"valset score **{trial.valset_score:.4g}**")
    facts += [f"{name} {value:.4g}" for name, value in tally.subscores.items()]
    if trial.num_failures:
        facts.append(f"{trial.num_failures} failed")
    title = "The student" if candidate.round == 0 else f"Round {candidate.round}"
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
