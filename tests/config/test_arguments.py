"""Every value of a run is checked once, by rules that errors name; presets fill only what was not given."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest
from dspy.evaluate import SemanticF1

from dspy_opro import OPRO, OPROTeleprompter
from dspy_opro.config.arguments import OPROConfig, make_config, paper, unknown_keyword
from dspy_opro.proposers.opro import OPROProposer
from dspy_opro.search.pruners import Halving
from dspy_opro.search.stoppers import Patience


def metric(example: Any, prediction: Any) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k_best": 0}, "k_best must be at least 1, but got 0."),
        ({"num_rounds": 0}, "num_rounds must be at least 1, but got 0."),
        ({"num_candidates": -1}, "num_candidates must be at least 1, but got -1."),
        ({"num_trials": 0}, "num_trials must be at least 1, but got 0."),
        ({"num_exemplars": -1}, "num_exemplars must be at least 0, but got -1."),
        ({"init_temperature": -0.1}, "init_temperature must be at least 0, but got -0.1."),
        ({"init_temperature": math.inf}, "init_temperature must be a finite number, but got inf."),
        ({"max_train_examples": 0}, "max_train_examples must be at least 1, but got 0."),
        ({"patience": 0}, "patience must be at least 1, but got 0."),
        ({"min_delta": -1}, "min_delta must be at least 0, but got -1."),
        ({"min_delta": math.nan}, "min_delta must be a finite number, but got nan."),
        ({"stop_at_score": math.nan}, "stop_at_score must be a finite number, but got nan."),
        ({"max_metric_calls": 0}, "max_metric_calls must be at least 1, but got 0."),
        ({"max_tokens": 0}, "max_tokens must be at least 1, but got 0."),
        ({"max_cost": 0.0}, "max_cost must be above 0, but got 0.0."),
        ({"prices": {"openai/m": (-1.0, 2.0)}}, "prices must be at least 0, but got -1.0."),
        ({"timeout_seconds": 0}, "timeout_seconds must be above 0, but got 0."),
        ({"example_timeout_seconds": -3}, "example_timeout_seconds must be above 0, but got -3."),
        ({"lag": -1}, "lag must be at least 0, but got -1."),
        ({"minibatch_size": 0}, "minibatch_size must be at least 1, but got 0."),
        ({"num_threads": 0}, "num_threads must be at least 1, but got 0."),
        ({"max_errors": 0}, "max_errors must be at least 1, but got 0."),
        ({"failure_score": math.nan}, "failure_score must be a finite number, but got nan."),
        ({"num_rounds": 2.5}, "num_rounds must be a whole number, but got 2.5."),
        ({"num_rounds": "many"}, "num_rounds must be a whole number, but got 'many'."),
        ({"seed": "0x"}, "seed must be a whole number, but got '0x'."),
        ({"max_cost": "cheap"}, "max_cost must be a number, but got 'cheap'."),
        ({"verbose": "perhaps"}, "verbose must be True or False, but got 'perhaps'."),
        (
            {"auto": "extreme"},
            "auto must be one of 'light', 'medium', 'heavy' or 'paper', or None, but got 'extreme'.",
        ),
        (
            {"predictor_strategy": "some"},
            "predictor_strategy must be one of 'all', 'round_robin' or 'joint', but got 'some'.",
        ),
        ({"metric": 3}, "metric must be callable, but got 3."),
        ({"stoppers": [3]}, "stoppers must hold callables, but got 3."),
        ({"stoppers": 3}, "stoppers must hold callables, but got 3."),
        ({"callbacks": ["print"]}, "callbacks must hold callables, but got 'print'."),
        ({"trainset": 3}, "trainset must be a list of dspy.Example, but got 3."),
        ({"trainset": "text"}, "trainset must be a list of dspy.Example, but got 'text'."),
        ({"trainset": numpy.zeros(2)}, "trainset must be a list of dspy.Example, but got array([0., 0.])."),
        ({"valset": iter([])}, "valset must be a list of dspy.Example, but got <list_iterato"),
        (
            {"metric": [1, 2]},
            "metric must be callable, but got [1, 2]. The third argument of compile is metric; write",
        ),
        ({"metric": ["x" * 500] * 500}, "metric must be callable, but got ['xxxxxxxxxxxx...xxxxxxxxxxxxx', "),
        (
            {"pruner": "halving"},
            'pruner must be "auto", None, an Optuna pruner or a dspy_opro Pruner, but got \'halv',
        ),
        (
            {"pruner": types.SimpleNamespace(drop=dict)},
            (
                'pruner must be "auto", None, an Optuna pruner or a dspy_opro Pruner, but got '
                "namespace(drop=<class 'dict'>). It lacks checkpoints and most_calls."
            ),
        ),
        ({"pruner": Halving}, "pruner must be an instance, but is the class Halving. Write Halving()."),
        (
            {"proposer": OPROProposer},
            "proposer must be an instance, but is the class OPROProposer. Write OPROPropos",
        ),
        (
            {"metric": SemanticF1},
            "metric must be an instance, but is the class SemanticF1. Write SemanticF1().",
        ),
        (
            {"executor": ThreadPoolExecutor},
            "executor must be an instance, but is the class ThreadPoolExecutor. Writ",
        ),
        (
            {"stoppers": [Patience]},
            "stoppers must be instances, but one is the class Patience. Write Patience(...).",
        ),
        (
            {"stoppers": Patience},
            "stoppers must be instances, but one is the class Patience. Write Patience(...).",
        ),
        ({"callbacks": [dict]}, "callbacks must be instances, but one is the class dict. Write dict(...)."),
        ({"name": 3}, "name must be a text, but got 3."),
        ({"log_dir": 3}, "log_dir must be a path, but got 3."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_value_out_of_range_is_named_with_its_rule(values: dict[str, Any], message: str) -> None:
    for make in (OPROTeleprompter, lambda **given: make_config(given)):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 # the text is compared from its beginning
            make(**values)
        assert str(caught.value).startswith(message)


def test_all_wrong_values_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"k_best must.*\n.*num_threads must"):
        OPROTeleprompter(metric, k_best=0, num_threads=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_metric_calls": 10, "max_full_evals": 2}, "max_metric_calls and max_full_evals both limit"),
        (
            {"auto": "paper", "predictor_strategy": "joint"},
            'predictor_strategy="joint" needs another proposer',
        ),
    ],
)
def test_values_that_contradict_each_other(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OPROTeleprompter(metric, **values)


@pytest.mark.parametrize(
    ("misspelt", "nearest"),
    [
        ("num_thread", "num_threads"),
        ("metrics", "metric"),
        ("temperature", "init_temperature"),
        ("n_rounds", "num_rounds"),
        ("k_bests", "k_best"),
        ("train_set", "trainset"),
        ("promptmodel", "prompt_model"),
        ("lm", "prompt_model"),
        ("optimizer_lm", "prompt_model"),
        ("max_iterations", "num_rounds"),
        ("budget", "max_metric_calls"),
        ("max_candidates", "num_candidates"),
        ("train_examples", "max_train_examples"),
        ("minibatchsize", "minibatch_size"),
    ],
)
def test_a_misspelt_keyword_is_named_with_the_nearest_known_one(misspelt: str, nearest: str) -> None:
    with pytest.raises(TypeError, match=rf"unexpected keyword argument '{misspelt}'.*'{nearest}'\?"):
        OPROTeleprompter(metric, **{misspelt: 1})
    with pytest.raises(TypeError, match=rf"compile got an unexpected .*'{misspelt}'.*'{nearest}'\?"):
        OPROTeleprompter(metric).compile(None, **{misspelt: 1})


@pytest.mark.parametrize("name", ["prompt_model", "task_model"])
def test_a_model_by_its_name_is_refused_at_once(name: str) -> None:
    with pytest.raises(
        TypeError, match=rf"{name} must be a dspy.LM, but is 'openai/gpt-4o'. Write {name}=dspy.LM"
    ):
        OPROTeleprompter(metric, **{name: "openai/gpt-4o"})


def test_a_teachers_model_by_its_name_is_refused_at_once() -> None:
    with pytest.raises(
        TypeError,
        match=r"teacher_settings\['lm'\] must be a dspy.LM, but is 'openai/x'. Write teacher_settings=",
    ):
        OPROTeleprompter(metric, teacher_settings={"lm": "openai/x"})
    assert OPROTeleprompter(metric, teacher_settings={"lm": None}).teacher_settings == {"lm": None}


def test_a_keyword_that_is_like_nothing_has_no_hint() -> None:
    assert "Did you mean" not in str(unknown_keyword("zzz", OPROConfig.model_fields, "compile"))


@pytest.mark.parametrize("values", [{"stoppers": print}, {"callbacks": print}])
def test_one_callable_is_a_list_of_one(values: dict[str, Any]) -> None:
    config = OPROTeleprompter(metric, **values).config
    assert getattr(config, next(iter(values))) == [print]


# --- presets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {"num_rounds": 8, "patience": 4, "num_candidates": 8, "k_best": 20, "pruner": "auto"}),
        (
            {"auto": "medium"},
            {"num_rounds": 8, "num_candidates": 16, "patience": 3, "max_train_examples": 300},
        ),
        (
            {"auto": "heavy"},
            {"num_rounds": 10, "num_candidates": 32, "patience": 3, "max_train_examples": 1000},
        ),
        ({"num_rounds": 3}, {"num_rounds": 3, "patience": 4}),
        ({"auto": "heavy", "max_train_examples": 50}, {"max_train_examples": 50, "num_rounds": 10}),
        ({"pruner": None}, {"pruner": None}),
        ({"auto": "paper", "pruner": "auto"}, {"pruner": "auto", "num_rounds": 200}),
        ({"lag": 0}, {"lag": 0}),
        ({"auto": None, "num_rounds": 3}, {"num_rounds": 3, "patience": None, "max_train_examples": None}),
        ({"num_trials": 20}, {"num_rounds": 3}),
        ({"num_trials": 20, "auto": "heavy"}, {"num_rounds": 3, "num_candidates": 8}),
        ({"num_trials": 120}, {"num_rounds": 8, "num_candidates": 16}),
        ({"num_trials": 120, "auto": "paper"}, {"num_rounds": 15, "num_candidates": 8}),
        ({"num_trials": 20, "num_candidates": 5}, {"num_rounds": 4}),
        ({"num_trials": 20, "num_rounds": 1}, {"num_rounds": 1}),
    ],
)
def test_a_preset_fills_what_is_not_given(values: dict[str, Any], expected: dict[str, Any]) -> None:
    resolved = OPROTeleprompter(metric, **values).config.resolve()
    assert {name: getattr(resolved, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("values", "demos"),
    [
        ({}, (4, 4)),
        ({"max_labeled_demos": 0}, (4, 0)),
        ({"max_labeled_demos": 16}, (4, 16)),
        ({"max_bootstrapped_demos": 2}, (2, 4)),
        ({"max_bootstrapped_demos": 0}, (0, None)),
        ({"max_bootstrapped_demos": 0, "max_labeled_demos": 4}, (0, 4)),
        ({"max_labeled_demos": 3, "auto": None, "num_rounds": 1}, (None, 3)),
        ({"max_labeled_demos": 3, "auto": "paper"}, (None, 3)),
    ],
    ids=str,
)
def test_no_bootstrapped_demos_means_no_demos_of_the_preset(values: dict[str, Any], demos: Any) -> None:
    resolved = OPROTeleprompter(metric, **values).config.resolve()
    assert (resolved.max_bootstrapped_demos, resolved.max_labeled_demos) == demos


def test_the_paper_preset_is_the_paper() -> None:
    """Section 5.1: 8 proposals a step at temperature 1.0, the 20 best texts, 3 exemplars, all in full."""
    config = OPROTeleprompter(metric, auto="paper").config
    resolved = config.resolve()
    assert paper(config)
    assert (resolved.num_candidates, resolved.init_temperature) == (8, 1.0)
    assert (resolved.k_best, resolved.num_exemplars, resolved.num_rounds) == (20, 3, 200)
    assert (resolved.pruner, resolved.lag, resolved.patience) == (None, 0, None)
    assert resolved.max_train_examples is None


@pytest.mark.parametrize(
    "bound",
    [
        {"num_rounds": 1},
        {"num_trials": 1},
        {"patience": 1},
        {"stop_at_score": 1.0},
        {"max_metric_calls": 1},
        {"max_full_evals": 1},
        {"max_tokens": 1},
        {"max_cost": 1.0},
        {"timeout_seconds": 1},
        {"stoppers": [lambda state: None]},
    ],
    ids=lambda bound: next(iter(bound)),
)
def test_without_a_preset_one_bound_is_enough(bound: dict[str, Any]) -> None:
    OPROTeleprompter(metric, auto=None, **bound).config.resolve()


def test_without_a_preset_and_a_bound_nothing_would_end_the_run() -> None:
    with pytest.raises(ValueError, match="auto=None needs at least one bound: num_rounds, "):
        OPROTeleprompter(metric, auto=None).config.resolve()


# --- the constructor -------------------------------------------------------------------------------------


def test_the_short_name_is_the_same_class() -> None:
    assert OPRO is OPROTeleprompter


def test_every_value_is_an_argument_of_the_constructor_with_the_same_default() -> None:
    parameters = inspect.signature(OPROTeleprompter.__init__).parameters
    for name, info in OPROConfig.model_fields.items():
        assert parameters[name].default == info.default, name
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["self", "metric"]


def test_every_argument_is_documented() -> None:
    text = inspect.getdoc(OPROTeleprompter) or ""
    missing = [name for name in OPROConfig.model_fields if name not in text]
    assert missing == []


def test_params_are_a_copy() -> None:
    teleprompter = OPROTeleprompter(metric, k_best=7, log_dir=Path("runs"))
    params = teleprompter.get_params()
    assert params["k_best"] == 7
    assert params["metric"] is metric
    assert OPROTeleprompter(**params).config == teleprompter.config
    params["k_best"] = 1
    params["stoppers"] = [print]
    assert teleprompter.config.k_best == 7
    assert teleprompter.get_params()["stoppers"] == ()


@pytest.mark.parametrize(
    "values", [{}, {"pruner": None}, {"auto": "paper"}, {"auto": "paper", "pruner": "auto"}], ids=str
)
def test_params_make_a_teleprompter_that_runs_the_same(values: dict[str, Any]) -> None:
    teleprompter = OPROTeleprompter(metric, **values)
    again = OPROTeleprompter(**teleprompter.get_params())
    assert again.config.resolve() == teleprompter.config.resolve()
    assert again.get_params() == teleprompter.get_params()


def test_a_config_cannot_be_changed() -> None:
    config = OPROTeleprompter(metric).config
    with pytest.raises(ValueError, match="frozen"):
        config.k_best = 3


def test_an_assigned_argument_is_checked_and_takes_effect() -> None:
    teleprompter = OPROTeleprompter(metric=len)
    assert (teleprompter.metric, teleprompter.num_rounds) == (len, None)
    teleprompter.num_rounds = 5
    assert (teleprompter.num_rounds, teleprompter.config.resolve().num_rounds) == (5, 5)
    with pytest.raises(ValueError, match=r"num_rounds must be at least 1, but got 0\."):
        teleprompter.num_rounds = 0
    assert teleprompter.num_rounds == 5
    with pytest.raises(AttributeError, match="'OPROTeleprompter' object has no attribute 'rounds'"):
        _ = teleprompter.rounds
    assert copy.deepcopy(teleprompter).num_rounds == pickle.loads(pickle.dumps(teleprompter)).num_rounds == 5


def test_the_constructor_takes_a_teacher_for_compile() -> None:
    assert OPROTeleprompter(teacher=None).config == OPROTeleprompter().config
    teacher = object()
    assert OPROTeleprompter(teacher=teacher).teacher is teacher


def test_an_unknown_keyword_is_an_error_even_if_it_is_none() -> None:
    with pytest.raises(TypeError, match="Did you mean 'num_threads'"):
        OPROTeleprompter(num_thread=None)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "budget",
    [
        {"max_metric_calls": 10_000},
        {"max_full_evals": 9},
        {"max_tokens": 9},
        {"max_cost": 1.0},
        {"timeout_seconds": 9},
    ],
    ids=str,
)
@pytest.mark.parametrize("auto", ["light", "medium", "heavy"])
def test_a_budget_lifts_the_rounds_and_the_patience_of_the_preset(auto: Any, budget: dict[str, Any]) -> None:
    config = make_config({"metric": len, "auto": auto, **budget}).resolve()
    assert (config.num_rounds, config.patience) == (None, None)
    assert config.max_train_examples is not None
    kept = make_config({"metric": len, "auto": auto, "num_rounds": 3, "patience": 2, **budget}).resolve()
    assert (kept.num_rounds, kept.patience) == (3, 2)
