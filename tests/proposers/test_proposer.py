"""The meta-prompt: instructions ascending with whole scores, exemplars with what went wrong, one request."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import dspy
import pytest

from dspy_opro import Exemplar, ProposalRequest
from dspy_opro.programs.program import Fields, describe
from dspy_opro.proposers.opro import REQUESTS, OPROProposer, PaperProposer, exemplar_text, scored_text
from dspy_opro.search.trajectory import Outcome
from dspy_opro.testing import ScriptedLM, SimulatedModel, SimulatedServer
from dspy_opro.testing.http_server import Service


def exemplar(score: float | None = 0.0, **changes: Any) -> Exemplar:
    outcome = None if score is None else Outcome(score, feedback="Say it shorter.")
    values = {
        "inputs": "question: 2 + 2",
        "expected": "answer: 4",
        "prediction": "answer: 5",
        "outcome": outcome,
    }
    return Exemplar(**{**values, "score_range": (0.0, 1.0), **changes})


REQUEST = ProposalRequest(
    predictors=("step",),
    current={"step": "Add the numbers."},
    scored_instructions={"step": [("Guess.", 12), ("Add the numbers.", 57)]},
    exemplars=[exemplar(0.0), exemplar(1.0, inputs="question: 1 + 1")],
    role="- input `question` (str)\n- output `answer` (str)",
    fields={"step": Fields(("question",), ("answer",), {})},
    style="explore",
    round=3,
    slot=1,
    wave=0,
    seed=7,
)


def asked(request: ProposalRequest, answer: Any = "New.", proposer: Any = None) -> tuple[str, Any]:
    """The prompt that the optimizer LM sees, and what becomes of its answer."""
    lm = ScriptedLM(lambda call: {"instruction": answer})
    with dspy.context(lm=lm):
        result = (proposer or OPROProposer())(request=request)
    (call,) = lm.calls
    return call.prompt, result.instruction


def assert_in_order(prompt: str, parts: list[str]) -> None:
    places = [prompt.find(part) for part in parts]
    assert -1 not in places
    assert places == sorted(places)


def test_the_meta_prompt_has_all_its_parts_in_order() -> None:
    prompt, _ = asked(REQUEST)
    parts = [
        REQUEST.role,
        "text:\nGuess.\nscore:\n12\n\ntext:\nAdd the numbers.\nscore:\n57",
        "input:\nquestion: 2 + 2\noutput:\nanswer: 5\nexpected:\nanswer: 4\nresult:\nwrong\nfeedback:\nSay it shorter.",
        "input:\nquestion: 1 + 1\noutput:\nanswer: 5\nexpected:\nanswer: 4\nresult:\ncorrect",
        REQUESTS["explore"],
    ]
    assert_in_order(prompt, parts)


@pytest.mark.parametrize("word", ["concise", "generally applicable", "never quote", "{curly braces}"])
def test_the_request_is_for_something_that_generalises(word: str) -> None:
    assert word in asked(REQUEST)[0]


@pytest.mark.parametrize(
    ("style", "answer", "expected"),
    [
        ("explore", "Count.", "Count."),
        ("refine", "Count.", "Count."),
        ("extend", "Mind the sign.", "Add the numbers. Mind the sign."),
        ("extend", 'Addition: "Mind the sign."', 'Add the numbers. Addition: "Mind the sign."'),
        ("extend", '"Mind the sign."', "Add the numbers. Mind the sign."),
        ("extend", "  ", "  "),
        ("extend", "Add the  numbers. Mind the sign.", "Add the  numbers. Mind the sign."),
    ],
)
def test_an_extension_is_added_to_the_best_instruction(style: Any, answer: str, expected: str) -> None:
    prompt, instruction = asked(replace(REQUEST, style=style), answer)
    assert REQUESTS[style] in prompt
    assert instruction.strip() == expected.strip()


@pytest.mark.parametrize("current", ["Add the numbers", "1. Read.\n2. Add."])
def test_an_extension_gets_a_line_of_its_own_where_a_space_would_join_two_sentences(current: str) -> None:
    request = replace(REQUEST, style="extend", current={"step": current})
    assert asked(request, "Mind the sign.")[1] == f"{current}\nMind the sign."


def test_an_extension_may_begin_with_a_longer_form_of_the_last_word() -> None:
    request = replace(REQUEST, style="extend", current={"step": "Add"})
    assert asked(request, "Address the sign, too.")[1] == "Add\nAddress the sign, too."
    assert asked(request, "Add, and mind the sign.")[1] == "Add, and mind the sign."


@pytest.mark.parametrize(
    ("style", "answer", "expected"),
    [
        ("extend", REQUESTS["extend"] + " Mind the sign.", "Add the numbers. Mind the sign."),
        ("extend", REQUESTS["extend"], ""),
        ("refine", "Count. " + REQUESTS["refine"] + " Twice.", "Count. Twice."),
    ],
)
def test_sentences_of_the_request_are_left_out(style: Any, answer: str, expected: str) -> None:
    assert asked(replace(REQUEST, style=style), answer)[1] == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (REQUEST.role, ""),
        (f"Count.\n{REQUEST.role}\nTwice.", "Count.\nTwice."),
        ("- input `question` (str) is a sum", "- input `question` (str) is a sum"),
    ],
)
def test_lines_that_describe_the_fields_are_left_out(answer: str, expected: str) -> None:
    assert asked(REQUEST, answer)[1] == expected


INDUCE = replace(REQUEST, style="induce")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Add them. Mind the 3.5 and", "Add them."),
        ("1. Add them\n2. Mind the", "1. Add them"),
        ('Say "yes." Then say', 'Say "yes."'),
        ("把它们加起来。注意", "把它们加起来。"),
        ("Add them.", "Add them."),
        ("Add them and", ""),
    ],
)
@pytest.mark.parametrize("style", ["refine", "induce"])
def test_an_answer_that_was_cut_off_loses_its_last_sentence(
    monkeypatch: pytest.MonkeyPatch, style: Any, answer: str, expected: str
) -> None:
    reply = Service.completion

    def cut(self: Any, call: Any, texts: Any) -> Any:
        body = reply(self, call, texts)
        body["choices"][0]["finish_reason"] = "length"
        return body

    monkeypatch.setattr(Service, "completion", cut)
    model = SimulatedModel(lambda call: answer if style == "induce" else f"[[ ## instruction ## ]]\n{answer}")
    with (
        SimulatedServer({"proposer": model}, own_process=False) as server,
        dspy.context(lm=server.lm("proposer")),
    ):
        found = OPROProposer()(request=replace(REQUEST, style=style)).instruction
        assert found == expected
        with dspy.context(lm=server.lm("proposer"), disable_history=True):  # nobody knows that it was cut off
            assert OPROProposer()(request=replace(REQUEST, style=style)).instruction == answer


def test_an_induction_shows_inputs_and_right_answers_and_nothing_that_the_program_did() -> None:
    prompt, instruction = asked(INDUCE)
    parts = [
        REQUEST.role,
        "Add the numbers.",
        "Input:\nquestion: 2 + 2\nRight answer:\nanswer: 4\n",
        "Input:\nquestion: 1 + 1\nRight answer:\nanswer: 4\n",
        REQUESTS["induce"],
    ]
    assert_in_order(prompt, parts)
    assert not any(
        word in prompt for word in ("Guess.", "12", "57", "answer: 5", "wrong", "Say it shorter.", "[[ ##")
    )
    assert instruction == "New."


@pytest.mark.parametrize(
    ("names", "shown"),
    [({"answer": "4", "unit": "m"}, "answer: 4"), ({"total": "4", "unit": "m"}, "total: 4\nunit: m")],
)
def test_an_induction_shows_the_predictors_own_outputs_if_the_names_tell_them(names: Any, shown: str) -> None:
    labeled = exemplar(1.0, expected=describe(names), expected_fields=names)
    prompt, _ = asked(replace(INDUCE, exemplars=[labeled]))
    assert f"Right answer:\n{shown}\n\nBy which rule" in prompt


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"guidance": "Keep it short."}, "\n\nThese rules hold for every instruction:\nKeep it short."),
        ({"current": {"step": "Add {numbers}."}}, " Keep every placeholder in {curly braces}."),
        ({}, "Answer only with the text of the instruction."),
    ],
)
def test_an_induction_ends_with_what_every_instruction_keeps(changes: Any, expected: str) -> None:
    assert asked(replace(INDUCE, **changes))[0].endswith(expected)


def test_an_induction_is_cleaned_and_has_no_sentence_of_the_request() -> None:
    assert asked(INDUCE, f"Instruction: {REQUESTS['induce']} Count.")[1] == "Count."


async def test_a_reasoning_model_induces_in_an_async_program() -> None:
    class Thinking(ScriptedLM):
        async def acall(self, *args: Any, **kwargs: Any) -> Any:
            (text,) = await super().acall(*args, **kwargs)
            return [{"text": text, "reasoning_content": "2 and 2 are 4"}]

    with dspy.context(lm=Thinking(lambda call: "Count.")):
        result = await OPROProposer().acall(request=INDUCE)
    assert result.instruction == "Count."


def test_all_predictors_at_once() -> None:
    request = replace(
        REQUEST,
        predictors=("a", "b"),
        current={"a": "A.", "b": "B."},
        scored_instructions={"a": [("A.", 50)], "b": [("B.", None)]},
    )
    prompt, instruction = asked(request, {"a": "A2.", "b": f"{REQUESTS[request.style]} B2."})
    assert instruction == {"a": "A2.", "b": "B2."}
    assert "Step a:\ntext:\nA.\nscore:\n50\n\nStep b:\ntext:\nB.\nscore:\nnot scored yet" in prompt


async def test_the_proposer_is_an_async_module_too() -> None:
    lm = ScriptedLM(lambda call: {"instruction": "Mind the sign."})
    with dspy.context(lm=lm):
        result = await OPROProposer().acall(request=replace(REQUEST, style="extend"))
    assert result.instruction == "Add the numbers. Mind the sign."


def test_without_exemplars_the_prompt_says_so() -> None:
    assert "(none)" in asked(replace(REQUEST, exemplars=[]))[0]


def test_an_exemplar_that_was_not_run_shows_no_output_and_no_result() -> None:
    text = exemplar_text(exemplar(None, prediction=""))
    assert text == "input:\nquestion: 2 + 2\nexpected:\nanswer: 4"


def test_a_failed_exemplar_shows_the_cause() -> None:
    failed = exemplar(None, prediction="", outcome=Outcome(0.0, error="ValueError: no JSON"))
    assert exemplar_text(failed).endswith("result:\nfailed: ValueError: no JSON")


def test_scores_are_written_as_the_paper_writes_them() -> None:
    assert scored_text([("a", 5), ("b", None)]) == "text:\na\nscore:\n5\n\ntext:\nb\nscore:\nnot scored yet"


# --- the paper -------------------------------------------------------------------------------------------

FIGURE_3 = """\
I have some texts along with their corresponding scores. The texts are arranged in ascending order based on their \
scores, where higher scores indicate better quality.

text:
Let's figure it out!
score:
61

text:
Let's solve the problem.
score:
63

The following exemplars show how to apply your text: you replace <INS> in each input with your text, then read the \
input and give an output. We say your output is wrong if your output is different from the given output, and we say \
your output is correct if they are the same.

input:
<INS>
question: Alannah, Beatrix, and Queen are preparing for the new school year
output:
answer: 140

Write your new text that is different from the old ones and has a score as high as possible. Write the text in \
square brackets."""
"""Figure 3 of arXiv 2309.03409, with a shortened exemplar and the instruction at the place A_begin of section 5.1."""


def paper_request(**changes: Any) -> ProposalRequest:
    shown = Exemplar(
        "question: Alannah, Beatrix, and Queen are preparing for the new school year",
        "answer: 140",
        "",
        None,
        (0.0, 1.0),
    )
    texts = [("Let's figure it out!", 61), ("Let's solve the problem.", 63)]
    return replace(REQUEST, scored_instructions={"step": texts}, exemplars=[shown], **changes)


def test_the_papers_meta_prompt_is_figure_3() -> None:
    assert PaperProposer().meta_prompt(paper_request()) == FIGURE_3


async def test_the_papers_proposer_asks_with_it() -> None:
    prompt, instruction = asked(paper_request(), "[Think.]", PaperProposer())
    assert FIGURE_3 in prompt
    assert instruction == "[Think.]"
    lm = ScriptedLM(lambda call: {"instruction": "[Think.]"})
    with dspy.context(lm=lm):
        assert (await PaperProposer().acall(request=paper_request())).instruction == "[Think.]"
    assert FIGURE_3 in lm.calls[0].prompt


def test_the_papers_prompt_leaves_out_what_has_no_score() -> None:
    text = PaperProposer().meta_prompt(replace(REQUEST, scored_instructions={"step": [("Guess.", None)]}))
    assert "Guess." not in text
