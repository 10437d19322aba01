"""A metric is a score or a clear error, whatever it takes and returns."""

from __future__ import annotations

import asyncio
import functools
import math
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import dspy
import numpy
import pytest

from dspy_opro.programs.metric import Metric, MetricError, Score, to_score

EXAMPLE = dspy.Example(question="q", answer="a").with_inputs("question")
PREDICTION = dspy.Prediction(answer="a")


def two(example: Any, prediction: Any) -> Any:
    return example.answer == prediction.answer


def three(example: Any, prediction: Any, trace: Any) -> Any:
    assert trace is None
    return two(example, prediction)


def three_with_default(example: Any, prediction: Any, trace: Any = "default") -> Any:
    assert trace == "default"
    return two(example, prediction)


def five(gold: Any, pred: Any, trace: Any, pred_name: Any, pred_trace: Any) -> Any:
    assert (trace, pred_name, pred_trace) == (None, None, None)
    return two(gold, pred)


def gepa(gold: Any, pred: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None) -> Any:
    return dspy.Prediction(score=float(two(gold, pred)), feedback="well done")


class Judge:
    def __call__(self, example: Any, prediction: Any, trace: Any = None) -> Any:
        return two(example, prediction)

    def method(self, example: Any, prediction: Any) -> Any:
        return two(example, prediction)


class JudgeModule(dspy.Module):  # type: ignore[misc]
    def forward(self, example: Any, prediction: Any, trace: Any = None) -> Any:
        return two(example, prediction)


METRICS = {
    "two": two,
    "three": three,
    "three with a default": three_with_default,
    "five": five,
    "GEPA's": gepa,
    "lambda": lambda e, p: two(e, p),
    "any number": lambda *args: two(*args),
    "keywords beside": lambda e, p, *, weight=1.0: weight * two(e, p),
    "partial": functools.partial(lambda scale, e, p: scale * two(e, p), 1.0),
    "callable object": Judge(),
    "bound method": Judge().method,
    "module": JudgeModule(),
    "DSPy's own": dspy.evaluate.answer_exact_match,
}


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_metrics_of_every_shape_are_called(metric: Any) -> None:
    assert to_score(Metric(metric)(EXAMPLE, PREDICTION)).value == 1.0


async def test_an_async_metric_gives_an_awaitable() -> None:
    async def metric(example: Any, prediction: Any, trace: Any = None) -> float:
        return 0.5

    assert to_score(await Metric(metric)(EXAMPLE, PREDICTION)) == Score(0.5)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda: 1.0, r"must take \(example, prediction, \.\.\.\), but <lambda> takes 0 argument\(s\)\."),
        (lambda prediction: 1.0, r"but <lambda> takes 1 argument\(s\)\."),
        (lambda a, b, c, d, e, f: 1.0, r"but <lambda> also needs f\."),
        (lambda a, b, *, judge: 1.0, r"but <lambda> also needs judge\."),
        (lambda **values: 1.0, r"but <lambda> takes 0 argument\(s\)\."),
    ],
)
def test_a_metric_that_cannot_be_called_is_an_error_at_once(metric: Any, message: str) -> None:
    with pytest.raises(MetricError, match=message):
        Metric(metric)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, 1.0),
        (False, 0.0),
        (3, 3.0),
        (0.25, 0.25),
        (-2.5, -2.5),
        (numpy.float32(0.5), 0.5),
        (numpy.int64(2), 2.0),
        (numpy.bool_(True), 1.0),
        (numpy.array(0.5), 0.5),
        (Fraction(1, 4), 0.25),
        (dspy.Prediction(score=0.5), 0.5),
        (dspy.Prediction(score=numpy.float64(0.5)), 0.5),
        ({"score": True}, 1.0),
    ],
)
def test_numbers_of_every_kind_are_scores(value: Any, expected: float) -> None:
    score = to_score(value)
    assert score == Score(expected)
    assert type(score.value) is float


def test_feedback_and_subscores_come_along() -> None:
    given = {"score": 0.5, "feedback": "Too long.", "length": 12, "exact": False, "note": "text"}
    expected = Score(0.5, "Too long.", {"length": 12.0, "exact": 0.0})
    assert to_score(given) == expected
    assert to_score(dspy.Prediction(**given)) == expected
    assert to_score({"score": 1.0, "feedback": None}) == Score(1.0)
    subscores = {
        "a": numpy.float32(0.5),
        ("b", 1): True,
        "style": None,
        "why": "short",
        "nested": {},
        "nan": math.nan,
        "huge": -1e308,
    }
    assert to_score({"score": 1, "subscores": subscores}).subscores == {"a": 0.5, "('b', 1)": 1.0}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"must return a number.*but returned None \(NoneType\)"),
        ("0.5", r"must return a number.*but returned '0\.5' \(str\)"),
        (numpy.str_("0.5"), r"must return a number"),
        (math.nan, r"must return a finite number, but returned nan\."),
        (math.inf, r"must return a finite number, but returned inf\."),
        (numpy.float32("nan"), r"must return a finite number"),
        (10**400, r"must return a finite number"),
        (1e308, r"must return a number between -1e\+100 and 1e\+100, but returned 1e\+308\."),
        (-1e101, r"must return a number between -1e\+100 and 1e\+100"),
        (1j, r"must return a number"),
        (numpy.complex128(1j), r"must return a number"),
        (numpy.array([0.5]), r"must return a number"),
        (numpy.datetime64("2020-01-01"), r"must return a number"),
        (Decimal("0.5"), r"must return a number"),
        ((0.5, "feedback"), r"must return a number"),
        ([1.0], r"must return a number"),
        ({}, r"returned {}, which has no 'score'\."),
        ({"Score": 1.0}, r"which has no 'score'\."),
        ({"score": None}, r"must return a number"),
        ({"score": math.nan}, r"must return a finite number"),
        (dspy.Prediction(feedback="good"), r"which has no 'score'\."),
        (dspy.Prediction(score="high"), r"but returned 'high' \(str\)"),
        (SimpleNamespace(score=1.0), r"must return a number"),
    ],
)
def test_anything_else_is_an_error(value: Any, message: str) -> None:
    with pytest.raises(MetricError, match=message):
        to_score(value)


def test_an_async_module_is_a_metric() -> None:
    class Judge(dspy.Module):  # type: ignore[misc]
        async def aforward(self, example: Any, prediction: Any, trace: Any = None) -> float:
            return 0.5

    metric = Metric(Judge())
    assert asyncio.run(metric(None, None)) == asyncio.run(metric.with_trace(None, None, [])) == 0.5


def strict(example: Any, prediction: Any, strict_trace: Any = False) -> Any:
    return strict_trace


class StrictModule(dspy.Module):  # type: ignore[misc]
    def forward(self, example: Any, pred: Any, trace: Any) -> Any:
        return trace


@pytest.mark.parametrize(
    ("metric", "is_given"),
    [
        (lambda e, p, trace: trace, True),
        (lambda e, p, tr=None: tr, True),
        (lambda e, p, *rest: rest[0] if rest else None, True),
        (strict, True),
        (StrictModule(), True),
        (lambda e, p, threshold=0.5: threshold, False),
        (lambda e, p: None, False),
    ],
)
def test_only_an_argument_for_a_trace_gets_one(metric: Any, is_given: bool) -> None:
    trace = [("step",)]
    assert (Metric(metric).with_trace(EXAMPLE, PREDICTION, trace) is trace) is is_given
    assert Metric(metric)(EXAMPLE, PREDICTION) in (None, False, 0.5)


def keyword_only(
    gold: Any, pred: Any, trace: Any = None, *, pred_name: Any = None, pred_trace: Any = None
) -> Any:
    return trace, pred_name, pred_trace


def only_names(gold: Any, pred: Any, *, pred_name: Any = None, pred_trace: Any = None) -> Any:
    return None, pred_name, pred_trace


def all_keyword_only(
    gold: Any, pred: Any, *, trace: Any = None, pred_name: Any = None, pred_trace: Any = None
) -> Any:
    return trace, pred_name, pred_trace


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (keyword_only, ("trace", "name", "own")),
        (only_names, (None, "name", "own")),
        (all_keyword_only, ("trace", "name", "own")),
        (lambda g, p, t, n, o: (t, n, o), ("trace", "name", "own")),
        (
            lambda g, p, trace=None, pred_name=None, pred_trace=None: (trace, pred_name, pred_trace),
            ("trace", "name", "own"),
        ),
        (lambda g, p, t, pred_name, pred_trace: (t, pred_name, pred_trace), ("trace", "name", "own")),
        (functools.partial(keyword_only, trace="mine"), ("mine", "name", "own")),
    ],
)
def test_a_metric_gets_a_predictors_name_and_trace_as_it_takes_them(metric: Any, expected: Any) -> None:
    called = Metric(metric)
    assert called.takes_predictor
    assert called.for_predictor(EXAMPLE, PREDICTION, "trace", "name", "own") == expected


def test_a_partial_that_binds_the_predictor_gives_no_feedback_on_predictors() -> None:
    metric = Metric(functools.partial(gepa, pred_name=None, pred_trace=None))
    assert not metric.takes_predictor
    assert to_score(metric(EXAMPLE, PREDICTION)).value == 1.0


def test_a_metric_of_four_arguments_is_refused() -> None:
    def four(example: Any, prediction: Any, trace: Any, pred_name: Any) -> float:
        return 1.0

    def five(gold: Any, pred: Any, trace: Any, pred_name: Any, pred_trace: Any = None) -> float:
        return 1.0

    with pytest.raises(MetricError, match="must take 2, 3 or 5 arguments, but four takes 4"):
        Metric(four)
    assert Metric(five)(EXAMPLE, PREDICTION) == 1.0
