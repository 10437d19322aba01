"""A proposer for models that continue text: small models, and models without instruction tuning.

The requests have three styles in turn. `refine` is the paper's for pre-trained models (arXiv 2309.03409, section 5.1):
the model continues a list of scored instructions, in ascending order, with the next and better one. If the answers can
be listed, the model continues guidelines in the style `explore`, and adds one to the best instruction in `extend`.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, ClassVar

import dspy

from dspy_opro.programs.program import Fields
from dspy_opro.search.tasks import rng

from .cleaning import clean, first_text
from .meta_prompt import ProposalRequest

# Typical tasks of programs, as (input, answers, instructions from worse to better). They show a small model what an
# instruction is.
_OTHER_TASKS: Sequence[tuple[str, tuple[str, ...], tuple[str, str]]] = (
    ("email", ("spam", "wanted"), (
        "Decide whether the email is spam or wanted mail.",
        "Answer spam if the email tries to sell something to a stranger, and wanted if not.")),
    ("sentence", ("correct", "wrong"), (
        "Check the grammar of the sentence: is it correct or wrong?",
        "Look at verbs and word order. A sentence with a mistake is wrong, all others are correct.")),
    ("headline", ("sport", "politics", "business"), (
        "Say what the headline is about: sport, politics or business.",
        "Choose business for companies, politics for governments, sport for games and players.")),
    ("question", ("easy", "hard"), (
        "Mark the question as easy or hard.",
        "Would a child know the answer? Then the question is easy, else it is hard.")),
)  # fmt: skip


class CompletionProposer(dspy.Module):
    """Asks the optimizer LM to continue a text whose next line is a better instruction.

    Args:
        max_tokens: The most tokens of one instruction. The instruction ends at the end of its line.

    Example:
        >>> from dspy_opro import OPROTeleprompter
        >>> from dspy_opro.proposers.completion import CompletionProposer
        >>> def metric(example, prediction):
        ...     return example.label == prediction.label
        >>> teleprompter = OPROTeleprompter(metric=metric, proposer=CompletionProposer())
    """

    writes_one: ClassVar[bool] = True
    """It writes one instruction at a time, so it does not go with `predictor_strategy="joint"`."""

    def __init__(self, max_tokens: int = 60) -> None:
        super().__init__()
        self.max_tokens = max_tokens

    def forward(self, request: ProposalRequest) -> Any:
        prompt, begin = self.prompt(request)
        if request.guidance:
            prompt = f"Rules for every instruction:\n{request.guidance}\n\n{prompt}"
        lm = dspy.settings.lm.copy(model_type="text", max_tokens=self.max_tokens, stop=["\n"])
        text = clean(first_text(lm(prompt)))
        return dspy.Prediction(instruction=f"{begin}{text}" if text else "")

    def prompt(self, request: ProposalRequest) -> tuple[str, str]:
        """The text to continue, and the end of this text that belongs to the instruction."""
        (name,) = request.predictors
        generator = rng(request.seed, "completion")
        fields, current = request.fields[name], request.current[name].strip()
        inputs, answers = " and ".join(fields.inputs), _answers(fields, generator)
        if fields.choices and request.style != "refine":
            begin = f"Answer {answers[0]} if"
            if request.style == "extend":
                begin = f"{current.rstrip('.')}. {begin}"
            return f"Guidelines for labelling a {inputs} as {' or '.join(answers)}:\n- {begin}", f"{begin} "
        scored = [(text, score) for text, score in request.scored_instructions[name] if score is not None]
        return _list(inputs, answers, scored[-4:], generator), ""


def _answers(fields: Fields, generator: Random) -> Sequence[str]:
    """The answers that the predictor may give, in random order, because a model may favour the first."""
    named = [name for name in fields.outputs if name in fields.choices]
    if not named:
        return fields.outputs
    choices = fields.choices[named[-1]]
    return generator.sample(choices, len(choices))


def _list(inputs: str, answers: Sequence[str], scored: Sequence[tuple[str, int]], generator: Random) -> str:
    """The paper's list of scored instructions, after the same lists for other tasks."""
    blocks = []
    for other, labels, texts in generator.sample(_OTHER_TASKS, 3):
        low = generator.randint(40, 60)
        scored_texts = list(zip(texts, (low, generator.randint(low + 20, 96)), strict=True))
        blocks.append(_block(other, generator.sample(labels, len(labels)), scored_texts))
    best = scored[-1][1] if scored else 50
    blocks.append(f"{_block(inputs, answers, scored)}instruction (score {min(99, best + 10)}):")
    return "\n".join(blocks)


def _block(inputs: str, answers: Sequence[str], scored: Sequence[tuple[str, int]]) -> str:
    lines = [f"input: {inputs}", f"answers: {', '.join(answers)}"]
    lines += [f"instruction (score {score}): {' '.join(text.split())}" for text, score in scored]
    return "\n".join(lines) + "\n"
