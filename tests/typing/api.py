"""The public API as its users type it: checked by mypy, never run.

A `type: ignore` here is an expectation: mypy fails where the error it names does not come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dspy
import optuna
import pandas
from typing_extensions import assert_type

from dspy_opro import (
    OPRO,
    Candidate,
    Halving,
    OPROResult,
    OPROTeleprompter,
    ProposalRequest,
    Pruner,
    RunState,
    Stopper,
    Trajectory,
    Trial,
    Usage,
)
from dspy_opro.local import LocalLM
from dspy_opro.search.pruners import Race
from dspy_opro.testing import LMCall, ScriptedLM, SimulatedModel, SimulatedServer


def exact(example: Any, prediction: Any, trace: Any = None) -> bool:
    return bool(example.answer == prediction.answer)


async def judged(example: Any, prediction: Any) -> dict[str, Any]:
    return {"score": 0.5, "feedback": "name the city"}


def late(state: RunState) -> str | None:
    return "long enough" if state.round > 3 else None


class KeepAll:
    """An own pruner is any object of this shape."""

    def checkpoints(self, num_examples: int, num_candidates: int) -> Sequence[int]:
        return [num_examples]

    def drop(self, race: Race) -> Mapping[str, str]:
        return {}

    def most_calls(self, num_examples: int, num_candidates: int) -> int:
        return num_examples * num_candidates


class OwnProposer(dspy.Module):  # type: ignore[misc]  # DSPy's classes have no types
    def forward(self, request: ProposalRequest) -> dspy.Prediction:
        return dspy.Prediction(
            instructions={name: f"{text} Be brief." for name, text in request.current.items()}
        )


# Constructor
stopper: Stopper = late
pruner: Pruner = KeepAll()
OPROTeleprompter(exact)
OPROTeleprompter(judged, auto="heavy", num_threads=16, log_dir="runs/qa", storage="sqlite:///runs.db")
OPROTeleprompter(metric=exact, auto=None, max_cost=2.5, timeout_seconds=60, stoppers=[stopper], pruner=pruner)
OPROTeleprompter(metric=exact, prompt_model=dspy.LM("openai/gpt-4o"), proposer=OwnProposer(), pruner=None)
teleprompter: OPROTeleprompter = OPRO(metric=exact, trainset=[], pruner=Halving())
OPROTeleprompter(metric=exact, breadth=7, depth=4, minibatch_size=35)

OPROTeleprompter(exact, dspy.LM("openai/gpt-4o"))
OPROTeleprompter(metric=exact, auto="lite")  # type: ignore[arg-type]
OPROTeleprompter(metric=exact, num_round=3)  # type: ignore[call-arg]
OPROTeleprompter(metric=exact, patience="few")  # type: ignore[arg-type]
OPROTeleprompter(metric=exact, predictor_strategy="both")  # type: ignore[arg-type]

# compile
student = dspy.Predict("question -> answer")
data = [dspy.Example(question="1 + 1?", answer="2").with_inputs("question")]
program = teleprompter.compile(student)
program = teleprompter.compile(student, data, exact)
program = teleprompter.compile(student, trainset=data, valset=data, seed=1, num_rounds=2)
teleprompter.compile(student, trainset=data, num_round=2)  # type: ignore[call-arg]
assert_type(teleprompter.get_params(), dict[str, Any])
assert_type(teleprompter.get_config(), dict[str, Any])
assert_type(OPROTeleprompter.from_config({"auto": "heavy"}), OPROTeleprompter)
assert_type(OPRO.from_config(teleprompter.get_config()).compile(student), Any)
OPROTeleprompter.from_config("config.json")  # type: ignore[arg-type]


async def in_a_loop() -> Any:
    return await teleprompter.acompile(student, trainset=data)


# What comes back
def read(result: OPROResult) -> None:
    assert_type(result.trajectory, Trajectory)
    assert_type(result.best, Trial)
    assert_type(result.baseline.candidate, Candidate)
    assert_type(result.best_score, float)
    assert_type(result.instructions, Mapping[str, str])
    assert_type(result.usage + Usage(metric_calls=1), Usage)
    assert_type(result.stop_reason, str)
    assert_type(result.to_dicts(), list[dict[str, Any]])
    assert_type(result.summary(), str)
    result.save_report("qa.html")
    result.save_report(Path("runs") / "qa.html")
    result.save_report(3)  # type: ignore[arg-type]
    assert_type(result.to_dataframe(), pandas.DataFrame)
    assert_type(result.trials, Sequence[Trial])
    assert_type(result.prompts(format="text"), Mapping[str, Any])
    result.prompts(format="yaml")  # type: ignore[arg-type]
    assert_type(result.examples(), list[dict[str, Any]])
    assert_type(result.study, optuna.Study)
    result.save(Path("runs") / "qa.json")
    assert_type(OPROResult.load("qa.json"), OPROResult)
    assert_type(result.best_candidate, Mapping[str, str])
    assert_type(result.val_aggregate_scores, Sequence[float])
    assert_type(result.total_metric_calls, int)
    result.stop_reason = "patience"  # type: ignore[misc]


# The embedded model and the fakes
def answer(call: LMCall) -> str:
    return "Paris"


LocalLM()
LocalLM(path="model.gguf", temperature=0.7)
LocalLM(repo_id="owner/name", filename="model.gguf")
dspy.configure(lm=ScriptedLM(answer))
with SimulatedServer({"scorer": SimulatedModel(answer)}, seed=1) as server:
    assert_type(server.seed, int)
