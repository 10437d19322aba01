from __future__ import annotations

from typing import Any

import pytest

from dspy_opro.config.arguments import OPROConfig, make_config
from dspy_opro.config.plan import Sizes, data_sizes, forecast, make_search, most_demos
from dspy_opro.search import Search
from dspy_opro.search.tasks import Plan
from dspy_opro.search.trajectory import Candidate

STUDENT = Candidate({"self": "Answer."})


def search(num_train: int = 60, num_val: int = 0, **options: Any) -> tuple[OPROConfig, Search]:
    """The plan of a run that keeps the student's demos, unless the options say otherwise."""
    values = {
        "metric": lambda example, prediction: 1.0,
        "confirm": False,
        "max_bootstrapped_demos": 0,
        **options,
    }
    config = make_config(values).resolve()
    return config, make_search(config, STUDENT, data_sizes(config, num_train, num_val))


def plan(**options: Any) -> Plan:
    return search(**options)[1].plan


@pytest.mark.parametrize(
    ("options", "num_candidates", "lag"),
    [
        ({}, 8, 2),
        ({"auto": "medium"}, 16, 2),
        ({"auto": "heavy"}, 32, 2),
        ({"auto": "paper"}, 8, 0),
        ({"auto": None, "num_rounds": 50}, 8, 3),
        ({"auto": None, "max_metric_calls": 1200}, 8, 3),
        ({"auto": None, "max_metric_calls": 1600}, 16, 2),
        ({"auto": None, "max_metric_calls": 6400}, 32, 3),
        ({"auto": None, "max_metric_calls": 100_000}, 64, 3),
        ({"auto": None, "max_metric_calls": 1600, "num_rounds": 4}, 8, 1),
        ({"auto": None, "max_metric_calls": 1600, "num_val": 60}, 16, 2),
        ({"auto": None, "max_metric_calls": 1600, "pruner": None}, 8, 0),
        ({"auto": None, "max_tokens": 1_000_000}, 16, 3),
        ({"auto": None, "max_metric_calls": 1600, "num_candidates": 5, "lag": 1}, 5, 1),
    ],
)
def test_a_long_run_has_larger_rounds_and_more_of_them_at_once(
    options: dict[str, Any], num_candidates: int, lag: int
) -> None:
    found = plan(**options)
    assert (found.num_candidates, found.lag) == (num_candidates, lag)


@pytest.mark.parametrize(
    ("num_val", "confirm", "calls"), [(400, True, 4600 - 120), (400, False, 4600), (0, False, 600)]
)
def test_a_pass_is_all_examples_that_are_given(num_val: int, confirm: bool, calls: int) -> None:
    found = plan(auto=None, max_full_evals=10, num_train=60, num_val=num_val, confirm=confirm)
    assert found.max_metric_calls == calls


def test_trials_are_candidates_in_all() -> None:
    found = plan(num_trials=20)
    assert (found.num_trials, found.num_rounds, found.num_candidates) == (20, 3, 8)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"num_train": 10},
            (
                "OPRO (auto='light'): at most 64 candidates in 8 rounds, 298 examples scored and 64 proposals (192 if "
                "all of them are rejected). The race usually needs far fewer examples. The run may end earlier "
                "because of patience."
            ),
        ),
        (
            {"num_train": 10, "auto": None, "num_rounds": 2, "pruner": None},
            (
                "OPRO (auto=None): at most 16 candidates in 2 rounds, 170 examples scored and 16 proposals (48 if "
                "all of them are rejected)."
            ),
        ),
        (  # 10 + 8 * 10 + 8 * 10 + 4 * 10
            {
                "num_train": 10,
                "auto": None,
                "num_trials": 20,
                "pruner": None,
                "max_cost": 1,
                "stop_at_score": 0.9,
            },
            (
                "OPRO (auto=None): at most 20 candidates in 3 rounds, 210 examples scored and 20 proposals (60 if "
                "all of them are rejected). The run may end earlier because of stop_at_score or max_cost."
            ),
        ),
        (
            {"auto": None, "max_metric_calls": 1200},
            (
                "OPRO (auto=None): rounds of 8 candidates until max_metric_calls ends the run, at most 1,200 examples "
                "scored."
            ),
        ),
        (
            {"num_train": 100, "max_bootstrapped_demos": 4, "max_labeled_demos": 4},
            (
                "OPRO (auto='light'): at most 64 candidates in 8 rounds, 1,123 examples scored and 64 proposals (192 "
                "if all of them are rejected). The race usually needs far fewer examples. 4 of the candidates bring "
                "demos. The run may end earlier because of patience."
            ),
        ),
        (
            {"num_train": 100, "max_metric_calls": 300, "max_labeled_demos": 4},
            (
                "OPRO (auto='light'): rounds of 8 candidates until max_metric_calls ends the run, at most 300 examples "
                "scored. 4 of the candidates bring demos."
            ),
        ),
        (
            {"auto": None, "timeout_seconds": 60, "stoppers": [lambda state: None]},
            "OPRO (auto=None): rounds of 16 candidates until timeout_seconds or stoppers ends the run.",
        ),
    ],
)
def test_the_forecast_names_what_is_active_and_nothing_else(options: dict[str, Any], text: str) -> None:
    config, planned = search(**options)
    assert forecast(config.auto, planned, config.bounds) == text


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"max_metric_calls": 200}, (16, 0, 15, 30)),
        ({"max_metric_calls": 500}, (16, 0, 37, 60)),
        ({"max_metric_calls": 512}, (16, 0, 38, 60)),
        ({"max_metric_calls": 1000}, (31, 0, 40, 60)),
        ({"max_metric_calls": 3200}, (60, 0, 60, 60)),
        ({"max_metric_calls": 3200, "num_val": 400}, (60, 0, 60, 120)),
        ({"max_metric_calls": 3200, "confirm": False}, (60, 60, 0, 0)),
        ({"max_metric_calls": 640, "confirm": False}, (20, 20, 0, 0)),
        ({"auto": "paper"}, (60, 60, 0, 0)),
        ({"max_metric_calls": 200, "confirm": False}, (16, 16, 0, 0)),
        ({"max_metric_calls": 100}, (16, 16, 0, 0)),  # too few calls to confirm anything
        ({"max_metric_calls": 200, "num_val": 6}, (16, 6, 0, 0)),
        ({"max_full_evals": 10}, (60, 0, 60, 60)),
        ({"num_rounds": 5}, (60, 0, 60, 60)),
        ({"num_rounds": 5, "num_val": 400}, (60, 0, 60, 120)),
        ({"num_rounds": 5, "num_val": 7}, (60, 7, 0, 0)),
        # No candidate is scored on an example that may be a demo,
        ({"num_rounds": 5, "max_labeled_demos": 4}, (45, 0, 45, 60)),
        ({"max_metric_calls": 3200, "num_val": 400, "max_labeled_demos": 4}, (45, 0, 45, 90)),
        # and where there are too few examples for that, others than these choose.
        ({"num_rounds": 5, "max_labeled_demos": 8}, (60, 40, 20, 20)),
        ({"max_metric_calls": 3200, "num_val": 400, "max_labeled_demos": 8}, (60, 100, 240, 300)),
        ({"max_metric_calls": 1000, "max_bootstrapped_demos": 8}, (31, 31, 29, 29)),
        ({"max_metric_calls": 500, "max_bootstrapped_demos": 8}, (16, 0, 37, 60)),
    ],
)
def test_a_valset_confirms_the_result_and_otherwise_selects_within_a_share(
    options: dict[str, Any], sizes: Sizes
) -> None:
    values = {"num_val": 60, "auto": None, "metric": lambda example, prediction: 1.0, **options}
    num_val, num_for_demos = values.pop("num_val"), 15 if most_demos(make_config(values)) == 4 else 0
    assert data_sizes(make_config(values).resolve(), 60, num_val) == Sizes(
        *sizes, 60 + num_val, num_for_demos
    )


@pytest.mark.parametrize(
    ("num_train", "options", "sizes"),
    [
        (
            60,
            {"max_metric_calls": 640},
            (20, 0, 40, 40),
        ),  # no more, because all others confirm the result
        (100, {"max_metric_calls": 640}, (44, 0, 48, 56)),
        (200, {"max_metric_calls": 640}, (44, 0, 48, 96)),
        (200, {"max_metric_calls": 1600}, (50, 0, 120, 150)),
        (60, {"max_metric_calls": 640, "confirm": False}, (44, 0, 0, 0)),
        (200, {"max_metric_calls": 640, "max_train_examples": 30}, (30, 0, 48, 96)),
    ],
)
def test_examples_that_are_not_held_back_make_full_scores_better(
    num_train: int, options: dict[str, Any], sizes: Sizes
) -> None:
    values = {"auto": None, "metric": lambda example, prediction: 1.0, **options}
    num_per_pass = options.get("max_train_examples", num_train)
    assert data_sizes(make_config(values).resolve(), num_train, 0) == Sizes(*sizes, num_per_pass)


@pytest.mark.parametrize("num_val", [0, 20, 60])
@pytest.mark.parametrize("max_full_evals", [1, 2, 3, 10])
def test_passes_are_a_budget_for_the_confirmation(max_full_evals: int, num_val: int) -> None:
    options: dict[str, Any] = {"auto": None, "max_full_evals": max_full_evals, "confirm": True}
    found = plan(num_train=100, num_val=num_val, **options)
    calls = max_full_evals * (100 + num_val)
    assert 2 * found.num_held_back <= 0.15 * calls
    assert found.max_metric_calls == calls - 2 * found.num_held_back
    assert (found.num_held_back > 0) == (calls >= 120)


def test_the_forecast_counts_the_examples_that_confirm_the_result() -> None:
    config, planned = search(auto="light", max_metric_calls=200, confirm=True)
    assert planned.plan.num_held_back == 15
    assert "at most 200 examples scored" in forecast(config.auto, planned, config.bounds)
