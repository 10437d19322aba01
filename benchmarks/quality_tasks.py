"""The tasks of `quality.py`: programs, data and metrics that real language models are measured on.

One rule: train, selection and test examples are apart, and every optimizer and every seed has the same test examples.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import dspy

REVIEWS = Path(__file__).parent.parent / "examples" / "data" / "reviews.jsonl"


@dataclass(frozen=True)
class Task:
    """A program and examples with the expected value of each output in `fields`."""

    name: str
    student: Callable[[], dspy.Module]
    examples: Sequence[dspy.Example]
    fields: tuple[str, ...]
    exact: bool = True
    """False: the expected words are in the answer, and the answer has at most 12 words."""

    def metric(self, example: dspy.Example, prediction: Any, trace: Any = None) -> float:
        """The share of the outputs that are right."""
        return sum(self._is_right(example, prediction, name) for name in self.fields) / len(self.fields)

    def feedback(self, example: dspy.Example, prediction: Any) -> str:
        """What is wrong, for GEPA."""
        wrong = [name for name in self.fields if not self._is_right(example, prediction, name)]
        return " ".join(f"Wrong; the right {name} is: {example[name]}." for name in wrong) or "Right."

    def _is_right(self, example: dspy.Example, prediction: Any, name: str) -> bool:
        answer, expected = str(getattr(prediction, name, "")).lower(), str(example[name]).lower()
        if self.exact:
            return answer.strip() == expected
        return expected in answer and len(answer.split()) <= 12

    def split(self, seed: int, sizes: tuple[int, int, int]) -> tuple[list[dspy.Example], ...]:
        """Train, selection and test examples. The seed draws the first two from what the test leaves.

        A task with too few examples has fewer test examples.

        Raises:
            ValueError: Fewer than half of the test examples are left.
        """
        num_train, num_val, num_test = sizes
        needed = num_train + num_val + num_test // 2
        if needed > len(self.examples):
            raise ValueError(f"{self.name} has {len(self.examples)} examples, but {needed} are needed.")
        num_test = min(num_test, len(self.examples) - num_train - num_val)
        shuffled = random.Random(0).sample(list(self.examples), len(self.examples))
        test, rest = shuffled[:num_test], shuffled[num_test:]
        drawn = random.Random(seed).sample(rest, num_train + num_val)
        return drawn[:num_train], drawn[num_train:], test

    def majority(self, examples: Sequence[dspy.Example]) -> float:
        """The score of a program that always gives the most frequent answers."""
        most = [Counter(example[name] for example in examples).most_common(1)[0][1] for name in self.fields]
        return sum(most) / len(most) / len(examples)


INSTRUCTIONS = {
    "trec": "Say what the question asks for.",
    "sst5": "Grade the film review.",
    "cr": "Say whether the product review is positive or negative.",
    "bbh_sports_understanding": "Say whether the sentence is plausible.",
    "bbh_navigate": "Answer the question.",
    "bbh_snarks": "Say which statement is sarcastic.",
}
"""Data set in the folder of `--data` -> the student's instructions."""

BY_HAND: Mapping[str, Mapping[str, str]] = {
    "reviews": {
        "self": "Say good if the writer would buy or visit it again, and bad if the writer is disappointed.",
    },
    "trec": {
        "self": "Choose the type of the answer. Who -> human. Where -> location. When or how many -> "
        "number. What does X stand for -> abbreviation. Why, how, or a definition -> "
        "description. Anything else, as an animal, a product, a color or a word -> entity.",
    },
    "sst5": {
        "self": "Grade the film review from terrible (the writer hated the film) over bad, okay and good "
        "to great (the writer loved it). Choose bad or good for mild opinions, and okay only if "
        "there is no opinion at all.",
    },
    "cr": {
        "self": "Say whether the customer is happy (positive) or unhappy (negative) with the product. A "
        "complaint, a defect or a wish for something better is negative.",
    },
    "bbh_sports_understanding": {
        "self": "Say whether the sentence is plausible: yes if the person plays the sport that the "
        "action belongs to, and no if the person is known for another sport.",
    },
    "bbh_navigate": {
        "self": "Imagine a map. Start at (0, 0) and face north. Follow each step and keep track of the "
        "position. Answer Yes only if the last position is (0, 0), else No.",
    },
    "bbh_snarks": {
        "self": "Say which statement is sarcastic: the one that praises something bad, or exaggerates so "
        "much that it can't be meant literally.",
    },
    "tickets": {
        "route": "Choose the team for the message: billing for charges, invoices, refunds and discounts; "
        "delivery for parcels, addresses and missing parts; technical for things that do not "
        "work.",
        "rate": "Choose the priority of the message. A message with a date (like 4 May) is high. A "
        "message with thanks is low. All others are normal.",
    },
    "directory": {
        "search": "Write a search query: the first and the last name of the person, and one of the words "
        "works, lives, born and keeps.",
        "answer": "Answer the question with one or two words of the passage about the person that it names.",
    },
    "gym_letter_counting": {
        "self": "Go through the text letter by letter, small and capital letters alike, and count how often the letter "
        "comes. Most letters come 1 to 4 times. Answer with the number alone.",
    },
    "gym_leg_counting": {
        "self": "Birds and humans have 2 legs, mammals 4, insects 6, spiders and scorpions 8, crabs, lobsters and "
        "shrimps 10, woodlice 14, starfish 5, and snakes, slugs, worms, leeches and jellyfish 0. Multiply each number "
        "of animals by its legs, and add all. Answer with the number alone.",
    },
}
"""Task -> predictor -> instructions written by hand, with the answers known.

They show whether a model follows instructions at all. Where they gain nothing, an optimizer has nothing to find.
"""


def labelled(name: str, instructions: str, rows: Sequence[dict[str, str]]) -> Task:
    """A task that gives each text one label."""
    labels = tuple(sorted({row["label"] for row in rows}))
    fields: dict[str, Any] = {
        "text": (str, dspy.InputField()),
        "label": (Literal[labels], dspy.OutputField()),
    }
    signature = dspy.Signature(fields, instructions)  # type: ignore[arg-type]
    examples = [dspy.Example(**row).with_inputs("text") for row in rows]
    return Task(name, partial(dspy.Predict, signature), examples, ("label",))


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a data set.

    TREC is published with numbers as labels, and in a copy whose names `location` and `number` are interchanged, "How
    many" asks for a location. Such a copy gets the right names here.
    """
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    how_many = [row["label"] for row in rows if row["text"].lower().startswith("how many ")]
    if path.stem == "trec" and how_many.count("location") > how_many.count("number"):
        right = {"location": "number", "number": "location"}
        rows = [{**row, "label": right.get(row["label"], row["label"])} for row in rows]
    return rows


def reviews() -> Task:
    """The task of `examples/quickstart.py`, with its examples drawn anew."""
    verdict = Literal["good", "bad"]
    fields: dict[str, Any] = {"review": (str, dspy.InputField()), "verdict": (verdict, dspy.OutputField())}
    rows = [json.loads(line) for line in REVIEWS.read_text(encoding="utf-8").splitlines()]
    examples = [
        dspy.Example(review=row["review"], verdict=row["verdict"]).with_inputs("review") for row in rows
    ]
    return Task("reviews", partial(dspy.Predict, dspy.Signature(fields)), examples, ("verdict",))


class Tickets(dspy.Module):
    """Two predictors: the team that a message goes to, and then its priority."""

    TEAMS = ("billing", "delivery", "technical")
    PRIORITIES = ("low", "normal", "high")

    def __init__(self) -> None:
        super().__init__()
        message: dict[str, Any] = {"message": (str, dspy.InputField())}
        team, priority = Literal[self.TEAMS], Literal[self.PRIORITIES]  # type: ignore[valid-type]
        self.route = dspy.Predict(
            dspy.Signature(
                {**message, "team": (team, dspy.OutputField())}, "Choose the team for the message."
            )
        )
        fields = {**message, "team": (str, dspy.InputField()), "priority": (priority, dspy.OutputField())}
        self.rate = dspy.Predict(dspy.Signature(fields, "Choose the priority of the message."))

    def forward(self, message: str) -> dspy.Prediction:
        team = self.route(message=message).team
        return dspy.Prediction(team=team, priority=self.rate(message=message, team=team).priority)


def tickets(num_examples: int = 300) -> Task:
    """Messages to a shop. The priority follows a rule of the house that only the examples show.

    A message with a date is high, a message with thanks is low, and all others are normal.
    """
    draws = random.Random("tickets")
    problems = {
        "billing": ("I was charged twice", "the invoice is too high", "my refund is missing", "I see no discount"),
        "delivery": ("the parcel is late", "the box came open", "it went to my old address", "one part is missing"),
        "technical": ("it does not switch on", "the app closes", "the battery is empty", "the screen stays black"),
    }  # fmt: skip
    endings = {
        "high": ("I need an answer by 4 May", "I need it on 12 June", "we leave on 30 August", "we start on 1 March"),
        "low": ("thanks for your service", "many thanks anyway", "thank you for asking", "thanks to all of you"),
        "normal": ("please look into it", "what can be done", "tell me what to do", "I would like to hear from you"),
    }  # fmt: skip
    things = ("kettle", "bicycle", "desk lamp", "radio", "camera", "tent", "coffee mill", "heater")
    openings = ("Hello,", "Good morning,", "Dear team,", "Hi,")
    combinations = [
        (f"{opening} about my {thing}: {problem}; {ending}.", team, priority)
        for opening in openings for thing in things
        for team, some in problems.items() for problem in some
        for priority, others in endings.items() for ending in others
    ]  # fmt: skip
    drawn = draws.sample(combinations, num_examples)
    examples = [dspy.Example(message=m, team=t, priority=p).with_inputs("message") for m, t, p in drawn]
    return Task("tickets", Tickets, examples, ("team", "priority"))


class Directory(dspy.Module):
    """Two predictors: a search query, and the answer from the sentences that it finds."""

    def __init__(self, passages: Sequence[str]) -> None:
        super().__init__()
        self.passages = tuple(passages)
        self.search = dspy.Predict(dspy.Signature("question -> query", "Write a search query."))
        self.answer = dspy.Predict(
            dspy.Signature("passages: list[str], question -> answer", "Answer the question.")
        )

    def forward(self, question: str) -> dspy.Prediction:
        wanted = _words(str(self.search(question=question).query))
        found = sorted(self.passages, key=lambda passage: -len(wanted & _words(passage)))[:2]
        return self.answer(passages=found, question=question)


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]{3,}", text.lower())) - {
        "the",
        "and",
        "has",
        "was",
        "who",
        "what",
        "does",
        "which",
    }


def directory() -> Task:
    """Questions about the people of a town that does not exist, so that no model knows the answers."""
    draws = random.Random("directory")
    names = [f"{first} {last}" for first in ("Ida", "Piet", "Hanna", "Olaf", "Mira", "Jon", "Greta", "Emil")
             for last in ("Brandt", "Holm", "Olsen", "Kessel", "Lindqvist", "Marten", "Sorrel", "Vik")]  # fmt: skip
    jobs = ("baker", "teacher", "ferry pilot", "clock maker", "gardener", "nurse", "carpenter", "cook")
    streets = ("Rope Street", "Mill Square", "Harbour Lane", "Church Hill", "Fish Market", "Tower Road")
    animals = ("a grey cat", "two goats", "a parrot", "an old dog", "nine hens", "a white horse")
    passages, examples = [], []
    for name in names:
        job, street, animal, year = (draws.choice(s) for s in (jobs, streets, animals, range(1921, 1999)))
        passages += [
            f"{name} works as a {job} and lives on {street}.",
            f"{name} was born in {year} and keeps {animal}.",
        ]
        questions = {
            f"What is the job of {name}?": job, f"On which street does {name} live?": street,
            f"In which year was {name} born?": str(year), f"Which animals does {name} keep?": animal.split()[-1],
        }  # fmt: skip
        examples += [dspy.Example(question=q, answer=a).with_inputs("question") for q, a in questions.items()]
    return Task("directory", partial(Directory, passages), examples, ("answer",), exact=False)


def reasoning_gym(name: str, num_examples: int = 300) -> Task:
    """A generator of the package `reasoning-gym`; an answer is right where it equals the generator's."""
    import reasoning_gym as gym

    rows = gym.create_dataset(name, size=num_examples, seed=0)
    examples = [
        dspy.Example(question=row["question"], answer=row["answer"]).with_inputs("question") for row in rows
    ]
    signature = dspy.Signature("question -> answer", "Answer the question.")
    return Task(f"gym_{name}", partial(dspy.Predict, signature), examples, ("answer",))


def tasks(data: Path | None) -> dict[str, Callable[[], Task]]:
    """Name -> how to make the task; of the folder's tasks those whose file is there."""
    found: dict[str, Callable[[], Task]] = {
        "reviews": reviews,
        "tickets": tickets,
        "directory": directory,
    }
    if find_spec("reasoning_gym") is not None:
        for name in ("leg_counting", "letter_counting"):
            found[f"gym_{name}"] = partial(reasoning_gym, name)
    for name, instructions in INSTRUCTIONS.items() if data is not None else ():
        path = Path(data or "") / f"{name}.jsonl"
        if path.exists():
            found[name] = lambda name=name, instructions=instructions, path=path: labelled(  # type: ignore[misc]
                name, instructions, read(path)
            )
    return found
