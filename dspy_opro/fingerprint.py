"""What gives a score its meaning, as hashes: a resumed run must agree on every part."""

from __future__ import annotations

import dataclasses
import dis
import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from importlib import metadata
from typing import Any

import dspy

from ._compat import predictor_state
from .values import as_json, fields

DECISIVE = ("pruner", "patience", "min_delta", "stop_at_score", "stoppers", "k_best", "num_exemplars")
"""Arguments that decide how a run goes on and are not in its plan."""


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


def settings_of(config: Any, plan: Any) -> dict[str, str]:
    """What several workers must agree on to decide alike: setting -> value.

    Args:
        config: The run's `OPROConfig`.
        plan: The `work.Plan` made of it.
    """
    values = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    values |= {name: getattr(config, name) for name in DECISIVE}
    values |= {f"{name} version": metadata.version(name) for name in ("optuna", "dspy")}
    return {name: _readable(value) for name, value in values.items()}


def _readable(value: Any) -> str:
    """The value in words that are the same in every process, without addresses in memory."""
    if value is None or isinstance(value, (str, int, float, tuple)) or dataclasses.is_dataclass(value):
        return repr(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_readable, value))}]"
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def _predictor_state(predictor: Any) -> dict[str, Any]:
    return {**predictor_state(predictor), "lm": model_name(predictor.lm)}


def model_name(lm: Any) -> str:
    """An LM as `model`, without keys or addresses."""
    return "" if lm is None else str(getattr(lm, "model", type(lm).__name__))


def _example(example: Any) -> list[Any]:
    return [fields(example), sorted(fields(example.inputs()))]


def _metric(metric: Any, depth: int = 0) -> str:
    """Its name, with a digest of its source and of the plain values that it holds."""
    target = metric if hasattr(metric, "__qualname__") else type(metric)
    name = f"{target.__module__}.{target.__qualname__}"
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
        methods = [metric]
    else:
        held = dict(getattr(metric, "__dict__", {}))
        members = inspect.getmembers(type(metric), inspect.isfunction)
        methods = [method for name, method in members if name != "__init__"]
    steps = (step for method in methods for step in dis.get_instructions(method))
    stored = {step.argval for step in steps if step.opname in ("STORE_DEREF", "STORE_ATTR")}
    return {name: value for name, value in held.items() if name not in stored}


def _plainly(value: Any, depth: int) -> Any:
    """A constant, or what tells a function; None for lists and dicts, which may be filled as the metric runs."""
    if isinstance(value, (str, int, float, Enum, tuple, frozenset)):
        return value
    if isinstance(value, dspy.BaseLM):
        return model_name(value)
    return _metric(value, depth + 1) if callable(value) and depth < 3 else None


def _digest(value: object) -> str:
    return hashlib.sha256(as_json(value).encode()).hexdigest()[:16]
