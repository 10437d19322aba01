"""No text ends a run, wherever it comes from: half surrogate pairs, NUL, control characters. Runs resume with them."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import dspy
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dspy_opro import OPROTeleprompter
from dspy_opro.testing import ScriptedLM

ODD = "half \ud83d of \x00 an \x1b[31m emoji \udc00 \x85 \\ud83d"
TEXTS = st.text(st.characters() | st.characters(categories=["Cs", "Cc"]), max_size=40)


class Echo(dspy.Module):  # type: ignore[misc]
    """Answers with the text, or fails with it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.answer = dspy.Predict("question -> answer")
        self.text = text

    def forward(self, question: str) -> Any:
        number = int(question.partition(" ")[0])
        if number % 3 == 2:
            raise ValueError(self.text)
        return dspy.Prediction(answer=self.text if number % 2 else "ok")


def run(text: str, **changes: Any) -> Any:
    class Proposer(dspy.Module):  # type: ignore[misc]
        def forward(self, request: Any) -> Any:
            if request.slot == 2:
                raise ValueError(text)
            return dspy.Prediction(instruction=f"{text} {request.slot}" if request.slot else text)

    def metric(example: Any, prediction: Any) -> Any:
        return dspy.Prediction(score=float(prediction.answer == "ok"), feedback=text)

    trainset = [dspy.Example(question=f"{n} {text}", note=text).with_inputs("question") for n in range(6)]
    teleprompter = OPROTeleprompter(
        metric=metric, num_rounds=1, num_candidates=3, proposer=Proposer(), display_progress=False,
        num_threads=1, prompt_model=ScriptedLM(lambda call: "ok"), max_labeled_demos=1, **changes,
    )  # fmt: skip
    with dspy.context(lm=ScriptedLM(lambda call: "ok")):
        program = teleprompter.compile(Echo(text), trainset=trainset)
    return program.opro_result


@pytest.mark.parametrize(
    "storage", ["log_dir", pytest.param("sqlite", marks=[pytest.mark.slow, pytest.mark.timeout(300)])]
)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=TEXTS)
@example(text=ODD)
@example(text="\x00")
@example(text="\ud83d")
def test_any_text_is_survived_and_resumed(storage: str, text: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        changes: dict[str, Any] = {"log_dir": directory}
        if storage == "sqlite":
            changes = {"storage": f"sqlite:///{directory}/runs.db", "study_name": "run"}
        first = run(text, **changes)
        second = run(text, **changes)
        assert first.trajectory.trials == second.trajectory.trials
        assert first.num_failures == second.num_failures > 0
        assert second.usage == first.usage
        first.summary()
        first.save_report(Path(directory) / "report.html")
        for trial in first.trajectory.trials[1:]:
            for instructions in trial.candidate.instructions.values():
                instructions.encode()


@pytest.mark.parametrize("text", [ODD, "\x00", "\ud83d"])
def test_any_text_may_go_to_the_optimizer_lm_and_come_from_it(text: str, tmp_path: Path) -> None:
    numbers = itertools.count()

    def answer(call: Any) -> dict[str, str]:
        return {"instruction": f"{text} {next(numbers)}"}

    trainset = [dspy.Example(question=f"{n} {text}", note=text).with_inputs("question") for n in range(6)]
    teleprompter = OPROTeleprompter(
        metric=lambda example, prediction: dspy.Prediction(score=float(prediction.answer == "ok"), feedback=text),
        num_rounds=1, num_candidates=3, lag=0, display_progress=False, log_dir=tmp_path,
        prompt_model=ScriptedLM(answer),
    )  # fmt: skip
    with dspy.context(lm=ScriptedLM(answer)):
        result = teleprompter.compile(Echo(text), trainset=trainset).opro_result
    assert len(result.trajectory) == 4
    assert result.problems == ()
