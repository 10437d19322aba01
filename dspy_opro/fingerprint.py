"""What gives a score its meaning, as hashes: a resumed run must agree on every part."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import dspy

from ._compat import predictor_state

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
        metric: Counts by name and source.
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
    return [sorted(example.toDict().items()), sorted(example.inputs().keys())]


def _metric(metric: Callable[..., Any]) -> str:
    target = metric if hasattr(metric, "__qualname__") else type(metric)
    name = f"{target.__module__}.{target.__qualname__}"
    try:
        source = inspect.getsource(target)
    except (OSError, TypeError):  # typed at a prompt, or built in
        return name
    return f"{name}, {_digest(inspect.cleandoc(source))}"


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
