"""Adapts GEPA's kind of instruction proposer to ours: it gets the exemplars of our meta-prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dspy_opro.programs.values import shown

from .meta_prompt import Exemplar, ProposalRequest

ARGUMENTS = ("candidate", "reflective_dataset", "components_to_update")


def adapt(proposer: Any) -> Any:
    """A proposer that takes `request=`: the given one, or a `ReflectiveProposer` around GEPA's `ProposalFn`."""
    target = getattr(type(proposer), "forward", proposer)  # the `__call__` of a module takes any argument
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return proposer
    return ReflectiveProposer(proposer) if all(name in parameters for name in ARGUMENTS) else proposer


@dataclass(frozen=True)
class ReflectiveProposer:
    """Calls GEPA's `ProposalFn` for a request. `proposer=` also takes the function itself.

    Example:
        >>> from dspy_opro import OPROTeleprompter
        >>> def propose(candidate, reflective_dataset, components_to_update):
        ...     return {name: candidate[name] + " Be brief." for name in components_to_update}
        >>> def exact(example, prediction):
        ...     return example.answer == prediction.answer
        >>> teleprompter = OPROTeleprompter(metric=exact, proposer=propose)
    """

    function: Callable[..., Mapping[str, str]]
    """Takes `candidate` (predictor name -> text), `reflective_dataset` (name -> examples with Inputs, Generated Outputs
    and Feedback) and `components_to_update` (names). Returns name -> new text."""

    def __call__(self, request: ProposalRequest) -> dict[str, str]:
        new = self.function(
            candidate=dict(request.current),
            reflective_dataset={
                name: [_example(exemplar, name, request.guidance) for exemplar in request.exemplars]
                for name in request.predictors
            },
            components_to_update=list(request.predictors),
        )
        return {name: text for name, text in new.items() if name in request.predictors}


def _example(exemplar: Exemplar, name: str, guidance: str) -> dict[str, Any]:
    """What GEPA shows of an example: the call of the predictor `name`, or that of a program with one predictor."""
    outcome, call = exemplar.outcome, exemplar.calls.get(name)
    inputs: Mapping[str, str] = exemplar.input_fields
    outputs: Any = exemplar.prediction
    if call:
        inputs = {field: shown(value) for field, value in call.get("inputs", {}).items()}
        given = {field: shown(value) for field, value in call.get("outputs", {}).items()}
        outputs = given or f"could not be parsed: {call['unparsed']}"
    said = "" if outcome is None else outcome.error or exemplar.feedback.get(name) or outcome.feedback
    feedback = [said, f"Score: {outcome.score:g}" if outcome else "", f"Expected: {exemplar.expected}"]
    if guidance:
        feedback.append(f"Rules for every instruction: {guidance}")
    return {
        "Inputs": dict(inputs),
        "Generated Outputs": outputs,
        "Feedback": "\n".join(line for line in feedback if line),
    }
