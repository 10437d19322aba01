"""Results made by hand, for tests of what is shown of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dspy_opro.reporting.result import OPROResult
from dspy_opro.search.tasks import Failure
from dspy_opro.search.trajectory import Candidate, State, Trajectory, Trial, Usage, mean


def trial(
    text: str,
    scores: Sequence[float],
    round: int = 0,
    state: State = "complete",
    parent: Candidate | None = None,
    **kwargs: Any,
) -> Trial:
    """A trial of a program with the predictors `draft`, which never changes, and `answer`."""
    instructions = {"draft": "Think.", "answer": text}
    rewritten = () if parent is None else ("answer",)
    candidate = Candidate(instructions, round, None if parent is None else parent.id, rewritten)
    return Trial(candidate, mean(scores), len(scores), state, f"why {text}", scores=tuple(scores), **kwargs)


def result(**changes: Any) -> OPROResult:
    """Three rounds on four examples: the student, one dropped, one better and one best, with a failure."""
    student = trial("Answer.", [0, 0, 1, 0])
    start = student.candidate
    trials = (
        student,
        trial("Answer <b>badly</b>.", [0, 0], 1, "pruned", start),
        trial("Answer well.", [1, 0, 1, 0], 1, parent=start),
        trial("Answer very well & briefly.", [1, 1, 1, 0], 2, parent=start, num_failures=1),
    )
    values: dict[str, Any] = {
        "trajectory": Trajectory().add(*trials),
        "curve": (0.25, 0.5, 0.75, 0.75),
        "stop_reason": "patience",
        "usage": Usage(14, 20, 6, 2, 3000, 400, 0.0123),
        "seconds": 75.0,
        "failures": (Failure(trials[3].id, "train", 7, "ValueError: <none>"),),
        "num_failures": 1,
        "config": {"seed": 0, "name": None, "metric": "exact"},
        "study_name": "capitals",
        "problems": ("duplicate", "empty", "duplicate"),
    }
    return OPROResult(**{**values, **changes})


def empty() -> OPROResult:
    """What a run gives that was stopped before the student was scored."""
    return OPROResult(Trajectory(), (), "interrupted", Usage(metric_calls=1), 0.5)
