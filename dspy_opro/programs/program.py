"""The student as the search sees it: the task texts of its predictors. Every candidate is a copy of the student."""

from __future__ import annotations

import copy
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from types import MethodType
from typing import Any, Literal, get_args, get_origin

import dspy

from dspy_opro.search.trajectory import Candidate

from .compat import can_be_awaited, copy_lm, defines, is_async_only_lm, task_text
from .values import as_key, fields, shown, storable

SHORTEST_LINE = 40
"""A first line of a module's words with fewer characters may also be a task's own."""


@dataclass(frozen=True)
class Fields:
    """The fields of one predictor's signature."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    choices: Mapping[str, tuple[str, ...]]
    """Output field -> the values that its type allows. Only for types that list their values."""


@dataclass(frozen=True)
class PredictorText:
    """One predictor's instructions: the user's task text, and the text of a DSPy module before and after it."""

    prefix: str
    text: str
    suffix: str
    role: str
    """The predictor's place in the program and its fields, for the meta-prompt."""
    fields: Fields

    def instructions(self, text: str) -> str:
        gap = "\n\n" if self.suffix and not self.text else ""  # the module had no task text so far
        return f"{self.prefix}{text}{gap}{self.suffix}"

    def task(self, text: str) -> str:
        """A text without the module's words, which whole instructions have and some LMs repeat in part."""
        suffix = self.suffix.strip()
        first_line = suffix.partition("\n")[0]
        words = first_line if len(first_line) >= SHORTEST_LINE else suffix
        return (text.partition(words)[0] if words else text).removeprefix(self.prefix).strip()


class Program:
    """The student's task texts, read once. The student itself stays unchanged.

    Raises:
        ValueError: The student has no predictors, or all of them are frozen.
    """

    def __init__(self, student: dspy.Module) -> None:
        self.student = student
        predictors = student.named_predictors()
        if not predictors:
            raise ValueError(
                f"{type(student).__name__} has no predictors to optimize: no dspy.Predict can be reached from its "
                "attributes, or the modules around them are frozen (_compiled=True)."
            )
        # Names repeat if a dict has the keys 1 and "1", so predictors are paired by position.
        self.names = _unique([name for name, _ in predictors])
        self.texts: Mapping[str, PredictorText] = {
            name: _predictor_text(student, name, predictor, len(predictors))
            for name, (_, predictor) in zip(self.names, predictors, strict=True)
        }  # predictor name -> its text, in the order of `named_predictors()`
        self._shared = uncopyable(student)
        copied = self.copy().predictors()
        if len(copied) != len(predictors) or any(map(operator.is_, copied, student.predictors())):
            raise ValueError(
                f"{type(student).__name__} can't be copied: its copy has other predictors or shares them with it. "
                "Give it a deepcopy() or a __deepcopy__ that copies its predictors."
            )

    def copy(self) -> dspy.Module:
        """A copy of the student. It shares only what can't be copied, such as a lock or a connection."""
        return copy_module(self.student, self._shared)

    @property
    def candidate(self) -> Candidate:
        """The student's own instructions: candidate zero."""
        return Candidate({name: own.text for name, own in self.texts.items()})

    def build(self, candidate: Candidate) -> dspy.Module:
        """A copy of the student with the candidate's instructions."""
        program = self.copy()
        for name, predictor in zip(self.names, program.predictors(), strict=True):
            own, text = self.texts[name], candidate.instructions[name]
            if candidate.demos is not None:
                # The JSON text of `proposers/demos.py`.
                predictor.demos = [dspy.Example(demo) for demo in json.loads(candidate.demos[name])]
            if text != own.text:
                predictor.signature = predictor.signature.with_instructions(own.instructions(text))
        program._compiled = getattr(self.student, "_compiled", False)
        return program


def uncopyable(module: dspy.Module) -> list[Any]:
    """The values in a module and its submodules that can't be copied.

    For such a module `dspy.Module.deepcopy` (DSPy 3.0 to 3.4) copies one attribute after the other: it does not copy a
    list with a predictor and a lock in it, and it copies a predictor in two attributes twice.
    """
    if type(module).deepcopy is not dspy.Module.deepcopy:  # the module knows how to copy itself
        return []
    found: list[Any] = []
    seen: set[int] = set()

    def look(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        try:
            copy.deepcopy(value)
        except Exception:
            inner = _members(value)
            if inner is None:
                found.append(value)
            for member in inner or ():
                look(member)

    look(module)
    return found


def _members(value: Any) -> Iterable[Any] | None:
    """The members of a module or a container, and the owner of a tool's method; None for anything else."""
    if isinstance(value, (dspy.Tool, partial)):
        return [value.func]
    if isinstance(value, MethodType):
        return [value.__self__]
    if isinstance(value, dspy.Module):
        value = vars(value)
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, (list, tuple, set)) else None


def copy_module(module: dspy.Module, shared: Sequence[Any]) -> dspy.Module:
    """A copy of a module that shares what `uncopyable` found. The LMs of all its modules have an empty history."""
    if type(module).deepcopy is not dspy.Module.deepcopy:
        return module.deepcopy()
    memo = {id(value): value for value in shared}
    for _, inner in module.named_sub_modules():
        for value in vars(inner).values():
            if isinstance(value, dspy.BaseLM) and id(value) not in memo:
                memo[id(value)] = copy_lm(value)
    return copy.deepcopy(module, memo)


def is_async_only(module: object) -> bool:
    """Whether a module has an `aforward` and no `forward`."""
    return isinstance(module, dspy.Module) and defines(module, "aforward") and not defines(module, "forward")


def is_awaited(module: dspy.Module, lm: Any, is_async: bool = False) -> bool:
    """Whether a program, whose default LM is `lm`, is awaited and not called.

    Without an event loop of the caller an `aforward` is awaited if an LM of the program needs it. With one, as
    `is_async` says, it is awaited if all of them can be.
    """
    lms = [predictor.lm or lm for predictor in module.predictors()]
    suits_lms = all(map(can_be_awaited, lms)) if is_async else any(map(is_async_only_lm, lms))
    return is_async_only(module) or (suits_lms and defines(module, "aforward"))


def _unique(names: Sequence[str]) -> list[str]:
    return [name if name not in names[:i] else f"{name} ({i + 1})" for i, name in enumerate(names)]


def _predictor_text(student: dspy.Module, name: str, predictor: Any, count: int) -> PredictorText:
    prefix, text, suffix = task_text(student, predictor)
    inputs, outputs = predictor.signature.input_fields, predictor.signature.output_fields
    lines = [_field("input", field, info) for field, info in inputs.items()]
    lines += [_field("output", field, info) for field, info in outputs.items()]
    if count > 1:
        place = f"It is the predictor {name!r}, one of {count} in the program {type(student).__name__}."
        lines.insert(0, place)
    fixed = f"{prefix}{suffix}".strip()
    if fixed:
        lines.append(f"The program itself adds these words, which stay: {shorten(fixed, 1200)}")
    choices = {field: values for field, info in outputs.items() if (values := _choices(info.annotation))}
    return PredictorText(
        prefix, text, suffix, "\n".join(lines), Fields(tuple(inputs), tuple(outputs), choices)
    )


def _field(kind: str, name: str, info: Any) -> str:
    annotation, desc = info.annotation, (info.json_schema_extra or {}).get("desc") or ""
    is_plain = isinstance(annotation, type) and not hasattr(annotation, "__args__")
    type_name = annotation.__name__ if is_plain else str(annotation).replace("typing.", "")
    if is_plain and issubclass(annotation, Enum):  # of a Literal the type's own text has them
        type_name += f": {', '.join(_choices(annotation))}"
    return f"- {kind} `{name}` ({type_name})" + ("" if desc in ("", f"${{{name}}}") else f": {desc}")


def _choices(annotation: Any) -> tuple[str, ...]:
    if get_origin(annotation) is Literal:
        return tuple(str(value) for value in get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return tuple(str(member.value) for member in annotation)
    return ("True", "False") if annotation is bool else ()


def describe(values: Mapping[str, Any], limit: int = 600) -> str:
    """Fields as `name: value` lines. The middle of a long value is left out."""
    return "\n".join(f"{name}: {shorten(shown(value), limit)}" for name, value in values.items())


def shorten(text: str, limit: int) -> str:
    """A text without its middle if it is too long, and without what can't be stored."""
    text = storable(text)
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def check_examples(examples: Sequence[Any], name: str) -> None:
    """Check that a dataset is usable.

    Raises:
        ValueError: It is empty, or an example does not say which of its fields are inputs, or has none of these.
        TypeError: One of its items is not a `dspy.Example`.
    """
    if not examples:
        raise ValueError(f"{name} must have at least one example, but is empty.")
    for index, example in enumerate(examples):
        if not isinstance(example, dspy.Example):
            rule = f"must be a dspy.Example, but is {type(example).__name__}."
            raise TypeError(f"{name}[{index}] {rule} Write dspy.Example(...).with_inputs(...).")
        inputs = getattr(example, "_input_keys", None)
        if inputs is None:
            rule = "does not say which fields are inputs: call .with_inputs(...) on it."
            raise ValueError(f"{name}[{index}] {rule}")
        if inputs and not len(example.inputs()):
            rule = f"has none of its inputs {sorted(inputs)}; its fields are {', '.join(fields(example))}."
            raise ValueError(f"{name}[{index}] {rule}")


def num_inputs(examples: Sequence[Any]) -> int:
    """How many different inputs the examples have."""
    return len({as_key(fields(example.inputs())) for example in examples})


def same_inputs(trainset: Sequence[Any], valset: Sequence[Any]) -> int:
    """How many validation examples have the same inputs as a train example."""
    train, val = ([as_key(fields(example.inputs())) for example in data] for data in (trainset, valset))
    return sum(map(set(train).__contains__, val))
