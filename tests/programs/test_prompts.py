"""Prompts for use outside DSPy: what the adapter writes, with placeholders for the inputs."""

from __future__ import annotations

from typing import Any

import dspy
import pytest

from dspy_opro.programs.prompts import prompts
from tests.runs import TwoSteps


class Typed(dspy.Signature):  # type: ignore[misc]
    """Answer it."""

    question: str = dspy.InputField()
    numbers: list[int] = dspy.InputField()
    picture: dspy.Image = dspy.InputField()
    history: dspy.History = dspy.InputField()
    answer: str = dspy.OutputField()


@pytest.mark.parametrize("adapter", [dspy.ChatAdapter(), dspy.JSONAdapter()])
def test_a_prompt_has_placeholders_for_inputs_and_the_demos(adapter: Any) -> None:
    predictor = dspy.Predict(Typed)
    predictor.demos = [dspy.Example(question="2 + 2?", numbers=[2], answer="four")]
    with dspy.context(adapter=adapter):
        (messages,) = prompts(predictor, ["self"]).values()
    assert messages[0]["role"] == "system" and "Answer it." in messages[0]["content"]
    assert any("four" in m["content"] for m in messages if m["role"] == "assistant")
    for name in ("question", "numbers", "picture"):
        assert f"{{{name}}}" in messages[-1]["content"]


class Broken(dspy.ChatAdapter):  # type: ignore[misc]
    def format(self, *args: Any, **kwargs: Any) -> Any:
        raise KeyError("question")


def test_an_adapter_that_fails_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with dspy.context(adapter=Broken()):
        assert prompts(TwoSteps(), ["note", "answer"]) == {}
    assert "result.prompts() lacks note: Broken can't write it: KeyError: 'question'" in caplog.messages
