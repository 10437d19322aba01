"""Renders the prompts that `docs/meta-prompt.md` shows, from a run whose models are scripted.

`python docs/meta_prompt.py` puts them into the page; a test fails where the page shows others.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import dspy

from dspy_opro import OPROTeleprompter
from dspy_opro.proposers.opro import REQUESTS
from dspy_opro.testing import LMCall, ScriptedLM

PAGE = Path(__file__).with_name("meta-prompt.md")

MAILS = [
    ("The invoice of March shows the old address.", "billing"),
    ("Since the update the app closes when I open a photo.", "technical"),
    ("I want to return the shoes, they are too small.", "shipping"),
    ("You charged my card twice.", "billing"),
    ("My parcel has been in the same town for a week.", "shipping"),
    ("I can't log in, and I pay for this!", "technical"),
    ("Where do I see how much I paid last year?", "billing"),
    ("The screen stays black, please send another one.", "shipping"),
]
"""Mail and the team that answers it."""

HINTS = {"what the customer wants": "shipping", "money": "billing", "one word": "technical"}
"""Words of an instruction -> the team whose mails the scripted scorer gets right once it reads them."""

PROPOSALS = [
    "Name the team that answers the mail: billing, technical or shipping.",
    "Decide by what the customer wants done, not by the words of the mail.",
    "Name the team in one word: billing, technical or shipping.",
    "Ask yourself what the customer wants, then name the team in one word.",
    "Name the team. Anything about money goes to billing.",
    "Ask yourself what the customer wants. Anything about money goes to billing.",
]
"""What the scripted optimizer LM has to say."""


TOPICS = {"billing": "a payment", "technical": "a fault of the app", "shipping": "a parcel"}


class TwoSteps(dspy.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.read = dspy.Predict(dspy.Signature("mail -> topic", "Name the topic."))
        self.assign = dspy.Predict(dspy.Signature("topic -> team", "Name the team."))

    def forward(self, mail: str) -> Any:
        return self.assign(topic=self.read(mail=mail).topic)


def scorer(call: LMCall) -> dict[str, str]:
    if "topic" in call.output_fields:
        mail = call.inputs["mail"]
        knows = "what the customer wants" in call.instructions
        return {"topic": TOPICS[dict(MAILS)[mail]] if knows else f"it begins with {mail.split()[0]!r}"}
    if "topic" in call.inputs:
        return {
            "team": next((team for team, topic in TOPICS.items() if topic == call.inputs["topic"]), "support")
        }
    mail = call.inputs["mail"]
    team = dict(MAILS)[mail]
    knows = any(hint in call.instructions and team == known for hint, known in HINTS.items())
    return {"team": team if knows else "support"}


def proposer(call: LMCall) -> dict[str, str] | str:
    text = PROPOSALS[(call.rollout_id or 0) % len(PROPOSALS)]
    return dict.fromkeys(call.output_fields, text) or text


def metric(example: Any, prediction: Any, trace: Any = None) -> dict[str, Any]:
    right = prediction.team == example.team
    return {"score": right, "feedback": "" if right else f"This is for {example.team}."}


def prompts(student: Any = None, **settings: Any) -> list[LMCall]:
    """Every call of the optimizer LM in a short run, the one that knows most first."""
    optimizer = ScriptedLM(proposer)
    trainset = [dspy.Example(mail=mail, team=team).with_inputs("mail") for mail, team in MAILS]
    student = student or dspy.Predict(dspy.Signature("mail -> team", "Sort the mail."))
    teleprompter = OPROTeleprompter(
        metric, prompt_model=optimizer, num_threads=4, display_progress=False, num_rounds=4, **settings
    )
    with dspy.context(lm=ScriptedLM(scorer)):
        teleprompter.compile(student, trainset=trainset)
    return sorted(optimizer.calls, key=lambda call: (call.prompt.count("score"), call.prompt), reverse=True)


def rendered() -> dict[str, str]:
    """Name of a block in the page -> its text."""
    default, paper = prompts(num_candidates=4), prompts(auto="paper")
    explore = next(call for call in default if REQUESTS["explore"] in call.prompt)
    several = prompts(TwoSteps(), num_candidates=4, num_exemplars=1)
    first = next(
        call for call in several if "input of step read" in call.prompt and "result:\nwrong" in call.prompt
    )
    return {
        "several": f"[[ ## role ## ]]\n{first.inputs['role']}\n\n[[ ## examples ## ]]\n{first.inputs['examples']}",
        "default": "\n\n".join(f"--- {role} ---\n{text}" for role, text in explore.messages),
        "requests": "\n\n".join(f"{style}: {words}" for style, words in REQUESTS.items()),
        "induce": next(call.prompt for call in default if REQUESTS["induce"] in call.prompt),
        "paper": paper[0].messages[-1][1],
    }


def block(name: str) -> re.Pattern[str]:
    """Where the page shows this text."""
    return re.compile(rf"(?<=<!-- {name} -->\n```text\n).*?(?=\n```\n)", re.DOTALL)


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    for name, text in rendered().items():
        page = block(name).sub(lambda _, text=text: text, page, count=1)  # type: ignore[misc]
    PAGE.write_text(page, encoding="utf-8")
