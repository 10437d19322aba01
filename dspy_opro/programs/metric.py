"""Calls the user's metric in one form. Its return value becomes a score or a clear error, never a silent 0."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dspy

from .compat import defines
from .program import is_async_only


@dataclass(frozen=True)
class Score:
    """The score that a metric returned."""

    value: float
    feedback: str = ""
    subscores: Mapping[str, float] | None = None
    """Name -> value of the further numbers that the metric returned."""


MOST = 1e100
"""Scores beyond it, or below its negative, are refused: sums of them and their squares would not be numbers."""


class MetricError(TypeError):
    """The metric can't be called, returned something that is not a score, or raised an error on the first example."""


class Metric:
    """Calls a metric that takes 2, 3 or 5 arguments.

    These are `(example, prediction)`, `(example, prediction, trace)` and GEPA's `(gold, pred, trace, pred_name,
    pred_trace)`. Arguments with a default keep it. The others get None, as from DSPy's own optimizers. Of a
    `dspy.Module` the arguments are those of its `forward`.

    Raises:
        MetricError: It takes fewer than 2 or more than 5 arguments, or needs keyword-only ones.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._call = getattr(function, "acall", function) if is_async_only(function) else function
        parameters = _parameters(function)
        num_required, self._takes_trace = _inspected(function, parameters)
        self._num_extra = max(0, num_required - 2)
        self._keywords = _keywords(function, parameters)
        self.takes_predictor = num_required == 5 or self._keywords >= {"pred_name", "pred_trace"}
        """Whether it gives feedback on single predictors."""

    def __call__(self, example: Any, prediction: Any) -> Any:
        """The unchanged return value of the metric; an awaitable if the metric is async."""
        return self._call(example, prediction, *[None] * self._num_extra)

    def with_trace(self, example: Any, prediction: Any, trace: Any) -> Any:
        """Call the metric with a trace, to choose demos. Many metrics are stricter if they get a trace."""
        if not self._takes_trace:
            return self(example, prediction)
        return self._call(example, prediction, trace, *[None] * (self._num_extra - 1))

    def for_predictor(self, example: Any, prediction: Any, trace: Any, name: str, own_trace: Any) -> Any:
        """Call a metric with `takes_predictor`, as dspy.GEPA does for its feedback on the predictor `name`."""
        if not self._keywords >= {"pred_name", "pred_trace"}:
            return self._call(example, prediction, trace, name, own_trace)
        given = {"trace": trace, "pred_name": name, "pred_trace": own_trace}
        keywords = {name: value for name, value in given.items() if name in self._keywords}
        positional = [trace] if self._takes_trace and "trace" not in keywords else []
        return self._call(example, prediction, *positional, **keywords)


def _parameters(function: Callable[..., Any]) -> Sequence[inspect.Parameter]:
    """Of a module those of its `forward`, found past the warning that `module.forward` logs."""
    is_module = isinstance(function, dspy.Module)
    named = [name for name in ("forward", "aforward") if is_module and defines(function, name)]
    try:
        target = object.__getattribute__(function, named[0]) if named else function
        return [*inspect.signature(target).parameters.values()]
    except (TypeError, ValueError):  # a builtin without a signature
        return [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in ("example", "pred")]


def _keywords(function: Callable[..., Any], parameters: Sequence[inspect.Parameter]) -> frozenset[str]:
    """The arguments that can be given by name, without those that a partial has given."""
    bound = function.keywords if isinstance(function, functools.partial) else {}
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    return frozenset(p.name for p in parameters if p.kind in kinds and p.name not in bound)


def _inspected(function: Callable[..., Any], parameters: Sequence[inspect.Parameter]) -> tuple[int, bool]:
    """The number of required arguments, and whether the third one is a trace.

    One with a default other than None, such as a threshold, is not.
    """
    name = getattr(function, "__name__", type(function).__name__)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(positional) < 2 and not takes_any:
        raise MetricError(
            f"metric must take (example, prediction, ...), but {name} takes {len(positional)} argument(s)."
        )
    if len(required) == len(positional) == 4 and not takes_any:
        raise MetricError(
            f"metric must take 2, 3 or 5 arguments, but {name} takes 4: (example, prediction[, trace[, pred_name, "
            "pred_trace]])."
        )
    missing = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if missing or len(required) > 5:
        extra = missing or [p.name for p in required[5:]]
        raise MetricError(
            "metric is called with (example, prediction, trace, pred_name, pred_trace) at most, "
            f"but {name} also needs {', '.join(extra)}."
        )
    if len(positional) < 3:
        return len(required), takes_any
    third = positional[2]
    is_trace = third.default is third.empty or third.default is None or "trace" in third.name
    return len(required), is_trace


def to_score(value: Any) -> Score:
    """A metric's return value as a `Score`.

    It may be a bool, int, float, numpy scalar, `dspy.Prediction(score=..., feedback=...)` or mapping with `score`.
    Further numbers in the latter two, and in their `subscores`, become subscores.

    Raises:
        MetricError: The value is anything else, NaN, infinite, or beyond 1e100.
    """
    to_dict = getattr(value, "toDict", None)  # of a dspy.Prediction
    if isinstance(value, Mapping):
        fields = dict(value)
    elif callable(to_dict):
        fields = dict(to_dict())
    else:
        return Score(_number(value))
    if "score" not in fields:
        raise MetricError(f"metric returned {value!r}, which has no 'score'.")
    number, feedback, subscores = (fields.pop(name, None) for name in ("score", "feedback", "subscores"))
    if isinstance(subscores, Mapping):
        fields = {**subscores, **fields}
    values = {str(name): _float(v) for name, v in fields.items() if _is_number(v)}
    found = {name: v for name, v in values.items() if abs(v) <= MOST}
    return Score(_number(number), "" if feedback is None else str(feedback), found or None)


def _is_number(value: Any) -> bool:
    if isinstance(value, numbers.Real):
        return True
    # 0-d arrays of numpy and similar libraries. numpy's strings, dates and complex numbers have a dtype, too.
    dtype = getattr(value, "dtype", None)
    return dtype is not None and getattr(value, "ndim", None) == 0 and getattr(dtype, "kind", "f") in "biuf"


def _float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # a huge int
        return math.inf


def _number(value: Any) -> float:
    if not _is_number(value):
        raise MetricError(
            "metric must return a number, a dspy.Prediction or a dict with 'score', "
            f"but returned {value!r} ({type(value).__name__})."
        )
    number = _float(value)
    if not math.isfinite(number):
        raise MetricError(f"metric must return a finite number, but returned {number}.")
    if abs(number) > MOST:
        raise MetricError(
            f"metric must return a number between -{MOST:g} and {MOST:g}, but returned {number:g}."
        )
    return number
