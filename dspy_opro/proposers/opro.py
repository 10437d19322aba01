"""The proposers that ask the optimizer LM with OPRO's meta-prompt: our own version, and the paper's to the letter.

A proposer is any `dspy.Module` whose call `proposer(request=ProposalRequest)` returns a `dspy.Prediction` with
`instruction` (a str, or for several predictors at once a dict name -> str).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import dspy

from dspy_opro.programs.compat import is_cut
from dspy_opro.programs.program import describe

from .cleaning import clean, first_text, placeholders, whole_sentences
from .meta_prompt import Exemplar, ProposalRequest, verdict


class ProposeInstruction(dspy.Signature):
    """Write the instruction for one step of a language model program.

    You see the instructions tried so far, in ascending order of their scores from 0 to 100. Higher is better, and
    the best instruction comes last. You also see examples of what the program did with the best instruction. Find
    out what separates good instructions from bad ones, and what goes wrong in the examples. The new instruction must
    be concise, effective and generally applicable to inputs that you have not seen: never quote or list the examples.
    Keep every placeholder in {curly braces}. Answer only with the text of the instruction.
    """

    role: str = dspy.InputField(desc="the step that the instruction is for, and its fields")
    scored_instructions: str = dspy.InputField(desc="instructions tried so far with their scores, best last")
    examples: str = dspy.InputField(desc="what the program did with the best instruction")
    request: str = dspy.InputField(desc="what to write now")
    instruction: str = dspy.OutputField(desc="the new instruction, nothing else")


class ProposeInstructions(dspy.Signature):
    """Write the instructions for all steps of a language model program, so that they work well together.

    You see the instructions tried so far, in ascending order of their scores from 0 to 100. Higher is better, and
    the best instructions come last. You also see examples of what the program did with the best instructions. The new
    instructions must be concise, effective and generally applicable to inputs that you have not seen: never quote or
    list the examples. Keep every placeholder in {curly braces}. Answer with one instruction for every step name.
    """

    role: str = dspy.InputField(desc="the steps and their fields")
    scored_instructions: str = dspy.InputField(desc="instructions tried so far with their scores, best last")
    examples: str = dspy.InputField(desc="what the program did with the best instructions")
    request: str = dspy.InputField(desc="what to write now")
    instruction: dict[str, str] = dspy.OutputField(desc="step name -> its new instruction")


REQUESTS: Mapping[str, str] = {
    "explore": "Write a new instruction that is different from all the ones above and has a score as high as possible.",
    "refine": "Rewrite the best instruction. Keep what makes it work, and fix what goes wrong in the examples.",
    "extend": (
        "Write one or two sentences to add at the end of the best instruction. They must fix what goes wrong in the "
        "examples. Answer only with these sentences."
    ),
    "induce": (
        "By which rule is the right answer chosen? Write a better instruction for this step, which says what to do and "
        "by which rule each answer is chosen. It must also hold for inputs that you have not seen, so do not quote the "
        "examples. Answer only with the text of the instruction."
    ),
}
"""Style -> the request in the prompt. An answer to `extend` is appended to the best instruction."""


class OPROProposer(dspy.Module):
    """The default proposer: OPRO's meta-prompt (arXiv 2309.03409, section 4.2) with requests of three styles.

    As long as the student alone is scored, half of the requests have a fourth style, `induce`. It asks for the rule
    behind the right answers (instruction induction, arXiv 2205.10782), in a message without the field markers of DSPy's
    adapters.

    Example:
        >>> from dspy_opro import OPROTeleprompter
        >>> from dspy_opro.proposers import OPROProposer
        >>> def exact(example, prediction):
        ...     return example.answer == prediction.answer
        >>> teleprompter = OPROTeleprompter(metric=exact, proposer=OPROProposer())  # the default
    """

    induces: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.propose = dspy.Predict(ProposeInstruction)
        self.propose_all = dspy.Predict(ProposeInstructions)

    def forward(self, request: ProposalRequest) -> Any:
        texts = prompt_fields(request)
        if request.style == "induce":
            prediction = dspy.Prediction(instruction=first_text(dspy.settings.lm(texts["prompt"])))
        else:
            prediction = self._predictor(request)(**texts)
        return _answered(request, prediction)

    async def aforward(self, request: ProposalRequest) -> Any:
        texts = prompt_fields(request)
        if request.style == "induce":
            answers = await dspy.settings.lm.acall(texts["prompt"])
            prediction = dspy.Prediction(instruction=first_text(answers))
        else:
            prediction = await self._predictor(request).acall(**texts)
        return _answered(request, prediction)

    def _predictor(self, request: ProposalRequest) -> Any:
        return self.propose if len(request.predictors) == 1 else self.propose_all


def prompt_fields(request: ProposalRequest) -> dict[str, str]:
    """The texts of a meta-prompt; in the style `induce` the one `prompt`."""
    if request.style == "induce":
        return {"prompt": induction_prompt(request)}
    return {
        "role": request.role,
        "scored_instructions": "\n\n".join(
            scored_text(request.scored_instructions[name], name if len(request.predictors) > 1 else "")
            for name in request.predictors
        ),
        "examples": "\n\n".join(exemplar_text(e) for e in request.exemplars) or "(none)",
        "request": _guided(REQUESTS[request.style], request),
    }


def induction_prompt(request: ProposalRequest) -> str:
    """Inputs with the right answers, and the request for the rule behind them.

    Of a predictor whose output fields have the names of expected outputs, these outputs alone are shown.
    """
    (name,) = request.predictors

    def answer(exemplar: Exemplar) -> str:
        own = {k: v for k, v in exemplar.expected_fields.items() if k in request.fields[name].outputs}
        return describe(own) if own else exemplar.expected

    answers = "\n\n".join(f"Input:\n{e.inputs}\nRight answer:\n{answer(e)}" for e in request.exemplars)
    kept = " Keep every placeholder in {curly braces}." if placeholders(request.current[name]) else ""
    text = (
        f"Someone writes the instruction of one step of a program.\n\n{request.role}\n\n"
        f"The instruction so far:\n{request.current[name]}\n\n"
        f"Inputs of the program, each with the right answer:\n\n{answers}\n\n{REQUESTS['induce']}{kept}"
    )
    return _guided(text, request)


def _guided(text: str, request: ProposalRequest) -> str:
    """A text for the optimizer LM, with the user's constraints at its end."""
    rules = f"\n\nThese rules hold for every instruction:\n{request.guidance}" if request.guidance else ""
    return text + rules


def _answered(request: ProposalRequest, prediction: Any) -> Any:
    """The prediction without what small models repeat: sentences of the request, and descriptions of the fields.

    An answer that ended at `max_tokens` loses its last, unfinished sentence. In the style `extend` the instruction is
    the best one followed by the answer.
    """
    answer = prediction.instruction
    if isinstance(answer, Mapping):
        answer = {name: _own_words(text, request) for name, text in answer.items()}
    elif isinstance(answer, str):
        answer = _own_words(answer, request)
        if is_cut(dspy.settings.lm):
            answer = whole_sentences(answer)
        if answer and request.style == "extend":
            answer = _extended(request.current[request.predictors[0]].rstrip(), answer)
    prediction.instruction = answer
    return prediction


def _extended(current: str, answer: str) -> str:
    """The instruction with the answer at its end. The answer alone if it repeats the instruction at its beginning."""
    whole = re.escape(" ".join(current.split()))
    if re.match(rf"{whole}(?!\w)", " ".join(answer.split())):
        return answer
    is_open = "\n" in current or re.search(r"\w\Z", current)  # a space would join two sentences or lines
    return f"{current}\n{answer}" if is_open else f"{current} {answer}"


def _own_words(text: Any, request: ProposalRequest) -> str:
    """The cleaned answer without the sentences of the request and the lines that describe the fields."""
    cleaned = clean(str(text or ""))
    for sentence in re.split(r"(?<=\.) ", REQUESTS[request.style]):
        cleaned = re.sub(re.escape(sentence) + r"\s*", "", cleaned)
    described = {line for line in request.role.splitlines() if line.startswith("- ")}
    return "\n".join(line for line in cleaned.splitlines() if line.strip() not in described).strip()


def scored_text(scored: Sequence[tuple[str, int | None]], step: str = "") -> str:
    """Scored instructions in the paper's form: a `text:` and a `score:` for each."""
    head = f"Step {step}:\n" if step else ""
    return head + "\n\n".join(
        f"text:\n{text}\nscore:\n{'not scored yet' if score is None else score}" for text, score in scored
    )


def exemplar_text(exemplar: Exemplar) -> str:
    """One exemplar as `input`, `output`, `expected`, `result` and `feedback`, without the empty ones.

    The inputs and outputs of the request's own predictors follow the input, where `exemplar.calls` has them.
    """
    outcome, parts = exemplar.outcome, {"input": exemplar.inputs}
    for name, call in exemplar.calls.items():
        unparsed = f"could not be parsed: {call['unparsed']}" if "unparsed" in call else "not called"
        parts[f"input of step {name}"] = describe(call.get("inputs", {}))
        parts[f"output of step {name}"] = describe(call["outputs"]) if "outputs" in call else unparsed
    parts |= {"output": exemplar.prediction, "expected": exemplar.expected}
    if outcome is not None:
        parts["result"] = verdict(outcome, *exemplar.score_range)
        parts |= {f"feedback on step {name}": text for name, text in exemplar.feedback.items()}
        parts |= {} if exemplar.feedback else {"feedback": outcome.feedback}
    return "\n".join(f"{name}:\n{text}" for name, text in parts.items() if text or name == "input")


class PaperProposer(dspy.Module):
    """The paper's meta-prompt to the letter (section 4.2, Figure 3), for instructions before the input.

    The paper's code leaves out texts below a score threshold. This proposer does not: the paper does not mention the
    threshold, and on a task with only low scores the meta-prompt would show no text.

    Example:
        >>> from dspy_opro import OPROTeleprompter
        >>> from dspy_opro.proposers import PaperProposer
        >>> def exact(example, prediction):
        ...     return example.answer == prediction.answer
        >>> teleprompter = OPROTeleprompter(metric=exact, proposer=PaperProposer())  # auto="paper" has it, too
    """

    writes_one: ClassVar[bool] = True
    """It writes one instruction at a time, so it does not go with `predictor_strategy="joint"`."""

    def __init__(self) -> None:
        super().__init__()
        signature = dspy.Signature("meta_prompt -> instruction", "Answer with the new text alone.")
        self.propose = dspy.Predict(signature)

    def forward(self, request: ProposalRequest) -> Any:
        return self.propose(meta_prompt=self.meta_prompt(request))

    async def aforward(self, request: ProposalRequest) -> Any:
        return await self.propose.acall(meta_prompt=self.meta_prompt(request))

    def meta_prompt(self, request: ProposalRequest) -> str:
        """The text for the optimizer LM, without the text that the adapter adds."""
        (name,) = request.predictors
        scored = scored_text([pair for pair in request.scored_instructions[name] if pair[1] is not None])
        exemplars = "\n\n".join(
            f"input:\n<INS>\n{e.inputs}\noutput:\n{e.expected}" for e in request.exemplars
        )
        text = (
            "I have some texts along with their corresponding scores. The texts are arranged in ascending order "
            "based on their scores, where higher scores indicate better quality.\n\n"
            f"{scored}\n\n"
            "The following exemplars show how to apply your text: you replace <INS> in each input with your text, "
            "then read the input and give an output. We say your output is wrong if your output is different from "
            "the given output, and we say your output is correct if they are the same.\n\n"
            f"{exemplars}\n\n"
            "Write your new text that is different from the old ones and has a score as high as possible. Write "
            "the text in square brackets."
        )
        return _guided(text, request)
