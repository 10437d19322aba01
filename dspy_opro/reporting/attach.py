"""Attaches the result to the returned program, under the names that DSPy's own optimizers use.

`dspy.BestOfN` and `dspy.Refine` deep-copy their program on every call, so all copies share these values.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import dspy
from dspy.predict.parameter import Parameter

from dspy_opro.search.trajectory import Candidate

from .result import OPROResult

logger = logging.getLogger("dspy_opro")

NAMES = ("opro_result", "score", "total_calls", "candidate_programs", "trial_logs")
NUM_PROGRAMS = 20
"""The most candidate programs on the returned program."""


class SharedList(list[Any]):
    """A list whose deep copy is a new list of the same items."""

    def __deepcopy__(self, memo: Any) -> SharedList:
        return SharedList(self)


class SharedDict(dict[Any, Any]):
    """A dict whose deep copy is a new dict of the same values."""

    def __deepcopy__(self, memo: Any) -> SharedDict:
        return SharedDict(self)


def attach(
    program: dspy.Module,
    result: OPROResult,
    build: Callable[[Candidate], dspy.Module],
    track_stats: bool = True,
) -> None:
    """Set the result's attributes on the program, and remove those of an earlier run.

    If the program itself uses a name, e.g. for a predictor called `score`, that attribute stays. `opro_result` has
    all the data. With `track_stats` the program also gets `candidate_programs`, best first, and `trial_logs`; `build`
    makes the program of a candidate.
    """
    taken = _taken(program)
    values: dict[str, Any] = {
        "opro_result": result,
        "score": round(100 * result.best_score, 2) if result.curve else None,
        "total_calls": result.usage.metric_calls,
    }
    if track_stats:
        # The returned program leads; of equal ones the earlier comes first.
        best_first = sorted(result.scored(), key=lambda s: (s[1].id == result.best.id, s[0]), reverse=True)
        values["candidate_programs"] = SharedList(
            {"score": round(100 * score, 2), "program": _bare(build(t.candidate), taken), "id": t.id}
            for score, t in best_first[:NUM_PROGRAMS]
        )
        values["trial_logs"] = SharedDict(enumerate(result.to_dicts()))
    _bare(program, taken)
    for name, value in values.items():
        if name in taken:
            logger.warning("The program keeps its own attribute %s. See program.opro_result instead.", name)
        else:
            setattr(program, name, value)


def _taken(program: dspy.Module) -> set[str]:
    """The names that the program itself uses."""
    attributes = vars(program)
    # Else the other attributes come from an earlier run of ours, or of MIPROv2 and others.
    is_unmarked = "opro_result" not in attributes and "candidate_programs" not in attributes
    return {
        name
        for name in NAMES
        if hasattr(type(program), name)
        or isinstance(attributes.get(name), (dspy.Module, Parameter))
        or (name in attributes and is_unmarked)
    }


def _bare(program: dspy.Module, taken: set[str]) -> dspy.Module:
    """The program without the results of an earlier run."""
    for name in NAMES:
        if name not in taken:
            vars(program).pop(name, None)
    return program
