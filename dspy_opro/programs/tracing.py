"""What each predictor of a program got and gave on an example, as plain values that the log of results can hold.

The meta-prompt shows it for programs with several predictors, and for one that gets or gives more than the program.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dspy
from dspy.adapters.utils import parse_value
from dspy.utils.exceptions import AdapterParseError

from .awaiting import EventLoop
from .errors import in_brief
from .metric import Metric, to_score
from .program import Program, shorten
from .values import as_json, shown, storable

logger = logging.getLogger("dspy_opro")

FIELD_CHARS = 600
"""Characters of a field that are kept: as many as the meta-prompt shows."""
FIELD_CHARS_FOR_METRIC = 10_000
"""The same where the metric gives feedback on single predictors."""
PROGRAM = ""
"""Name of the entry with the program's own outputs, for such a metric."""
MOST_KEPT = 1000
"""Feedback texts that are kept. Several proposals of a round may show the same example."""

Call = Mapping[str, Any]
"""`inputs` and `outputs`, each field -> value; or `unparsed`: the LM's answer in which the adapter found no fields."""


def read_trace(
    names: Sequence[str], predictors: Sequence[Any], trace: Sequence[Any], error: Any, limit: int
) -> dict[str, Call]:
    """The calls of a program's predictors on one example.

    Of several calls of a predictor it has the one with the longest inputs, such as the last step of an agent. So it
    does not depend on which of the program's own threads ends first.

    Args:
        names: Of the predictors.
        predictors: Those of the program that has run.
        trace: DSPy's trace: (predictor, inputs, prediction) for every call.
        error: What ended the program, or None.
        limit: Characters of a field that are kept.

    Returns:
        Predictor name -> its call, in the order of `names`.
    """
    calls: dict[str, Call] = {}
    pairs = list(zip(names, predictors, strict=True))
    for predictor, inputs, outputs in trace:
        name = next((n for n, own in pairs if own is predictor), None)
        name = name or _by_signature(pairs, predictor.signature)
        call = {"inputs": plain_fields(inputs, limit), "outputs": plain_fields(outputs, limit)}
        if name is not None and (name not in calls or _size(call) > _size(calls[name])):
            calls[name] = call
    if isinstance(error, AdapterParseError):
        # Of predictors with equal signatures it is one that gave no answer.
        name = _by_signature(sorted(pairs, key=lambda pair: pair[0] in calls), error.signature)
        if name is not None:
            calls[name] = {"unparsed": shorten(str(error.lm_response), limit)}
    return {name: calls[name] for name in names if name in calls}


def says_more(trace: Sequence[Any], known: Mapping[str, Any]) -> bool:
    """Whether the calls have other values than the program's own inputs and outputs, which are `known`.

    Of several calls with known inputs, as for a vote, no output says more than the program's.
    """
    values = [pair for _, inputs, _ in trace for pair in inputs.items()]
    values += trace[0][2].items() if len(trace) == 1 else ()
    return not all(
        known.get(name) is value or (isinstance(value, str) and known.get(name) == value)
        for name, value in values
    )


def _by_signature(pairs: Iterable[tuple[str, Any]], signature: Any) -> str | None:
    """The predictor with this signature. BestOfN and Refine call copies of predictors."""
    return next((name for name, predictor in pairs if predictor.signature.equals(signature)), None)


def _size(call: Call) -> tuple[int, str]:
    return len(json.dumps(call.get("inputs"))), json.dumps(call)


def plain_fields(values: Any, limit: int) -> dict[str, Any]:
    """Field -> its value as JSON has it. A value that is longer than `limit` becomes text without its middle."""
    return {str(name): _plain(value, limit) for name, value in values.items()}


def _plain(value: Any, limit: int) -> Any:
    try:
        text = storable(json.dumps(json.loads(as_json(value)), ensure_ascii=False))
        return json.loads(text) if len(text) <= limit else shorten(shown(value), limit)
    except Exception as error:
        return f"(can't be shown: {in_brief(error)})"


@dataclass(frozen=True, repr=False)
class PredictorFeedback:
    """Asks a metric that takes GEPA's `pred_name` and `pred_trace` for its feedback on single predictors.

    The metric gets the values of the log, so a resumed run asks the same. They have the types of the signatures.
    """

    program: Program
    metric: Metric
    loop: EventLoop
    """Awaits async metrics."""
    task_model: Any = None
    """The scorer LM, or None for the LM of `dspy.settings`. A metric may call it."""
    known: dict[tuple[str, int, str], str] = field(default_factory=dict)
    """(candidate id, position, predictor name) -> feedback that was asked for already."""
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, compare=False)
    """For changes of `known`."""

    def of(self, key: tuple[str, int, str], example: Any, calls: Mapping[str, Call]) -> str:
        """The feedback for a candidate's predictor on an example. Empty where the metric has none."""
        name = key[2]
        if PROGRAM not in calls or "outputs" not in calls.get(name, ()):
            return ""
        said = self.known.get(key)
        if said is None:
            said = self._ask(example, calls, name)
            with self._lock:
                while len(self.known) >= MOST_KEPT:
                    self.known.pop(next(iter(self.known)), None)
                self.known[key] = said
        return said

    def _ask(self, example: Any, calls: Mapping[str, Call], name: str) -> str:
        trace = {}  # predictor name -> (predictor, inputs, prediction)
        typed: dict[tuple[str, str], Any] = {}  # (field, its plain value) -> the value
        for own, predictor in zip(self.program.names, self.program.student.predictors(), strict=True):
            if "outputs" in calls.get(own, ()):
                given, gave = calls[own]["inputs"], calls[own]["outputs"]
                outputs = _typed(gave, predictor.signature.output_fields)
                typed |= {(each, json.dumps(value)): outputs[each] for each, value in gave.items()}
                inputs = _typed(given, predictor.signature.input_fields)
                trace[own] = (predictor, inputs, dspy.Prediction(**outputs))
        outputs = calls[PROGRAM]["outputs"]
        prediction = dspy.Prediction(
            **{each: typed.get((each, json.dumps(value)), value) for each, value in outputs.items()}
        )
        settings = {} if self.task_model is None else {"lm": self.task_model}
        try:
            with dspy.context(**settings):
                asked = self.metric.for_predictor(example, prediction, [*trace.values()], name, [trace[name]])
                return shorten(to_score(self.loop.resolve(asked)).feedback, 1000)
        except Exception as error:
            logger.warning("The metric has no feedback for the predictor %s: %s", name, in_brief(error))
            return ""


def _typed(values: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values in the types of a signature's fields, as far as they fit."""
    return {name: _parsed(value, fields.get(name)) for name, value in values.items()}


def _parsed(value: Any, info: Any) -> Any:
    try:
        return value if info is None else parse_value(value, info.annotation)
    except Exception:
        return value
