"""What a run with another plan takes over from its record, so that it never ends below what was found before.

The choice is kept in the log beside the plan. So every later process with this plan takes over the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from dspy_opro.search.tasks import ProposalTask, View, task_key
from dspy_opro.search.trajectory import Candidate, Trajectory

from .result_log import Record


@dataclass(frozen=True)
class PlanOnRecord:
    """A plan as plain JSON."""

    shape: Mapping[str, Any]
    """What decides how candidates are proposed and raced."""
    bounds: Sequence[float | None]
    """Limits that only end the rounds. None is no limit."""

    def goes_on_from(self, other: PlanOnRecord) -> bool:
        """Whether it repeats all that a run with the other plan did."""
        pairs = zip(self.bounds, other.bounds, strict=True)
        is_longer = all(_limit(mine) >= _limit(theirs) for mine, theirs in pairs)
        return self.shape == other.shape and is_longer


@dataclass(frozen=True)
class Carried:
    """Candidates of an earlier plan."""

    candidates: Sequence[Candidate] = ()
    returned: str | None = None
    """Id of the candidate that the run returned."""


NOTHING = Carried()


def choose(study: optuna.Study, student: Candidate) -> Record:
    """The best trial that is scored in full, and the returned one, as plain JSON; without the student."""
    trials = [t for t in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]) if _is_usable(t)]
    validated = [trial for trial in trials if "valset_score" in trial.user_attrs]
    number = study.user_attrs.get("returned_trial")
    returned = [trial for trial in trials if trial.number == number]
    best = max(validated or trials, key=_score, default=None)
    found = {t.user_attrs["candidate_id"]: t.user_attrs for t in (*returned, best) if t is not None}
    texts = [
        [attrs["instructions"], attrs.get("demo_set")] for id_, attrs in found.items() if id_ != student.id
    ]
    return {"candidates": texts, "returned": next(iter(found)) if returned else None}


def decode(record: Record, student: Candidate, log: Sequence[Record]) -> Carried:
    """The candidates of a record. Their demos are in the log."""
    candidates = []
    for texts, demo_set in record["candidates"]:
        instructions = {name: texts[name] for name in student.instructions}
        rewritten = tuple(name for name, text in instructions.items() if text != student.instructions[name])
        demos = None if demo_set is None else _demos(demo_set, student, log)
        candidates.append(Candidate(instructions, 0, student.id, rewritten, demo_set, demos))
    return Carried(candidates, record["returned"])


def _demos(demo_set: int, student: Candidate, log: Sequence[Record]) -> Mapping[str, str]:
    key = task_key(ProposalTask(1, demo_set, 0, (), View(Trajectory(), student, ()), is_for_demos=True))
    texts: Mapping[str, str] = next(r["proposal"]["texts"] for r in reversed(log) if r.get("key") == key)
    return texts


def _is_usable(trial: FrozenTrial) -> bool:
    return "num_scored" in trial.user_attrs and "is_cut" not in trial.user_attrs


def _score(trial: FrozenTrial) -> float:
    return float(trial.user_attrs.get("valset_score", trial.value or 0.0))


def _limit(bound: float | None) -> float:
    return math.inf if bound is None else bound
