"""Inputs, expected outputs, predictions, scores and feedback of student and best candidate outlive the run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import dspy
import pytest

from dspy_opro.reporting.examples import ExampleText, as_texts
from dspy_opro.testing import SimulatedServer
from tests.runs import TASK, metric, optimize, serve

TRAINSET = TASK.trainset(40)


def test_examples_become_inputs_and_expected_output() -> None:
    image = dspy.Example(dspy_uuid="x", question="q" * 3000, answer=3, note=None).with_inputs("question")
    (text,) = as_texts([image], [7, 1])
    assert text.index == 7
    assert text.inputs.keys() == {"question"} and len(text.inputs["question"]) <= 1000
    assert text.expected == {"answer": "3", "note": "None"}


def with_feedback(example: Any, prediction: Any, trace: Any = None) -> Any:
    return {"score": metric(example, prediction), "feedback": f"about {example.question}", "length": 0.5}


@pytest.mark.parametrize("valset", [TASK.valset(30), None])
def test_student_and_best_keep_what_they_gave(tmp_path: Path, valset: Any) -> None:
    with serve() as server:
        result = run(server, tmp_path, valset)
        again = run(server, tmp_path, valset)
    for found in (result, again, pickle.loads(pickle.dumps(result))):
        best = found.trajectory.best
        assert best.id != found.baseline.id
        assert found.data.outcomes.keys() == {best.id, found.baseline.id}
        for trial in (best, found.baseline):
            outcomes = found.data.outcomes[trial.id]
            assert [o.score for o in outcomes["train"]] == list(trial.scores)
            assert [o.score for o in outcomes["val"]] == list(trial.valset_scores)
            for text, outcome in zip(found.data.texts["train"], outcomes["train"], strict=True):
                assert isinstance(text, ExampleText)
                assert text.inputs["question"] == TRAINSET[text.index].question
                assert outcome.feedback == f"about {text.inputs['question']}"
                assert outcome.output.startswith("answer: ")
                assert outcome.subscores == {"length": 0.5}
    assert result.data == again.data


def run(server: SimulatedServer, log_dir: Path, valset: Any) -> Any:
    data = {"trainset": TRAINSET, "valset": valset, "log_dir": log_dir}
    program = optimize(server, metric=with_feedback, num_rounds=8, patience=8, seed=1, **data)
    return program.opro_result
