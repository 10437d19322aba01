"""A fake reads from a prompt what a language model would, and its answers are parsed back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import dspy
import pytest
from fakes_common import DSPY, INPUTS, INSTRUCTIONS, PROGRAM, VALUES, adapters, ask

from dspy_opro.testing import (
    LMCall,
    ScriptedLM,
)
from dspy_opro.testing.calls import count_tokens, render


@adapters
async def test_every_adapter_parses_a_mapping_back_to_its_values(adapter: Any) -> None:
    lm = ScriptedLM(lambda call: VALUES)
    with dspy.context(lm=lm, adapter=adapter):
        answers = [PROGRAM(**INPUTS), await PROGRAM.acall(**INPUTS)]
    assert [answer.toDict() for answer in answers] == [VALUES, VALUES]
    assert lm.num_calls == 2  # no adapter had to fall back on another


@adapters
@pytest.mark.parametrize("text", ["a < b & c > d", "see [[ ## no ## ]]", '{"a": 1}', "ünïcode ✓"])
def test_awkward_text_survives_every_adapter(adapter: Any, text: str) -> None:
    if isinstance(adapter, dspy.XMLAdapter) and DSPY < (3, 4):
        pytest.skip("XMLAdapter before 3.4 has no escapes")
    assert ask(ScriptedLM(lambda call: {"answer": text}), adapter=adapter) == text


@adapters
def test_a_call_shows_what_the_prompt_holds(adapter: Any) -> None:
    lm = ScriptedLM(lambda call: VALUES)
    program = PROGRAM.deepcopy()
    program.demos = [dspy.Example(question="demo?", context="demo", **VALUES)]
    with dspy.context(lm=lm, adapter=adapter):
        program(**INPUTS)
    (call,) = lm.calls
    assert call.instructions == INSTRUCTIONS
    assert call.inputs == INPUTS
    assert call.output_fields == tuple(VALUES)
    assert call.format == type(adapter).__name__.removesuffix("Adapter").lower()
    assert "demo?" in call.prompt
    assert "demo?" not in call.user


@pytest.mark.parametrize(
    ("answer", "text"),
    [("as it is", "as it is"), ({"answer": "alone"}, "alone"), ({"a": "1", "b": 2}, "a: 1\nb: 2")],
)
def test_without_an_adapter_the_answer_is_plain_text(answer: str | Mapping[str, Any], text: str) -> None:
    lm = ScriptedLM(lambda call: answer)
    assert lm("Say something.") == [text]
    assert (lm.calls[0].format, lm.calls[0].instructions, lm.calls[0].user) == ("text", "", "Say something.")


def test_a_json_schema_alone_names_the_fields() -> None:
    schema = {"name": "out", "schema": {"type": "object", "properties": {"verdict": {"type": "string"}}}}
    response_format = {"type": "json_schema", "json_schema": schema}
    call = LMCall("m", (("user", "Judge."),), request={"response_format": response_format})
    assert (call.format, call.output_fields) == ("json", ("verdict",))
    assert json.loads(render({"verdict": "yes"}, call)) == {"verdict": "yes"}


def test_tokens_are_words() -> None:
    assert [count_tokens(text) for text in ("", "one", " two\n words ")] == [0, 1, 2]
