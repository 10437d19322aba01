"""Short runs over a simulated server whose answers depend on the prompt alone, so that every order is one run."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import dspy

from dspy_opro import OPROTeleprompter
from dspy_opro.proposers.opro import REQUESTS
from dspy_opro.testing import Latency, LMCall, ScriptedLM, SimulatedModel, SimulatedServer, VocabularyTask

TASK = VocabularyTask(seed=1)
TRAINSET = TASK.trainset(12)
VALSET = TASK.valset(8)
metric = TASK.metric


def is_proposal(call: LMCall) -> bool:
    """Whether the call asks for an instruction: with the field of the meta-prompt, or in the style `induce`."""
    return "instruction" in call.output_fields or REQUESTS["induce"] in call.prompt


def propose(call: LMCall) -> str | Mapping[str, Any]:
    """`VocabularyTask`'s proposer without its memory of how often it was asked the same; of all steps at once too."""
    answer = TASK.proposer(replace(call, sample=0, rollout_id=None))
    steps = re.findall(r"(?m)^Step (\w+):$", call.inputs.get("scored_instructions", ""))
    if not steps or isinstance(answer, str):
        return answer
    return {**answer, "instruction": {name: f"{answer['instruction']} ({name})" for name in steps}}


def _asks_again_as_json() -> bool:
    num_calls = 0

    def fail(call: LMCall) -> str:
        nonlocal num_calls
        num_calls += 1
        raise RuntimeError("down")

    with contextlib.suppress(Exception), dspy.context(lm=ScriptedLM(fail)):
        dspy.Predict("question -> answer")(question="?")
    return num_calls > 1


ASKS_AGAIN_AS_JSON = _asks_again_as_json()
"""Whether an adapter of this DSPy asks again in another format after any error of the LM, as 3.0 does. Then an error
that passes costs another call and gives another answer."""


def serve(seconds: float = 0.0, **models: SimulatedModel) -> SimulatedServer:
    """A server, to be entered; with latencies that mix up the order of arrival where `seconds` is above 0."""
    latency = Latency(seconds, 0.8)
    scorer = SimulatedModel(TASK.scorer, latency)
    proposer = SimulatedModel(propose, replace(latency, median_seconds=3 * seconds))
    return SimulatedServer({"scorer": scorer, "proposer": proposer, **models}, own_process=False)


def teleprompter(server: SimulatedServer, **changes: Any) -> OPROTeleprompter:
    """Two rounds of four candidates."""
    values: dict[str, Any] = {
        "metric": metric,
        "num_rounds": 2,
        "num_candidates": 4,
        "num_threads": 8,
        "display_progress": False,
        "prompt_model": server.lm("proposer"),
        "task_model": server.lm("scorer"),
    }
    return OPROTeleprompter(**{**values, **changes})


def optimize(server: SimulatedServer, student: Any = None, **changes: Any) -> Any:
    """The program that comes out."""
    data = {"trainset": changes.pop("trainset", TRAINSET), "valset": changes.pop("valset", VALSET)}
    return teleprompter(server, **changes).compile(TASK.student() if student is None else student, **data)


class TwoSteps(dspy.Module):  # type: ignore[misc]
    """Two predictors; the second one's instructions decide."""

    def __init__(self) -> None:
        super().__init__()
        self.note = dspy.Predict(dspy.Signature("question -> note", "Note what the item is."))
        self.answer = dspy.Predict(dspy.Signature("question, note -> answer", "Name the code of the item."))

    def forward(self, question: str) -> Any:
        note = self.note(question=question).note
        return self.answer(question=question, note=note)


def decisions(result: Any) -> dict[str, Any]:
    """What two equal runs have in common: everything but time, calls ahead of the end, and the study's name."""
    return {
        "trials": result.trajectory.trials,
        "curve": result.curve,
        "reason": result.stop_reason,
        "problems": result.problems,
        "failures": result.failures,
    }
