"""Turns the answer of an optimizer LM into an instruction, or into the reason why the answer is not usable."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

from dspy_opro.programs.program import Program
from dspy_opro.programs.values import fields, shown, storable

_THINK = re.compile(r"\A\s*<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
# The chat template of some models opens the thoughts itself, so that the answer only closes them.
_THOUGHT = re.compile(
    r"\A(?:(?!<think(?:ing)?>).)*?</think(?:ing)?>[ \t]*\n(?=\s*\S)", re.DOTALL | re.IGNORECASE
)
_OPEN_THINK = re.compile(r"</?think(?:ing)?>", re.IGNORECASE)
_LANGUAGE = r"```(?:[\w.+#-]*[ \t]*\n)?"
_FENCE = re.compile(rf"\A{_LANGUAGE}((?:(?!```).)*?)\n?```\Z", re.DOTALL)
_OUTER_FENCE = re.compile(r"\A```(?:markdown|md|text|txt)[ \t]*\n(.*)\n```\Z", re.DOTALL | re.IGNORECASE)
_BLOCK = re.compile(rf"\A{_LANGUAGE}(.*?)\n?```", re.DOTALL)
_TAGGED = re.compile(
    r"\A<((?:\w+_)?(?:instructions?|prompt)|INS|TEXT|answer|output)>\s*(.*?)\s*</\1>\Z",
    re.DOTALL | re.IGNORECASE,
)
_JSON = re.compile(
    r'\A\{\s*"(?:\w+_)?(?:instructions?|prompt)"\s*:\s*("(?:[^"\\]|\\(?:["\\/bfnrt]|u[0-9a-f]{4}))*")\s*[,}].*\Z',
    re.DOTALL | re.IGNORECASE,
)
# Marks of Markdown around the whole instruction. Between two rulers it stands alone, and a comment follows.
_BOLD = re.compile(r"\A(\*{1,3})([^*\n]+)\1\Z")
_TRIPLE = re.compile(r"\A(\"{3}|'{3})((?:(?!\1).)+)\1\Z", re.DOTALL)
_QUOTED = re.compile(r"(?:>[^\n]*(?:\n|\Z))+")
_RULER = r"(?:-{3,}|\*{3,}|_{3,})[ \t]*"
_OUTER_RULER = re.compile(rf"\A(?:{_RULER}\n+)+|(?<![-*_ \t\n])(?:\n+{_RULER})+\Z")
_RULED = re.compile(
    rf"\A{_RULER}\n((?:(?!\n{_RULER}(?:\n|\Z)).)+)\n{_RULER}\n(?!.*^{_RULER}$)", re.DOTALL | re.MULTILINE
)
_NEW = "new|improved?|proposed|suggested|revised|rewritten|updated|refined|optimi[sz]ed|enhanced|extended"
_KIND = rf"(?:(?:{_NEW}|better|best|final|possible|following|task|system) )*"
_OF = rf"(?:version of (?:my |the |this |your )?{_KIND})?"
_NAME = rf"(?:my |the |an? )?{_KIND}{_OF}(?:instructions?|prompt|text)(?: text)?"
_HERE = r"(?:here(?:['’]s| is| are)|below is|i (?:propose|suggest|recommend))"
_HERE_IS = rf"{_HERE} {_NAME}"
_LABEL = re.compile(
    r"\A(?:(?:sure|certainly|of course|okay|ok|got it)[,.!:]*\s+)?"
    rf"(?:#+\s*)?(?:\*\*)?(?:{_NAME}(?: (?:is|could be|would be))?|{_HERE_IS}(?: for [^\n:]*)?)"
    r"\s*(?:\*\*)?[:：](?:\*\*)?\s*(?=[^\s{])"
    rf"|\A(?=[#*])#*\s*(?:\*\*)?{_NAME}(?:\*\*)?\s*\n\s*(?=\S)"
    # It is announced at the end of a line, perhaps after a comment on the old one.
    rf"|\A{_HERE_IS}[^\n:]{{0,100}}:\s*\n\s*(?=[^\s{{])"
    rf"|\A(?:(?s:.{{0,1000}}?)(?:\n|[.,!;] ))?\**{_HERE} "
    rf"(?=(?:the )?(?:my|an?|{_NEW}|better|best|final|following instruction)\b)"
    rf"(?:my |the |an? )?{_KIND}(?:instructions?|prompt|version)\b[^\n:]{{0,100}}:(?:\*\*)?\s*\n\s*(?=[^\s{{])"
    # In other languages.
    r"|\A(?:hier ist|voici|aqu[ií]|ecco|вот)\b[^\n:]{0,60}(?:anweisung|instru|istruz|инструкц|prompt)[^\n:]{0,60}:"
    r"\s*\n\s*(?=\S)"
    r"|\A[^\n:：。，]{0,6}(?:新|改|优化|修|更好|最终|最佳)[^\n:：。，]{0,8}(?:指令|指示|提示词?)[:：]\s*(?=\S)",
    re.IGNORECASE,
)
# A comment on the instruction, in the last paragraphs.
_THIS = rf"(?:this {_KIND}|the (?:(?:{_NEW}) )+)(?:instruction|prompt)\b"
_COMMENT = re.compile(
    rf"\n[ \t]*\n(?:{_RULER}\n\s*)?[*#_ ]*(?:{_THIS}"
    rf"|(?:explanation|rationale|reasoning|notes?)\b\W{{1,5}}(?=[^\n]*\b{_THIS})"
    r"|why (?:this|it) works\b|let me know (?:if|whether)\b).*\Z",
    re.DOTALL | re.IGNORECASE,
)
# A tag around the instruction, after a comment on the old one.
_LAST_TAG = re.compile(
    rf"\A.*\n[ \t]*<((?:(?:{_NEW})_)+(?:instructions?|prompt)|instruction)>\s*(.*?)\s*</\1>\Z",
    re.DOTALL | re.IGNORECASE,
)
_ON_WRITING = re.compile(
    r"\b(?:re)?writ(?:e|es|ing|ten) (?:[\w'-]+ ){0,4}instructions?\b"
    r"|\b(?:generate|compose|create|improve|provide) (?:(?:an?|one|the|this|your|new|better|clear) )*instructions?\b"
    r"|\b(?:best|better|new|current|revised|improved|your|original) instruction\b"
    r"|\b(?:the|this|each) instruction (?:must|should|is|seems|provided|text)\b"
    r"|\bscores? (?:\w+ ){0,3}as high as possible\b|\b(?:wrong in|quote or list) the examples\b",
    re.IGNORECASE,
)
"""Small models often repeat the request in their own words: "Rewrite the best instruction with fewer errors."."""
_REFUSAL = re.compile(
    r"\A(?:(?:i['’]m|i am) sorry|sorry,|i (?:cannot|can['’]t)|i(?: am|['’]m) unable|as an ai\b[^.]*, i )",
    re.IGNORECASE,
)
# What surrounds texts in the prompt: field markers of DSPy's `ChatAdapter`, and the score below a text.
# A marker within a line belongs to the instruction, except for those around the proposer's own answer.
_MARKER = re.compile(
    r"^[ \t]*\[\[ ## \w+ ## \]\][ \t]*$"
    r"|\A\s*\[\[ ## instruction ## \]\]|\[\[ ## completed ## \]\]\s*\Z"
    r"|<\|(?:im_end|eot_id|endoftext|end|return)\|>|</s>\s*\Z",  # a server that does not stop at the end
    re.MULTILINE,
)
_SCORE = re.compile(r"\nscore:\n\d{1,3}(?:\n.*)?\Z", re.DOTALL)
_QUOTES = {'"': '"', "“": "”", "'": "'", "‘": "’", "«": "»", "„": "“", "「": "」", "`": "`", "[": "]"}
_PAIRS = re.compile(r'"(?:[^"]*[\s(]"[^"\s](?:[^"]*[^"\s])?")*[^"]*"')
"""Quotation marks around the whole, and pairs of them within."""
# `{name}` of Python's format, and `{{name}}` of templates such as MLflow's.
_PLACEHOLDER = re.compile(
    r"(?<!\{)(?:\{[A-Za-z_]\w*(?:\.\w+|\[\w+\])*(?:![rsa])?(?::[^\s{}]*)?\}|\{\{\s*[A-Za-z_][\w.]*\s*\}\})(?!\})"
)
_LATEX = re.compile(r"\\[A-Za-z]+(?:\{[^{}]*\})+|\^\{[^{}]*\}")
# Thai to Khmer, Japanese, Chinese and Korean: there are no spaces between words, or they may be left out.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3040-\u30ff\u3130-\u318f\u31f0-\u31ff"
_UNSPACED += "\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\uff66-\uffdc\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
"""A word, or a single character of such a script."""
_CHARACTER = re.compile(f"[{_UNSPACED}]")

_SENTENCE_END = re.compile(r"(?:(?<!\d)\.|[!?])[\"'”’)*]*(?=\s|\Z)|[。！？]|\n")

_WRAPPINGS = (
    (_FENCE, 1), (_OUTER_FENCE, 1), (_TAGGED, 2), (_LAST_TAG, 2), (_BOLD, 2), (_TRIPLE, 2),
)  # fmt: skip
"""Patterns of what is around the whole instruction, each with the group that is within."""

FEW_EXAMPLES = 20
"""From so many examples on, two may have the same output only because the data has one of them twice."""
OVERLONG = "overlong"
"""The first word of the problem of a text that has too many characters."""


def clean(text: str) -> str:
    """The instruction in an answer, without the thoughts, fences, tags, labels and quotes around it.

    Where the answer goes on with further fields of the prompt, they are left out.
    """
    text = storable(text).strip()
    while True:
        before = text
        text = _THOUGHT.sub("", _THINK.sub("", text)).strip()
        text = next((part.strip() for part in _MARKER.split(text) if part.strip()), "")
        text = _SCORE.sub("", text).strip()
        if _QUOTED.fullmatch(text):
            text = re.sub(r"(?m)^> ?", "", text).strip()
        text = _COMMENT.sub("", text).strip()
        if match := _JSON.match(text):
            text = storable(json.loads(match.group(1), strict=False)).strip()
        for pattern, group in _WRAPPINGS:
            match = pattern.match(text)
            if match:
                text = match.group(group).strip()
        labelled, text = text, _LABEL.sub("", text, count=1).strip()
        label = labelled.removesuffix(text).lower()
        block = label and (_BLOCK.match(text) or ("here" in label and _RULED.match(text)))
        if block and text.count("```") < 3:  # a comment follows
            text = block.group(1).strip()
        text = _OUTER_RULER.sub("", text).strip()
        if len(text) > 1 and _QUOTES.get(text[0]) == text[-1]:
            inner = text[1:-1]
            if _PAIRS.fullmatch(text) or (text[0] not in inner and text[-1] not in inner):  # around the whole
                text = inner.strip()
        if text == before:
            return text


def whole_sentences(text: str) -> str:
    """A text that was cut off, without its last sentence or line."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]].strip() if ends else ""


def first_text(answers: Sequence[Any]) -> str:
    """The text of the first answer that a `dspy.LM` returns: a str, or of a reasoning model a dict with `text`."""
    answer = answers[0]
    return (answer if isinstance(answer, str) else answer["text"]) or ""


def placeholders(text: str) -> frozenset[str]:
    """The `{names}` and `{{names}}` in a text, without those in formulas of LaTeX."""
    return frozenset(_PLACEHOLDER.findall(_LATEX.sub("", text)))


@dataclass(frozen=True)
class InstructionRules:
    """The rules for a usable instruction."""

    max_length: int = 4000
    """In characters."""
    quotes: Collection[int] = frozenset()
    """Hashes of the n-grams in the data; see `ngrams`."""
    ngram: int = 8
    """So many consecutive words of the data count as a quotation. Two characters of a script without spaces count as a
    word."""
    items: Collection[int] = frozenset()
    """Hashes of whole inputs that are shorter and belong to one example alone. Two of them are a copied list."""
    must_keep: Sequence[str] = ()
    """Texts that stay where the student's instruction has them."""
    is_on_writing: bool = True
    """Whether the program itself may deal with instructions. Otherwise a text about them repeats the request."""

    @classmethod
    def of(
        cls,
        program: Program,
        trainset: Sequence[Any],
        is_paper: bool,
        max_chars: int | None = None,
        must_keep: Sequence[str] = (),
        own_texts: Iterable[str] = (),
    ) -> InstructionRules:
        """The rules for the student's instructions and for the data that the meta-prompt may show.

        What the user has written in `own_texts`, as in the student's instructions, is no quotation.

        Raises:
            ValueError: A text of `must_keep` is in no instruction of the student, or is longer than `max_chars`.
        """
        # The first 2,000 characters of a field are enough to detect a quotation. Long documents stay out of memory.
        shared: Counter[int] = Counter()  # word sequence -> examples that have it
        labels: Counter[int] = Counter()  # word sequence -> examples that have it in an expected output
        inputs: Counter[int] = Counter()  # short input -> examples that have it
        answers: set[int] = set()  # short expected outputs, as the names of classes
        for example in trainset:
            texts = {name: shown(value)[:2000] for name, value in fields(example).items()}
            shared.update(set(ngrams(texts.values(), cls.ngram)))
            labels.update(set(ngrams((texts[name] for name in fields(example.labels())), cls.ngram)))
            inputs.update(_items(texts[name] for name in fields(example.inputs())))
            answers.update(_items(texts[name] for name in fields(example.labels())))
        # What most examples share, as a list of options at the end of each input, is no quotation of one of them.
        limit = max(1, len(trainset) // 2)
        # What a few examples share as their output, as the label of a class, is no quotation either.
        label_limit = 1 if len(trainset) < FEW_EXAMPLES else 2
        instructions = [own.text for own in program.texts.values()]
        longest = max(map(len, instructions))
        # The paper's code drops texts above 500 characters. The student's own instruction may be longer.
        max_length = max(500, longest) if is_paper else max(4000, 2 * longest)
        quotes = frozenset(
            gram for gram, count in shared.items() if count <= limit and labels[gram] <= label_limit
        )
        choices = [own.fields.choices.values() for own in program.texts.values()]
        known = (*instructions, *own_texts, *chain.from_iterable(chain.from_iterable(choices)))
        quotes -= set(ngrams(known, cls.ngram))
        items = frozenset(item for item, count in inputs.items() if count == 1)
        items -= {gram for n in _SHORT for gram in ngrams(known, n)} | answers
        names = [name for own in program.texts.values() for name in (*own.fields.inputs, *own.fields.outputs)]
        is_on_writing = is_paper or _name_instructions([*known, *names], trainset)
        for text in must_keep:
            if not any(text in instruction for instruction in instructions):
                raise ValueError(f"must_keep has {text!r}, which is in no instruction of the student.")
            if max_chars is not None and len(text) > max_chars:
                raise ValueError(
                    f"must_keep has {text!r}, which is longer than max_instruction_chars={max_chars}."
                )
        return cls(
            max_chars or max_length, quotes, items=items, must_keep=must_keep, is_on_writing=is_on_writing
        )

    def problem(self, text: str, original: str) -> str | None:
        """The reason why `text` can't replace `original`, or None."""
        # Small models repeat the `{instruction}` that an adapter shows in place of the field.
        if not text or (_PLACEHOLDER.fullmatch(text) and text not in original):
            return "empty"
        if (_OPEN_THINK.search(text) and not _OPEN_THINK.search(original)) or text.count("```") % 2:
            return "truncated"
        if _REFUSAL.search(text) and not _REFUSAL.search(original):
            return "refuses"
        if len(text) > self.max_length:
            return f"{OVERLONG}: {len(text):,} characters, max_instruction_chars={self.max_length}"
        lost = placeholders(original) - placeholders(text)
        if lost:
            return f"loses placeholder {', '.join(sorted(lost))}"
        if any(kept in original and kept not in text for kept in self.must_keep):
            return "loses a text of must_keep"
        if not self.is_on_writing and _ON_WRITING.search(text):
            return "asks for an instruction"
        quoted = _copied(text, original, self.quotes, [self.ngram])
        if quoted or len(_copied(text, original, self.items, _SHORT)) > 1:
            return "quotes the data"
        return None


def _name_instructions(texts: Sequence[str], trainset: Sequence[Any]) -> bool:
    """Whether the texts of the program, or more than a tenth of the examples, have the word "instruction"."""
    num_naming = sum("instruction" in str(fields(example)).lower() for example in trainset)
    return num_naming > len(trainset) / 10 or any("instruction" in text.lower() for text in texts)


def _copied(text: str, original: str, data: Collection[int], sizes: Sequence[float]) -> set[int]:
    """The word sequences of these sizes that are in the text and the data, but not in the original."""
    if not data:
        return set()
    return {
        gram for n in sizes for gram in set(ngrams([text], n)) - set(ngrams([original], n)) if gram in data
    }


def _items(values: Iterable[str]) -> set[int]:
    """A hash for every whole value that is too short for an n-gram. One word alone may be in any text."""
    found = set()
    for value in values:
        words = _WORD.findall(value.lower())
        if 2 <= sum(map(_size, words)) < InstructionRules.ngram:
            found.add(hash(tuple(words)))
    return found


def ngrams(texts: Iterable[str], n: float) -> Iterable[int]:
    """A hash for every `n` consecutive words, without case and punctuation."""
    for text in texts:
        words = _WORD.findall(text.lower())
        ends = list(accumulate(map(_size, words), initial=0.0))
        for start in range(len(words)):
            stop = bisect_left(ends, ends[start] + n)
            if stop == len(ends):
                break
            yield hash(tuple(words[start:stop]))


def _size(word: str) -> float:
    """How many words a match of `_WORD` is: half a one, if it is a single character of a script without spaces."""
    return 0.5 if _CHARACTER.match(word) else 1.0


_SHORT = [size / 2 for size in range(4, 2 * InstructionRules.ngram)]
"""The sizes of `items`, in words."""
