"""What gives a score its meaning, as hashes: a resumed run must agree on every part."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

import dspy

from dspy_opro.programs.compat import model_name, predictor_state
from dspy_opro.programs.values import as_json, fields


def fingerprint(
    student: dspy.Module,
    trainset: Sequence[Any],
    valset: Sequence[Any],
    metric: Callable[..., Any],
    **values: object,
) -> dict[str, str]:
    """Part -> hash or readable value.

    Args:
        student: Its instructions, fields and demos count; the LMs by model name.
        trainset: Examples in the order of the race.
        valset: Examples in their order.
        metric: Counts by name, source and the plain values that it holds.
        values: Further settings, as they are.
    """
    state = {name: _predictor_state(predictor) for name, predictor in student.named_predictors()}
    parts = {
        "student": _digest([type(student).__name__, state]),
        "trainset": f"{len(trainset)} examples, {_digest([_example(e) for e in trainset])}",
        "valset": f"{len(valset)} examples, {_digest([_example(e) for e in valset])}",
        "metric": _metric(metric),
    }
    return parts | {name: str(value) for name, value in values.items()}


def _predictor_state(predictor: Any) -> dict[str, Any]:
    return {**predictor_state(predictor), "lm": model_name(predictor.lm)}


def _example(example: Any) -> list[Any]:
    return [fields(example), sorted(fields(example.inputs()))]


def _metric(metric: Any, depth: int = 0) -> str:
    """Its name, with a digest of its source and of the plain values that it holds."""
    target = metric if hasattr(metric, "__qualname__") else type(metric)
    name = f"{getattr(target, '__module__', '')}.{target.__qualname__}"  # a slot wrapper has no module
    try:
        source = inspect.cleandoc(inspect.getsource(target))
    except (OSError, TypeError):  # typed at a prompt, or built in
        source = ""
    held = [
        [key, what] for key, value in _held(metric).items() if (what := _plainly(value, depth)) is not None
    ]
    return f"{name}, {_digest([source, held])}" if source or held else name


def _held(metric: Any) -> Mapping[Any, Any]:
    """What a metric was made with: a closure's variables, a partial's arguments, an object's attributes.

    What it counts or stores as it runs is no part of that.
    """
    if isinstance(metric, functools.partial):
        return {"": metric.func, "arguments": metric.args, **metric.keywords}
    if inspect.ismethod(metric):
        return {"": metric.__func__, "self": metric.__self__}
    if isinstance(metric, dspy.Module):
        return {"": as_json([_predictor_state(predictor) for predictor in metric.predictors()])}
    if inspect.isfunction(metric):
        held = {**inspect.getclosurevars(metric).nonlocals, "defaults": metric.__defaults__}
        changed = _changed_names(metric)
    else:
        held = dict(getattr(metric, "__dict__", {}))
        methods = inspect.getmembers(type(metric), inspect.isfunction)
        changed = {n for name, method in methods if name != "__init__" for n in _changed_names(method)}
    return {name: value for name, value in held.items() if name not in changed}


def _changed_names(function: Any) -> set[str]:
    """The closure's variables and the object's attributes that a function assigns, by its source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # typed at a prompt, or a lambda in the middle of a line
        return set()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Nonlocal):
            names.update(node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def _plainly(value: Any, depth: int) -> Any:
    """A constant, or what tells a function; None for lists and dicts, which may be filled as the metric runs."""
    if isinstance(value, (str, int, float, Enum, tuple, frozenset)):
        return value
    if isinstance(value, dspy.BaseLM):
        return model_name(value)
    return _metric(value, depth + 1) if callable(value) and depth < 3 else None


def _digest(value: object) -> str:
    return hashlib.sha256(as_json(value).encode()).hexdigest()[:16]
