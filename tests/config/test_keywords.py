"""Every keyword of the built-in optimizers is known, does what the table says or warns once, and typos are errors."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.teleprompt import COPRO, GEPA, SIMBA, BootstrapFewShot, BootstrapFewShotWithRandomSearch, MIPROv2

from dspy_opro import Halving, OPROTeleprompter
from dspy_opro.config.arguments import OPROConfig
from dspy_opro.config.keywords import BUILTIN, Unused, configure, translate

UNUSED = {name: meaning for name, meaning in BUILTIN.items() if isinstance(meaning, Unused)}

BUILTINS = [MIPROv2, COPRO, GEPA, SIMBA, BootstrapFewShot, BootstrapFewShotWithRandomSearch]
VERSION = tuple(int(part) for part in dspy.__version__.split(".")[:2])
builtins = pytest.mark.parametrize("builtin", BUILTINS, ids=lambda b: b.__name__)


def keywords(function: Any) -> set[str]:
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {n for n, p in inspect.signature(function).parameters.items() if p.kind not in variable} - {"self"}


@builtins
def test_all_keywords_of_a_constructor_are_named_parameters(builtin: Any) -> None:
    assert keywords(builtin.__init__) <= keywords(OPROTeleprompter.__init__)


@builtins
def test_all_keywords_of_a_compile_are_named_parameters(builtin: Any) -> None:
    assert keywords(builtin.compile) <= keywords(OPROTeleprompter.compile)
    assert keywords(builtin.compile) <= keywords(OPROTeleprompter.acompile)


def test_compile_takes_every_argument_of_the_constructor() -> None:
    own = set(OPROConfig.model_fields)
    assert own == keywords(OPROTeleprompter.compile) - {"student"} - set(BUILTIN)
    assert own == keywords(OPROTeleprompter.__init__) - set(BUILTIN)


def test_every_keyword_has_a_meaning() -> None:
    names = [meaning for meaning in BUILTIN.values() if isinstance(meaning, str)]
    assert set(names) <= set(OPROConfig.model_fields)
    assert all(isinstance(m, (str, Unused)) or m.__doc__ for m in BUILTIN.values())
    assert len(names) + len(UNUSED) == len(BUILTIN) - 4


def test_every_keyword_is_in_the_guide() -> None:
    guide = (Path(__file__).parent.parent.parent / "docs" / "migrating.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)", guide))
    assert set(BUILTIN) - named == set()


@pytest.mark.parametrize(
    ("keyword", "value", "expected"),
    [
        ("breadth", 5, {"num_candidates": 5}),
        ("depth", 2, {"num_rounds": 2}),
        ("max_steps", 4, {"num_rounds": 4}),
        ("num_candidate_programs", 16, {"num_trials": 16}),
        ("reflection_minibatch_size", 5, {"num_exemplars": 5}),
        ("max_demos", 2, {"max_bootstrapped_demos": 2}),
        ("temperature_for_candidates", 0.7, {"init_temperature": 0.7}),
        ("minibatch", False, {"pruner": None}),
        ("minibatch", True, {}),
        ("bsize", 32, {"minibatch_size": 32}),
        ("component_selector", "all", {"predictor_strategy": "all"}),
        ("requires_permission_to_run", False, {}),
        ("eval_kwargs", {"num_threads": 3, "display_table": 0}, {"num_threads": 3}),
        ("minibatch_full_eval_steps", None, {}),
    ],
)
def test_a_keyword_means(keyword: str, value: Any, expected: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert translate({keyword: value}, {}, "compile") == expected


@pytest.mark.parametrize("keyword", sorted(UNUSED))
def test_a_keyword_without_meaning_warns_once_and_by_name(keyword: str) -> None:
    silent, _ = UNUSED[keyword]
    with pytest.warns(
        UserWarning, match=f"^{keyword} has no meaning for OPRO and is not used: .*[.]$"
    ) as caught:
        assert translate({keyword: "something else"}, {}, "compile") == {}
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert translate({keyword: silent}, {}, "compile") == {}


@builtins
@pytest.mark.parametrize("where", ["__init__", "compile"])
def test_none_is_not_given(builtin: Any, where: str) -> None:
    """`auto=None` is a choice; `metric` and the data have their place among the positional arguments."""
    names = keywords(getattr(builtin, where)) - {"auto", "metric", "student", "trainset", "valset", "teacher"}
    config = OPROTeleprompter(metric=len, seed=3).config
    nothing = dict.fromkeys(names)
    if where == "compile":
        assert configure(nothing, "compile", config.given) == config
    else:
        assert OPROTeleprompter(metric=len, **nothing).config == OPROTeleprompter(metric=len).config


@pytest.mark.skipif(VERSION < (3, 4), reason="the table has the defaults of DSPy 3.4")
def test_a_keyword_without_meaning_is_silent_at_the_value_that_it_has_there_by_default() -> None:
    defaults: dict[str, set[Any]] = {}  # keyword -> its defaults in the optimizers that have it
    for function in (f for b in BUILTINS for f in (b.__init__, b.compile)):
        for name, parameter in inspect.signature(function).parameters.items():
            if name in UNUSED and parameter.default is not parameter.empty:
                defaults.setdefault(name, set()).add(parameter.default)
    assert len(defaults) > 20
    assert defaults == {name: {UNUSED[name][0]} for name in defaults}


def test_minibatch_false_has_the_last_word() -> None:
    assert translate({"minibatch": False, "bsize": 5}, {}, "compile")["pruner"] is None
    assert translate({"bsize": 5, "minibatch": False}, {}, "compile")["pruner"] is None


@pytest.mark.parametrize(
    ("before", "arguments", "pruner"),
    [
        ({"minibatch": False}, {"minibatch": True}, "auto"),
        ({"minibatch": False}, {}, None),
        ({"minibatch": False}, {"minibatch": True, "pruner": None}, None),
        ({"pruner": Halving(first=2)}, {"minibatch": True}, Halving(first=2)),
        ({"auto": "paper"}, {"minibatch": True}, None),
    ],
)
def test_minibatch_true_takes_back_a_minibatch_false(
    before: dict[str, Any], arguments: dict[str, Any], pruner: Any
) -> None:
    config = OPROTeleprompter(metric=len, **before).config
    assert configure(arguments, "compile", config.given).resolve().pruner == pruner


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"breadht": 5}, TypeError, "'breadht'. Did you mean 'breadth'?"),
        ({"max_bootstraped_demos": 5}, TypeError, "Did you mean 'max_bootstrapped_demos'?"),
        ({"breadth": 5, "num_candidates": 4}, ValueError, "both say what num_candidates is: 5 and 4"),
        (
            {"trainset": [1], "devset": [2] * 99},
            ValueError,
            "devset and trainset both say what trainset is: [2, 2, 2, 2, 2, 2, ...] and [1]. Give one of them.",
        ),
        ({"max_metric_calls": 100, "max_full_evals": 5}, ValueError, "give one of them"),
        ({"breadth": 0}, ValueError, "num_candidates must be at least 1"),
        ({"bsize": 0}, ValueError, "minibatch_size must be at least 1, but got 0"),
        ({"requires_permission_to_run": True}, ValueError, "must not be True"),
        ({"eval_kwargs": {"num_thread": 3}}, TypeError, "Did you mean 'num_threads'?"),
        ({"eval_kwargs": {"metric": len}}, TypeError, "unexpected keyword argument 'metric'"),
        ({"eval_kwargs": 3}, TypeError, "eval_kwargs must be a dict"),
    ],
)
def test_a_mistake_is_an_error(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        OPROTeleprompter(metric=len, **arguments)


def test_the_order_of_copro_is_an_error_that_names_the_keyword() -> None:
    lm = dspy.LM("openai/x")
    with pytest.raises(TypeError, match="metric must be a function, but is an LM"):
        OPROTeleprompter(lm, len)
    with pytest.raises(TypeError, match="Write prompt_model="):
        OPROTeleprompter(len, lm)  # type: ignore[arg-type]


def test_get_params_is_a_copy() -> None:
    teleprompter = OPROTeleprompter(metric=len, breadth=3)
    teleprompter.get_params().update(seed=5)
    assert teleprompter.get_params()["seed"] == 0
    assert teleprompter.get_params()["num_candidates"] == 3
