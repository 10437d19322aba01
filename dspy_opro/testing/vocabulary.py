"""A task whose best instructions are known: some words of an invented vocabulary help, others harm.

One rule: what is right, what is proposed and how good an instruction truly is are functions of the seed, so
that optimizers can be compared on the quality they reach and not on what a metric happened to measure.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from dspy_opro.testing.calls import LMCall, digest
from dspy_opro.testing.models import uniform

if TYPE_CHECKING:
    import dspy

NUM_WORDS, NUM_GOOD, NUM_BAD = 48, 10, 12
GAIN, LOSS = 0.06, 0.05
BASE_CHANCE = 0.30
NUM_COUNTED = 12
"""Only so many vocabulary words of an instruction count, the first ones."""
NOISE = 0.3
"""The share of the difficulty that is drawn for each pair of instruction and item. The rest belongs to the item."""
NUM_KEPT, NUM_NEW = 5, 3

_ITEM = re.compile(r"\bitem ([a-z]+-\d+)\b")
_INSTRUCTION_FIELD = re.compile(r"instruction|prompt")


def _invent(count: int) -> tuple[str, ...]:
    """Words that no ordinary prompt contains: three syllables with endings that English does not use."""
    syllables = random.Random("vocabulary")
    words: dict[str, None] = {}
    while len(words) < count:
        starts = [syllables.choice("bdfgklmnprtvz") + syllables.choice("aeiou") for _ in range(2)]
        words["".join(starts) + syllables.choice(["zix", "vok", "qul", "jep", "wub", "xun"])] = None
    return tuple(words)


WORDS = _invent(NUM_WORDS)
_WORD = re.compile("|".join(WORDS), re.IGNORECASE)


@dataclass(frozen=True)
class VocabularyTask:
    """Questions that a simulated scorer gets right with a chance that the words of its instructions decide.

    An instruction has a quality of 0.30, plus 0.06 for each good word and minus 0.05 for each bad one. Only the first
    twelve vocabulary words in it count. Ten of the 48 words are good and twelve are bad. The scorer answers an item
    right if `0.7 * (the item's difficulty) + 0.3 * (a draw fixed by the words and the item)` is below that quality.
    `true_quality` gives the share of all items that are answered right: 0.214 for a quality of 0.30, and 0.976 for the
    best one, 0.90.

    With the defaults good and bad instructions differ clearly. `signal=0.3, noise=0.15` is nearer to a real language
    model: proposals differ by 0.03 in their chances, and the difference of two on one item has a standard deviation of
    about 0.24. With `base=0.5, signal=0, noise=1` every instruction answers every item right with a chance of one half.

    Args:
        seed: Decides which words are good, how hard the items are, and all draws.
        signal: Multiplies `gain` and `loss`, at least 0.
        noise: The share of the difficulty that is drawn for each pair of instruction and item, in [0, 1]. The rest
            belongs to the item, and all instructions share it.
        base: The quality without vocabulary words, in [0, 1].
        gain: What a good word adds to the quality, at least 0.
        loss: What a bad word takes from it, at least 0.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        ```python
        task = VocabularyTask(seed=1)
        with SimulatedServer({"scorer": task.scorer, "proposer": task.proposer}) as server:
            dspy.configure(lm=server.lm("scorer"))
            teleprompter = OPROTeleprompter(metric=task.metric, prompt_model=server.lm("proposer"))
            program = teleprompter.compile(task.student(), trainset=task.trainset(60), valset=task.valset(60))
        task.true_quality(program.signature.instructions)
        ```
    """

    seed: int = 0
    signal: float = 1.0
    noise: float = NOISE
    base: float = BASE_CHANCE
    gain: float = GAIN
    loss: float = LOSS

    def __post_init__(self) -> None:
        for name, most in (
            ("signal", math.inf),
            ("noise", 1),
            ("base", 1),
            ("gain", math.inf),
            ("loss", math.inf),
        ):
            if not 0 <= getattr(self, name) <= most:
                bounds = "at least 0" if most == math.inf else f"in [0, {most}]"
                raise ValueError(f"{name} must be {bounds}, but got {getattr(self, name)!r}.")

    @cached_property
    def _shuffled(self) -> list[str]:
        return random.Random(digest("words", self.seed)).sample(WORDS, NUM_WORDS)

    @cached_property
    def good(self) -> frozenset[str]:
        """The words that help."""
        return frozenset(self._shuffled[:NUM_GOOD])

    @cached_property
    def bad(self) -> frozenset[str]:
        """The words that harm."""
        return frozenset(self._shuffled[NUM_GOOD : NUM_GOOD + NUM_BAD])

    def words(self, instruction: str) -> frozenset[str]:
        """The vocabulary words of an instruction that count."""
        found = dict.fromkeys(word.lower() for word in _WORD.findall(instruction))
        return frozenset(list(found)[:NUM_COUNTED])

    def quality(self, instruction: str) -> float:
        """The bound below which an item is answered right; with the defaults between 0 and 0.9.

        It orders instructions, but it is no share of items: that is `true_quality`.
        """
        words = self.words(instruction)
        gained, lost = self.gain * len(words & self.good), self.loss * len(words & self.bad)
        return max(0.0, self.base + self.signal * gained - self.signal * lost)

    def true_quality(self, instruction: str) -> float:
        """The probability of a right answer to an item that nobody has seen, in [0, 1].

        With independent U and V from [0, 1] it is P((1 - noise) * U + noise * V < quality): the part of the unit
        square below a line.
        """
        quality, (narrow, wide) = self.quality(instruction), sorted((self.noise, 1 - self.noise))
        if quality >= 1:
            return 1.0
        if quality < narrow:
            return quality**2 / (2 * narrow * wide)
        if quality <= wide:
            return (quality - narrow / 2) / wide
        return 1 - (1 - quality) ** 2 / (2 * narrow * wide)

    def is_right(self, instruction: str, item: str, demos: str = "") -> bool:
        """Whether the scorer under this instruction gets the item right. Other `demos` give another draw."""
        difficulty = uniform("difficulty", self.seed, item)
        shown = sorted(self.words(instruction)), *([demos] if demos else [])
        draw = uniform("draw", self.seed, *shown, item)
        share = 1 - self.noise
        return share * difficulty + (1 - share) * draw < self.quality(instruction)

    def answer(self, item: str) -> str:
        """The right answer to an item."""
        return f"code {int(uniform('answer', self.seed, item) * 10_000):04d}"

    @property
    def scorer(self) -> VocabularyScorer:
        """The answer function of a scorer LM."""
        return VocabularyScorer(self)

    @property
    def proposer(self) -> VocabularyProposer:
        """The answer function of an optimizer LM."""
        return VocabularyProposer(self)

    def examples(self, kind: str, count: int) -> list[dspy.Example]:
        """`count` examples with `question` and `answer`; another `kind` gives other items."""
        import dspy

        items = [f"{kind}-{number}" for number in range(count)]
        return [
            dspy.Example(
                question=f"Which code belongs to item {item}?", answer=self.answer(item)
            ).with_inputs("question")
            for item in items
        ]

    def trainset(self, count: int = 60) -> list[dspy.Example]:
        """Items to optimize on."""
        return self.examples("train", count)

    def valset(self, count: int = 60) -> list[dspy.Example]:
        """Items that the trainset does not contain."""
        return self.examples("val", count)

    def student(self) -> dspy.Predict:
        """A program whose instruction has no vocabulary word: its quality is `base`."""
        import dspy

        return dspy.Predict(dspy.Signature("question -> answer", "Name the code of the item."))

    @staticmethod
    def metric(
        example: dspy.Example,
        prediction: dspy.Prediction,
        trace: object = None,
        pred_name: object = None,
        pred_trace: object = None,
    ) -> float:
        """1.0 for the right answer, else 0.0; takes the arguments of every DSPy optimizer."""
        return float(example.answer == prediction.answer)


@dataclass(frozen=True)
class VocabularyScorer:
    """Answers an item as `VocabularyTask.is_right` decides."""

    task: VocabularyTask

    def __call__(self, call: LMCall) -> Mapping[str, str]:
        """Fill every output field; a program may ask for a reasoning before the answer."""
        items = _ITEM.findall(call.user)
        right = bool(items) and self.task.is_right(call.instructions, items[-1])
        answer = self.task.answer(items[-1]) if right else "code unknown"
        fields = call.output_fields or ("answer",)
        return {field: answer if field == fields[-1] else "The item is known." for field in fields}


@dataclass(frozen=True)
class VocabularyProposer:
    """Proposes five vocabulary words of the prompt, later ones more likely, and three random ones."""

    task: VocabularyTask

    def __call__(self, call: LMCall) -> str | Mapping[str, str]:
        """Answer whatever the prompt asks for: the field that holds an instruction, or free text."""
        instruction = f"Name the code of the item. Keep in mind: {', '.join(self.propose(call))}."
        if not call.output_fields:
            return f"```\n{instruction}\n```" if "```" in call.prompt else instruction
        fields = [field for field in call.output_fields if _INSTRUCTION_FIELD.search(field)]
        return {field: instruction if field in fields else "Answer:" for field in call.output_fields}

    def propose(self, call: LMCall) -> list[str]:
        """The words of the next instruction."""
        draws = random.Random(digest("propose", self.task.seed, call.messages, call.temperature, call.seed,
                                     call.rollout_id, call.sample))  # fmt: skip
        last = {word.lower(): place for place, word in enumerate(_WORD.findall(call.prompt), start=1)}
        # Weighted sampling without replacement: the largest of exponentials scaled by the weights
        # (Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006).
        keys = {word: math.log(draws.random()) / place for word, place in sorted(last.items())}
        kept = sorted(keys, key=lambda word: keys[word], reverse=True)[:NUM_KEPT]
        return list(dict.fromkeys(kept + draws.sample(WORDS, NUM_NEW)))
