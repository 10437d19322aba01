"""A DSPy program seen from the search: its task texts, and what it answers on one example.

Nothing here changes a program that it was given: every candidate is a copy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, get_args, get_origin

import dspy

from dspy_opro.search.trajectory import Candidate

from .compat import defines, task_text
from .copying import copy_module, uncopyable
from .values import as_json, fields, shown


@dataclass(frozen=True)
class Fields:
    """The fields of one predictor's signature."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    choices: Mapping[str, tuple[str, ...]]
    """Output field -> the values that its type allows, where these can be listed."""


@dataclass(frozen=True)
class PredictorText:
    """One predictor's instructions: the user's task text between what a module put around it."""

    prefix: str
    text: str
    suffix: str
    role: str
    """What the predictor is within the program, for the meta-prompt."""
    fields: Fields

    def instructions(self, text: str) -> str:
        gap = "\n\n" if self.suffix and not self.text else ""  # the module had no task text so far
        return f"{self.prefix}{text}{gap}{self.suffix}"


class Program:
    """The student, read once.

    Args:
        student: Any `dspy.Module`; it is not touched.

    Raises:
        ValueError: It has no predictors, or all of them are frozen.
    """

    def __init__(self, student: dspy.Module) -> None:
        self.student = student
        predictors = student.named_predictors()
        if not predictors:
            raise ValueError(
                f"{type(student).__name__} has no predictors to optimize: no dspy.Predict can be reached from its "
                "attributes, or the modules that hold them are frozen (_compiled=True)."
            )
        # Names repeat where a dict has the keys 1 and "1", so predictors are paired by position.
        self.names = _unique([name for name, _ in predictors])
        self.texts: Mapping[str, PredictorText] = {
            name: _predictor_text(student, name, predictor, len(predictors))
            for name, (_, predictor) in zip(self.names, predictors, strict=True)
        }  # predictor name -> its text, in the order of `named_predictors()`
        self._shared = uncopyable(student)
        copied = self.copy().predictors()
        if len(copied) != len(predictors) or any(
            a is b for a, (_, b) in zip(copied, predictors, strict=True)
        ):
            raise ValueError(
                f"{type(student).__name__} can't be copied: its copy has other predictors or shares them with it. "
                "Give it a deepcopy() or a __deepcopy__ that copies its predictors."
            )

    def copy(self) -> dspy.Module:
        """A copy of the student; only what can't be copied, like a lock or a connection, is shared with it."""
        return copy_module(self.student, self._shared)

    @property
    def candidate(self) -> Candidate:
        """The student's own instructions: candidate number zero."""
        return Candidate({name: own.text for name, own in self.texts.items()})

    def build(self, candidate: Candidate) -> dspy.Module:
        """A copy of the student with the candidate's instructions."""
        program = self.copy()
        for name, predictor in zip(self.names, program.predictors(), strict=True):
            own, text = self.texts[name], candidate.instructions[name]
            if candidate.demos is not None:
                predictor.demos = read_demos(candidate.demos[name])
            if text != own.text:
                predictor.signature = predictor.signature.with_instructions(own.instructions(text))
        program._compiled = getattr(self.student, "_compiled", False)
        return program


def is_async_only(module: object) -> bool:
    """Whether a module has an `aforward` and no `forward`."""
    return isinstance(module, dspy.Module) and defines(module, "aforward") and not defines(module, "forward")


def read_demos(text: str) -> list[Any]:
    """The demos of one predictor, from the text that `demos.py` makes of them."""
    return [dspy.Example(**demo) for demo in json.loads(text)]


def _unique(names: Sequence[str]) -> list[str]:
    return [name if name not in names[:i] else f"{name} ({i + 1})" for i, name in enumerate(names)]


def _predictor_text(student: dspy.Module, name: str, predictor: Any, count: int) -> PredictorText:
    prefix, text, suffix = task_text(student, predictor)
    role = _role(student, name, predictor, count)
    fixed = f"{prefix}{suffix}".strip()
    if fixed:
        role += f"\nThe program itself adds these words, which stay: {shorten(fixed, 1200)}"
    return PredictorText(prefix, text, suffix, role, _fields(predictor.signature))


def _fields(signature: Any) -> Fields:
    outputs = signature.output_fields
    listed = {name: _choices(info.annotation) for name, info in outputs.items()}
    choices = {name: values for name, values in listed.items() if values}
    return Fields(tuple(signature.input_fields), tuple(outputs), choices)


def _choices(annotation: Any) -> tuple[str, ...]:
    if get_origin(annotation) is Literal:
        return tuple(str(value) for value in get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return tuple(str(member.value) for member in annotation)
    return ("True", "False") if annotation is bool else ()


def _role(student: dspy.Module, name: str, predictor: Any, count: int) -> str:
    signature = predictor.signature
    lines = []
    if count > 1:
        lines.append(f"It is the predictor {name!r}, one of {count} in the program {type(student).__name__}.")
    for kind, infos in (("input", signature.input_fields), ("output", signature.output_fields)):
        for field, info in infos.items():
            extra = info.json_schema_extra or {}
            desc = extra.get("desc") or ""
            detail = "" if desc in ("", f"${{{field}}}") else f": {desc}"
            lines.append(f"- {kind} `{field}` ({_type_name(info.annotation)}){detail}")
    return "\n".join(lines)


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type) and not hasattr(annotation, "__args__"):
        return annotation.__name__
    return str(annotation).replace("typing.", "")


def describe(values: Mapping[str, Any], limit: int = 600) -> str:
    """Fields as `name: value` lines, long values cut in the middle."""
    return "\n".join(f"{name}: {shorten(shown(value), limit)}" for name, value in values.items())


def shorten(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def output_text(prediction: Any) -> str:
    """A prediction as short text for the meta-prompt."""
    items = getattr(prediction, "items", None)
    if callable(items):
        return shorten(describe(dict(items())), 1000)
    return shorten(shown(prediction), 1000)


def check_examples(examples: Sequence[Any], name: str) -> None:
    """Raise where a dataset can't be used, before anything is spent.

    Raises:
        ValueError: It is empty, or an example does not say which of its fields are inputs.
        TypeError: It holds something that is no `dspy.Example`.
    """
    if not examples:
        raise ValueError(f"{name} must have at least one example, but is empty.")
    for index, example in enumerate(examples):
        if not isinstance(example, dspy.Example):
            raise TypeError(f"{name}[{index}] must be a dspy.Example, but is {type(example).__name__}.")
        if getattr(example, "_input_keys", None) is None:
            raise ValueError(
                f"{name}[{index}] does not say which fields are inputs: call .with_inputs(...) on it."
            )


def same_inputs(trainset: Sequence[Any], valset: Sequence[Any]) -> int:
    """How many validation examples have the inputs of a training example."""
    seen = {_inputs_key(example) for example in trainset}
    return sum(_inputs_key(example) in seen for example in valset)


def _inputs_key(example: Any) -> str:
    return as_json(fields(example.inputs()))
