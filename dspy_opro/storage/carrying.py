"""What a run with another plan takes over from its record, so that it never ends below what was found before.

The choice is kept in the log beside the plan. So every later process with this plan takes over the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial, TrialState

from dspy_opro.search.tasks import demo_set_key
from dspy_opro.search.trajectory import Candidate

from .result_log import Record


@dataclass(frozen=True)
class Carried:
    """Candidates of an earlier plan."""

    candidates: Sequence[Candidate] = ()
    returned: str | None = None
    """Id of the candidate that the run confirmed and returned."""


NOTHING = Carried()


def goes_on(plan: Record, before: Record) -> bool:
    """Whether a plan repeats all that the plan before did: only its limits differ, and none is smaller."""
    limits = zip(plan["limits"], before["limits"], strict=True)
    is_longer = all(new is None or (old is not None and new >= old) for new, old in limits)
    return is_longer and {**plan, "limits": ()} == {**before, "limits": ()}


def choose(study: optuna.Study, student: Candidate) -> Record:
    """The best trial that is scored in full, and the returned one, as plain JSON; without the student.

    A program that was returned without a confirmation competes, but the run does not fall back on it.
    """
    trials = [
        trial
        for trial in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        if "num_scored" in trial.user_attrs and "is_cut" not in trial.user_attrs
    ]
    validated = [trial for trial in trials if "valset_score" in trial.user_attrs]
    returned = [trial for trial in trials if trial.number == study.user_attrs.get("returned_trial")]
    best = sorted(validated or trials, key=_score, reverse=True)[:1]
    found = {trial.user_attrs["candidate_id"]: trial.user_attrs for trial in returned + best}
    texts = [
        [attrs["instructions"], attrs.get("demo_set")] for id_, attrs in found.items() if id_ != student.id
    ]
    is_confirmed = returned and returned[0].number == study.user_attrs.get("confirmed_trial")
    return {"candidates": texts, "returned": next(iter(found)) if is_confirmed else None}


def decode(record: Record, student: Candidate, log: Sequence[Record]) -> Carried:
    """The candidates of a record. Their demos are in the log, in the proposals of the first round."""
    texts_of = {r["key"]: r["proposal"].get("texts") for r in log if "proposal" in r}
    candidates = []
    for texts, number in record["candidates"]:
        rewritten = tuple(name for name, text in student.instructions.items() if texts[name] != text)
        demos = None if number is None else texts_of.get(demo_set_key(number))
        instructions = {**student.instructions, **texts}  # in the order of the program
        candidates.append(Candidate(instructions, 0, student.id, rewritten, number, demos))
    return Carried(candidates, record["returned"])


def _score(trial: FrozenTrial) -> float:
    return float(trial.user_attrs.get("valset_score", trial.value or 0.0))
